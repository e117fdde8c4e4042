"""Which layout to train with on so many GPUs: ``megatron-distill plan RECIPE --fit GPUS``.

In: a recipe, the models' shapes, the number of trainer GPUs. Out: the layouts that the models can take and a GPU can hold, the
fastest first on paper, with where each one's time goes.

The clock is a model, not a measurement: one optimizer step at the longest prompt and response, on H100s of 8 to a node, with
the rates below, nothing overlapped but what is said. It ranks layouts; the seconds themselves are not to be believed. What
servers take is not in it.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_distill.config import ParallelConfig, RunConfig, problems_of
from megatron_distill.launch.layouts import layout_problems
from megatron_distill.launch.memory import (
    expert_copies,
    expert_tp,
    micro_batch_tokens,
    num_micro_batches,
    num_parameters,
    rank_parameters,
)
from megatron_distill.launch.plan import layout_line, plan
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.models.pipeline import stage_layers

NODE_GPUS = 8
FLOPS = 400e12  # a second that dense bf16 layers reach: 40 % of the peak
NODE_BYTES_PER_S = 300e9  # of a GPU to the others of its node, over NVLink
NETWORK_BYTES_PER_S = 40e9  # of a GPU to other nodes
LAUNCH_S = 3e-4  # of the kernels of a layer, forward and backward, however small they are
SIZE = 2  # bytes of a bf16 activation
SHOWN = 5
_RECOMPUTE: tuple[Literal["none", "full"], ...] = ("none", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout that fits.

    Attributes:
        config: the recipe with this layout.
        gib: memory of the fullest GPU.
        seconds: of a step on paper, by what takes them.
    """

    config: RunConfig
    gib: float
    seconds: dict[str, float]

    @property
    def step_s(self) -> float:
        """All of it."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Search:
    """What became of every layout that was tried.

    Attributes:
        found: those that fit, fastest first.
        num_refused: the models or the recipe cannot take them.
        num_too_large: a GPU cannot hold them.
    """

    found: tuple[Candidate, ...]
    num_refused: int
    num_too_large: int


def search(config: RunConfig, student: HfConfig, teacher: HfConfig | None, gpus: int, gpu_gib: float) -> Search:
    """Try every layout on ``gpus`` trainer GPUs, with the distributed optimizer, and sequence parallelism wherever tp > 1."""
    models = {"student": student} | ({"teacher": teacher} if teacher else {})
    found, num_refused, num_too_large = [], 0, 0
    for candidate in _layouts(config, student, gpus):
        if problems_of(candidate) or layout_problems(candidate, models):
            num_refused += 1
            continue
        planned = plan(candidate, student, teacher, gpu_gib)
        if not planned.trainer_fits:
            num_too_large += 1
            continue
        found.append(Candidate(candidate, planned.trainer_gib, step_seconds(candidate, student, teacher)))
    # Of equals, the one with fewer axes.
    found.sort(key=lambda one: (round(one.step_s, 3), _num_axes(one.config)))
    return Search(tuple(found), num_refused, num_too_large)


def _layouts(config: RunConfig, student: HfConfig, gpus: int) -> Iterator[RunConfig]:
    powers = (1, 2, 4, 8)
    share = config.rollouts_per_step
    for tp, cp, pp in itertools.product(powers, powers, (1, 2, 4, 8, 16)):
        if gpus % (tp * cp * pp):
            continue
        dp = gpus // (tp * cp * pp)
        experts = [ep for ep in (1, 2, 4, 8, 16, 32, 64) if ep <= tp * cp * dp] if student.num_experts else [1]
        for ep, vpp, recompute in itertools.product(experts, (1, 2) if pp > 1 else (1,), _RECOMPUTE):
            etp = 1 if student.num_experts else None
            parallel = ParallelConfig(tp, pp, vpp, dp, cp, ep, etp, sequence_parallel=tp > 1)
            for rollouts in (1, 2, 4, 8):
                if share % (dp * rollouts) == 0:
                    student_config = replace(
                        config.student, parallel=parallel, recompute=recompute, distributed_optimizer=True
                    )
                    yield replace(config, student=student_config, micro_batch_rollouts=rollouts, micro_batch_tokens=0)


def step_seconds(config: RunConfig, student: HfConfig, teacher: HfConfig | None) -> dict[str, float]:
    """The clock of one optimizer step, by what takes the time.

    With N tokens of a replica's step, and L layers of width H, of the experts those that work on a token, on the pipeline's
    slowest rank (the last one has the output layer too, for response tokens):

        compute     6 N a parameter, or 8 N where layers are computed twice, over tp cp FLOPS; attention; 2 N a parameter
                    of a teacher beside, over pp too
        launches    layers and micro-batches times LAUNCH_S
        tp          4 gathers and 4 scatters of [N, H] a layer
        ep          4 exchanges of [N, k H] a layer, of which (ep - 1) / ep leave the rank
        cp          keys and values round the ring, forward, backward and their gradients; half of it behind attention
        pp          [N, H] there and back, for each virtual stage
        bubble      (pp - 1) / (vpp micro-batches) of the above
        dp          gradients in fp32 to their owners, parameters back; once
    """
    parallel, passes = config.student.parallel, 4 if config.student.recompute == "full" else 3
    tp, pp, cp = parallel.tp, parallel.pp, parallel.cp
    num_micro = num_micro_batches(config)
    tokens = num_micro * micro_batch_tokens(config) / cp  # of a rank's step
    work, layers = _slowest_rank(config, student)
    forward = active_parameters(teacher) / pp if teacher is not None and config.teacher.in_trainer else 0.0
    width = student.hidden_size * SIZE * tokens / tp
    busy = {"compute": 2 * (passes * work + forward) * tokens / tp / FLOPS}
    busy["launches"] = layers * num_micro * LAUNCH_S * passes / 3 * (2 if student.num_experts else 1)
    busy["tp"] = 8 * passes / 3 * layers * width * (tp - 1) / _rate(tp)
    keys = student.num_query_groups * student.head_dim * SIZE * tokens / tp
    busy["cp"] = 6 / 2 * layers * keys * (cp - 1) / _rate(tp * cp)
    if student.num_experts:
        sent = 4 * passes / 3 * layers * width * student.experts_per_token * (parallel.ep - 1) / parallel.ep
        busy["ep"] = sent / _rate(parallel.ep * expert_tp(parallel))
    busy["pp"] = 2 * parallel.vpp * width / _rate(parallel.num_ranks) if pp > 1 else 0.0
    bubble = sum(busy.values()) * (pp - 1) / (parallel.vpp * num_micro)
    dense, experts = rank_parameters(student, parallel)
    moved = dense * (parallel.dp * cp > 1) + experts * (expert_copies(parallel) > 1)
    return busy | {"bubble": bubble, "dp": moved * (4 + SIZE) / _rate(tp * cp * parallel.dp)}


def _rate(span: int) -> float:
    """Bytes a second within so many neighbours. Megatron numbers ranks along tp first, then cp, dp, and pp last."""
    return NODE_BYTES_PER_S if span <= NODE_GPUS else NETWORK_BYTES_PER_S


def _slowest_rank(config: RunConfig, model: HfConfig) -> tuple[float, int]:
    """Multiplications a token of a forward pass on the pipeline's slowest rank, over its tp ranks, and its layers."""
    parallel = config.student.parallel
    row = config.data.max_prompt_tokens + config.max_horizon_tokens
    matrix = model.vocab_size * model.hidden_size
    layer = (active_parameters(model) - matrix * (1 if model.tie_word_embeddings else 2)) / model.num_layers
    layer += model.num_attention_heads * model.head_dim * row  # scores and values, over half the square
    head = matrix * config.max_horizon_tokens / row
    stages = stage_layers(model.num_layers, parallel.pp * parallel.vpp)
    of_rank = [sum(stages[rank :: parallel.pp]) for rank in range(parallel.pp)]
    work, slowest = max(
        (layers * layer + head * (rank == parallel.pp - 1), layers) for rank, layers in enumerate(of_rank)
    )
    return work, slowest


