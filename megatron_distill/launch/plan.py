"""What a run will take, before anything starts: ``megatron-distill plan RECIPE [--gpu-gib 80]``.

In: a recipe's config and the two models' ``config.json`` (of the model directories, or those that ``recipes/model_configs``
ships, if the models are not there yet). Out: ranks and layout, memory of a trainer GPU and of a server GPU part by part, bytes
on the wire a step and on the disk, and, if something does not fit, the settings that would make it fit. The arithmetic is in
``launch.memory`` and ``launch.disk``; ``--fit GPUS`` goes to ``launch.fit``. Imports neither torch, Megatron nor SGLang.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig
from megatron_distill.config.loading import recipes_package
from megatron_distill.errors import ConfigError
from megatron_distill.launch.disk import disk
from megatron_distill.launch.launch import MODEL_OF, num_gpus, server_groups
from megatron_distill.launch.layouts import layout_problems
from megatron_distill.launch.memory import (
    GIB,
    Part,
    expert_copies,
    expert_tp,
    num_parameters,
    server_memory,
    trainer_memory,
    wire,
)
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.models.pipeline import stage_layers

RESERVE_GIB = 4.0  # CUDA context, NCCL and cuBLAS buffers, fragmentation


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        trainer: memory of the fullest trainer GPU, in parts.
        servers: {role: (memory of one of its GPUs in parts, tokens that its key-value cache then holds)}.
        wire: bytes a step that leave a process, in parts.
        disk: bytes of the run folder at its fullest, in parts.
        student_parameters: of the whole student, as Hugging Face counts (tied matrices once).
        teacher_parameters: of the teacher, counted the same way; 0 without one.
        gpu_gib: memory of a GPU.
        trainer_room_gib: what a trainer GPU has for the trainer: a reserve is kept, and what servers take that share it.
    """

    trainer: tuple[Part, ...]
    servers: dict[str, tuple[tuple[Part, ...], int]]
    wire: tuple[Part, ...]
    disk: tuple[Part, ...]
    student_parameters: int
    teacher_parameters: int
    gpu_gib: float
    trainer_room_gib: float

    @property
    def trainer_gib(self) -> float:
        """Memory of the fullest trainer GPU."""
        return sum(part.num_bytes for part in self.trainer) / GIB

    @property
    def trainer_fits(self) -> bool:
        """Whether a trainer GPU holds it."""
        return self.trainer_gib <= self.trainer_room_gib

    def server_fits(self, role: str, tokens: int) -> bool:
        """Whether a server's cache holds at least one longest sequence of ``tokens``."""
        return self.servers[role][1] >= tokens


def plan(config: RunConfig, student: HfConfig, teacher: HfConfig | None, gpu_gib: float) -> Plan:
    """Do the arithmetic for one config; ``teacher`` is None for a run that needs none."""
    models = {"student": student, "teacher": teacher or student}
    server_gpus = sum(replicas * tp for replicas, tp in server_groups(config).values())
    shared = config.servers.shared_gpu_frac * math.ceil(server_gpus / num_gpus(config))
    return Plan(
        trainer=tuple(trainer_memory(config, student, teacher)),
        servers={
            role: server_memory(config, models[MODEL_OF[role]], tp, gpu_gib)
            for role, (_, tp) in server_groups(config).items()
        },
        wire=tuple(wire(config, student, teacher)),
        disk=tuple(disk(config, student)),
        student_parameters=num_parameters(student),
        teacher_parameters=num_parameters(teacher) if teacher else 0,
        gpu_gib=gpu_gib,
        trainer_room_gib=gpu_gib * (1 - shared) - RESERVE_GIB,
    )


# --- remedies ---------------------------------------------------------------------------------------------------------