def active_parameters(model: HfConfig, tokens: int = 1) -> float:
    """Parameters that work on a token; those that work on any of so many, if each chooses its experts at random."""
    if not model.num_experts:
        return num_parameters(model)
    idle = model.num_experts * (1 - model.experts_per_token / model.num_experts) ** tokens
    return num_parameters(model) - model.num_layers * idle * 3 * model.hidden_size * model.expert_ffn_hidden_size


def _num_axes(config: RunConfig) -> int:
    parallel = config.student.parallel
    axes = (parallel.tp, parallel.pp, parallel.vpp, parallel.cp, parallel.ep)
    return sum(size > 1 for size in axes) + (config.student.recompute != "none")


def overrides_of(config: RunConfig) -> str:
    """What to type to get a candidate's layout."""
    parallel = config.student.parallel
    fields = [f"student.parallel.{name}={getattr(parallel, name)}" for name in ("tp", "pp", "vpp", "cp", "dp", "ep")]
    fields += [f"student.parallel.etp={'null' if parallel.etp is None else parallel.etp}"]
    fields += [f"student.parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}"]
    fields += [f"student.recompute={config.student.recompute}", "student.distributed_optimizer=true"]
    return " ".join([*fields, "micro_batch_tokens=0", f"micro_batch_rollouts={config.micro_batch_rollouts}"])


def render(config: RunConfig, student: HfConfig, result: Search, gpus: int) -> str:
    """The search as a page of text: the fastest layouts, and why the first is first."""
    tried = len(result.found) + result.num_refused + result.num_too_large
    lines = [
        f"{config.name}: layouts of the trainer on {gpus} GPUs; {tried} tried, {result.num_refused} refused by "
        f"the models' shapes or the recipe's rules, {result.num_too_large} too large for a GPU, {len(result.found)} left",
    ]
    if not result.found:
        return "\n".join([*lines, "none fits: give more GPUs, larger ones (--gpu-gib), or a shorter horizon"])
    lines += ["seconds of a step on paper (a model of H100s, for the order only), by what takes them:", ""]
    for one in _distinct(result.found)[:SHOWN]:
        spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in one.seconds.items() if seconds >= 0.005)
        lines.append(
            f"{one.step_s:8.2f} s  {one.gib:5.1f} GiB  {layout_line(one.config, student)}, micro-batches of "
            f"{one.config.micro_batch_rollouts}"
        )
        lines += [f"{'':21}{spent}"] if spent else []
    lines += ["", f"first: {_reason(result.found)}", f"type:  {overrides_of(result.found[0].config)}"]
    return "\n".join(lines)


def _distinct(found: tuple[Candidate, ...]) -> list[Candidate]:
    """The best of each tp, pp, vpp, cp and ep, whatever its micro-batches and recomputation."""
    best: dict[tuple[int, ...], Candidate] = {}
    for one in found:
        parallel = one.config.student.parallel
        best.setdefault((parallel.tp, parallel.pp, parallel.vpp, parallel.cp, parallel.ep), one)
    return list(best.values())


def _reason(found: tuple[Candidate, ...]) -> str:
    """What the first layout saves against the next."""
    best, *others = _distinct(found)
    if not others:
        return "no other tp, pp, vpp, cp and ep fit"
    saved = {
        name: others[0].seconds.get(name, 0.0) - best.seconds.get(name, 0.0)
        for name in best.seconds | others[0].seconds
    }
    by_size = sorted((name for name in saved if abs(saved[name]) >= 0.005), key=lambda name: -abs(saved[name]))
    less = [f"{saved[name]:.2f} s of {name}" for name in by_size if saved[name] > 0]
    more = [f"{-saved[name]:.2f} s of {name}" for name in by_size if saved[name] < 0]
    text = f"against the next it saves {', '.join(less) or 'an axis that gains nothing'}"
    return text + (f" and spends {', '.join(more)}" if more else "")