def remedies(config: RunConfig, student: HfConfig, teacher: HfConfig | None, gpu_gib: float) -> list[str] | None:
    """Overrides that make an overfull trainer fit: one if one suffices, else the fewest of a fixed order, added up.

    The order is by what they cost in speed. Only sound configs are proposed.

    Returns:
        ``section.field=value`` lines; None if nothing in the list helps. Empty if it fits as it is.
    """

    models = {"student": student} | ({"teacher": teacher} if teacher else {})

    def fits(candidate: RunConfig) -> bool:
        return plan(candidate, student, teacher, gpu_gib).trainer_fits

    if fits(config):
        return []
    for override in _overrides(config):
        changed = _sound(config, override, models)
        if changed is not None and fits(changed):
            return [override]
    chosen: list[str] = []
    while not fits(config):
        now = plan(config, student, teacher, gpu_gib).trainer_gib
        candidates = ((override, _sound(config, override, models)) for override in _overrides(config))
        lower = (
            (override, changed)
            for override, changed in candidates
            if changed is not None and plan(changed, student, teacher, gpu_gib).trainer_gib < now
        )
        override, changed = next(lower, ("", None))
        if changed is None:
            return None
        chosen = [one for one in chosen if one.split("=")[0] != override.split("=")[0]] + [override]
        config = changed
    return chosen


def server_remedies(
    config: RunConfig, student: HfConfig, teacher: HfConfig | None, gpu_gib: float
) -> dict[str, str | None]:
    """For servers whose cache does not hold a longest sequence: the smallest of 2, 4 and 8 times their tp with which it does.

    Returns:
        {``servers.*_tp``: the override, or None if the model cannot be shared so, or none suffices}. Empty if all fit.
    """
    models = {"student": student} | ({"teacher": teacher} if teacher else {})
    as_it_is, tokens = plan(config, student, teacher, gpu_gib), config.max_sequence_tokens

    def fits(role: str, override: str) -> bool:
        changed = _sound(config, override, models)
        return changed is not None and plan(changed, student, teacher, gpu_gib).server_fits(role, tokens)

    found = {}
    for role, (_, tp) in server_groups(config).items():
        if not as_it_is.server_fits(role, tokens):
            field = f"servers.{MODEL_OF[role]}_tp"
            wider = (f"{field}={times * tp}" for times in (2, 4, 8))
            found[field] = next((override for override in wider if fits(role, override)), None)
    return found


def _sound(config: RunConfig, override: str, models: dict[str, HfConfig]) -> RunConfig | None:
    """The changed config, or None if it breaks a rule or the models cannot take it."""
    try:
        changed = config_module.with_overrides(config, [override])
    except ConfigError:
        return None
    return None if layout_problems(changed, models) else changed


def _overrides(config: RunConfig) -> Iterator[str]:
    layout = config.student
    if not layout.distributed_optimizer and layout.parallel.dp * layout.parallel.cp > 1:
        yield "student.distributed_optimizer=true"
    if layout.parallel.tp > 1 and not layout.parallel.sequence_parallel:
        yield "student.parallel.sequence_parallel=true"
    for number in range(config.micro_batch_rollouts - 1, 0, -1):
        if config.micro_batch_rollouts % number == 0 and not config.micro_batch_tokens:
            yield f"micro_batch_rollouts={number}"
    if config.micro_batch_tokens > config.data.max_prompt_tokens + config.max_horizon_tokens:
        yield f"micro_batch_tokens={config.micro_batch_tokens // 2}"
    if layout.recompute != "full":
        yield "student.recompute=full"
    for axis in ("tp", "cp"):
        for size in (2, 4, 8):
            if size > getattr(layout.parallel, axis):
                yield f"student.parallel.{axis}={size}"


# --- command line -----------------------------------------------------------------------------------------------------


def architecture(path: str) -> HfConfig:
    """A model's ``config.json``: of its directory, or of ``recipes/model_configs`` if there is no such directory yet.

    Raises:
        CheckpointError: it is in neither place, or describes what cannot be converted.
    """
    shipped = resources.files(recipes_package()) / "model_configs" / f"{Path(path).name}.json"
    if not Path(path).is_dir() and shipped.is_file():
        import json

        return HfConfig.from_dict(json.loads(shipped.read_text()), where=str(shipped))
    return HfConfig.from_dir(path)


def layout_line(config: RunConfig, student: HfConfig) -> str:
    """Every axis of the trainer's layout that does something, in words."""
    sizes, recompute = config.student.parallel, config.student.recompute
    axes = [f"tp {sizes.tp}" + (" with sequence parallelism" if sizes.sequence_parallel else ""), f"pp {sizes.pp}"]
    if sizes.vpp > 1:
        axes[-1] += f" in {sizes.vpp} virtual stages each"
    axes += [f"cp {sizes.cp}"] if sizes.cp > 1 else []
    line = f"{' x '.join([*axes, f'dp {sizes.dp}'])} = {sizes.num_ranks} ranks"
    stages = stage_layers(student.num_layers, sizes.pp * sizes.vpp)
    if len(set(stages)) > 1:
        runs = [(layers, len(list(run))) for layers, run in itertools.groupby(stages)]
        line += f", stages of {'+'.join(f'{n}*{layers}' if n > 1 else f'{layers}' for layers, n in runs)} layers"
    if student.num_experts:
        line += f", experts over ep {sizes.ep} x etp {expert_tp(sizes)} ranks, {expert_copies(sizes)} time(s)"
    return line + (f", recompute {recompute}" if recompute != "none" else "")


def render(
    config: RunConfig,
    student: HfConfig,
    result: Plan,
    remedy: list[str] | None,
    server_remedy: dict[str, str | None],
) -> str:
    """The plan as a page of text, with what ``remedies`` and ``server_remedies`` say of it."""
    layout = config.student
    groups = ", ".join(f"{n} {role} server(s) of tp {tp}" for role, (n, tp) in server_groups(config).items())
    teacher = f"{result.teacher_parameters:,} parameters ({config.teacher.path}), {config.teacher.transport}"
    if not result.teacher_parameters:
        teacher = "none"
    steps = f"{config.num_steps} steps of {config.rollouts_per_step} rollouts"
    lines = [
        f"{config.name}: {steps}, responses up to {config.max_horizon_tokens} tokens",
        f"  student   {result.student_parameters:,} parameters ({config.student.path})",
        f"  teacher   {teacher}",
        f"  trainer   {layout_line(config, student)}, {layout.dtype}",
        f"  servers   {groups}",
        f"  GPUs      {num_gpus(config)} in all, {result.gpu_gib:g} GiB each",
        "",
        "memory of the fullest trainer GPU",
        *map(_memory_line, result.trainer),
        f"  {'sum':<18}{result.trainer_gib:9.2f} GiB  of {result.trainer_room_gib:g}, "
        f"{RESERVE_GIB:g} GiB being kept for CUDA and NCCL: {_verdict(result.trainer_fits)}",
    ]
    for role, (parts, tokens) in result.servers.items():
        lines += ["", f"memory of each {role} server's GPU", *map(_memory_line, parts)]
        holds = f"{tokens:,} tokens: {tokens // config.max_sequence_tokens:,} of the longest sequences at once"
        lines.append(f"  {'cache holds':<18}{holds}: {_verdict(result.server_fits(role, config.max_sequence_tokens))}")
    lines += ["", "bytes on the wire a step", *map(_memory_line, result.wire)]
    lines += ["", "bytes of the run folder at its fullest", *map(_memory_line, result.disk)]
    lines.append(_sum_line(result.disk))
    for field, override in server_remedy.items():
        none = f"no {field} suffices; use larger GPUs (--gpu-gib), a smaller model, or a shorter horizon"
        lines.append(f"\nto fit: {override or none}")
    if remedy:
        lines.append(f"\nto fit: {' '.join(remedy)}")
    elif remedy is None:
        lines.append(
            "\nto fit: no setting here suffices; use more nodes (student.parallel.pp), a smaller model, or a shorter horizon"
        )
    return "\n".join(lines)


def _memory_line(part: Part) -> str:
    return f"  {part.name:<18}{part.num_bytes / GIB:9.2f} GiB  {part.rule}"


def _sum_line(parts: Sequence[Part]) -> str:
    return f"  {'sum':<18}{sum(part.num_bytes for part in parts) / GIB:9.2f} GiB"


def _verdict(fits: bool) -> str:
    return "fits" if fits else "DOES NOT FIT"
