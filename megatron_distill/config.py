"""What a run is: one tree of frozen dataclasses, loaded strictly.

In: a recipe (a function in ``recipes/`` that returns a ``RunConfig``) and overrides from the command line
(``rollouts.horizon_tokens=256``). Out: a validated ``RunConfig``, written to the run folder as ``config.json``.

Every field carries its help text (with the unit in its name: num_*, *_frac, *_s, *_tokens, *_nats), unknown keys are
refused with a suggestion, and all problems are reported at once, before any process starts. Importing this module pulls
in neither torch, Megatron, SGLang nor NeMo-Run.
"""

import dataclasses
import difflib
import itertools
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_distill.errors import ConfigError
from megatron_distill.schedules import Schedule, constant, piecewise

SERVER_RESERVED_TOKENS = 8  # places of a server's context that SGLang keeps for itself (7), and one to spare
SERVING_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # ``StudentConfig.dtype`` as SGLang spells it


def _field(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class StudentConfig:
    """The model that is trained, by Megatron, and served for rollouts, by SGLang."""

    path: str = _field("", "Hugging Face directory of the student: config, safetensors, tokenizer")
    tp: int = _field(1, "tensor-parallel size: ranks that share each layer and the vocabulary")
    pp: int = _field(1, "pipeline-parallel size: ranks that share the layers")
    dp: int = _field(1, "data-parallel size: replicas that share a step's rollouts")
    sequence_parallel: bool = _field(False, "shard activations over tp between layers (Transformer Engine only)")
    dtype: Literal["fp32", "bf16"] = _field("fp32", "parameters and activations in training")
    distributed_optimizer: bool = _field(False, "shard optimizer state over dp")
    recompute: bool = _field(False, "recompute activations in the backward pass instead of keeping them")


@dataclass(frozen=True)
class TeacherConfig:
    """The model that is imitated, and how its distribution reaches the loss."""

    path: str = _field("", "Hugging Face directory of the teacher; its tokenizer must equal the student's")
    transport: Literal["sglang_topk", "in_process"] = _field(
        "sglang_topk",
        "sglang_topk: a server sends its top-k log-probs and the tail is one bucket; "
        "in_process: Megatron holds the teacher beside the student, full vocabulary, same sharding",
    )
    top_k: int = _field(64, "log-probs a token from the server (sglang_topk), at most the vocabulary size")
    tail: Literal["bucket", "renormalised", "dropped"] = _field(
        "bucket", "what becomes of the mass outside the top-k; bucket is the only unbiased-in-sign choice"
    )
    max_missing_frac: float = _field(0.1, "share of a step's rollouts that may lack teacher scores; more is an error")
    cache_dir: str = _field(
        "", "directory in which the server's scores and responses are kept, for later epochs and runs; empty keeps none"
    )


@dataclass(frozen=True)
class DataConfig:
    """Problems, one a record: a .jsonl or .parquet file, or a Hugging Face data set saved to a directory."""

    train_path: str = _field("", "training problems: .jsonl, .parquet, or a saved data set's directory")
    heldout_path: str = _field("", "held-out problems, likewise, for evaluation and the curriculum's gate")
    prompt_key: str = _field("prompt", "column that holds the prompt: a string or a list of chat messages")
    answer_key: str = _field("answer", "column that holds the reference answer")
    solution_key: str = _field("solution", "column that holds a worked response, for rollouts.off_policy_source=data")
    max_prompt_tokens: int = _field(256, "longest prompt; a longer one is refused at start-up")


@dataclass(frozen=True)
class RolloutConfig:
    """Who writes the prefix, and how it is sampled."""

    student_prefix_frac: Schedule = _field(
        constant(1.0), "share of a step's prompts whose response the student writes; the teacher writes the others"
    )
    prompts_per_step: int = _field(32, "prompts in one optimizer step, over all dp replicas")
    rollouts_per_prompt: int = _field(1, "responses to each prompt: the group of group-relative RL")
    off_policy_source: Literal["teacher", "data"] = _field(
        "teacher", "who writes what the student does not: the teacher's server, or the data's own solutions"
    )
    sync_every_steps: int = _field(
        1, "optimizer steps between weight syncs to the student's servers; above 1 rollouts are stale, and say so"
    )
    temperature: float = _field(1.0, "sampling temperature of rollouts")
    top_p: float = _field(1.0, "nucleus of rollouts")
    top_k: int = _field(-1, "sample among the k likeliest tokens; -1 is all")
    stop_tokens: tuple[str, ...] = _field(
        (), "tokens that end a response; they stop generation and count as one action in the loss"
    )


@dataclass(frozen=True)
class CurriculumConfig:
    """The cap on response length over training. What each kind does, and why, is told in ``curriculum.py``."""

    kind: Literal["schedule", "ladder", "progressive", "entropy_gated"] = _field(
        "schedule",
        "schedule: horizon_tokens as given; ladder: one rung every stage_steps; progressive: growth_tokens more every "
        "stage_steps; entropy_gated: one rung every stage_steps if the held-out entropy allows it",
    )
    horizon_tokens: Schedule = _field(constant(128), "schedule: cap on a response's length, as a schedule over steps")
    ladder_tokens: tuple[int, ...] = _field(
        (128, 256, 512, 1024, 2048, 4096), "ladder, entropy_gated: the horizons, in rising order"
    )
    start_tokens: int = _field(128, "progressive: horizon of the first stage")
    growth_tokens: int = _field(128, "progressive: how much longer each stage's horizon is than the one before")
    end_tokens: int = _field(4096, "progressive: where the horizon stops growing")
    stage_steps: int = _field(100, "all but schedule: optimizer steps of one stage; a gate is tested at its end")
    min_entropy_nats: float = _field(
        0.1,
        "entropy_gated: held-out entropy that the next rung requires. Under reverse KL it collapses to about 0.05 and a "
        "healthy mix holds about 0.28",
    )
    min_entropy_frac: float = _field(
        0.5,
        "entropy_gated: share of the highest entropy at any stage's end so far that the next rung requires; 0 is off",
    )
    max_truncated_frac: float = _field(
        0.5,
        "entropy_gated: share of held-out responses cut at evaluation.max_response_tokens above which no rung is "
        "climbed; 1 is off",
    )
    max_repetition_frac: float = _field(
        0.1, "entropy_gated: share of held-out responses that end in a loop above which no rung is climbed; 1 is off"
    )
    on_failure: Literal["freeze", "freeze_here", "retry"] = _field(
        "freeze",
        "entropy_gated, when a gate fails: freeze: keep the last stable horizon (the longest whose stage passed, or the "
        "first) for the rest of the run; freeze_here: keep the present horizon for the rest of the run; retry: train "
        "another stage at the present horizon and test again",
    )

    def fastest_schedule(self, num_steps: int) -> Schedule:
        """The horizon at each of ``num_steps`` steps; for ``entropy_gated`` if every gate passes, which none exceeds."""
        if self.kind == "schedule":
            return self.horizon_tokens
        num_stages = -(-num_steps // self.stage_steps)
        if self.kind == "progressive":
            grown = range(self.start_tokens, self.end_tokens, self.growth_tokens)
            rungs: tuple[int, ...] = (*grown[:num_stages], self.end_tokens)
        else:
            rungs = self.ladder_tokens
        return piecewise({stage * self.stage_steps: rung for stage, rung in enumerate(rungs[:num_stages])})


@dataclass(frozen=True)
class DistillConfig:
    """The distillation component of the loss: weight * (w KL(student||teacher) + (1 - w) KL(teacher||student))."""

    weight: float = _field(1.0, "weight of the distillation component in the loss")
    reverse_kl_weight: Schedule = _field(
        constant(0.2), "w in [0, 1]: weight of reverse KL, KL(student||teacher); 1 - w weighs forward KL"
    )
    temperature: float = _field(1.0, "divides both models' logits in the loss; not 1 needs the in_process teacher")


@dataclass(frozen=True)
class SftConfig:
    """The cross-entropy component: -log q(token), on responses that the student did not write (hard targets)."""

    weight: float = _field(0.0, "weight of the cross-entropy component in the loss")


@dataclass(frozen=True)
class RlConfig:
    """The policy-gradient component, on responses that the student wrote, with rewards by math-verify."""

    weight: float = _field(0.0, "weight of the policy-gradient component in the loss; 0 is no RL, and no rewards")
    advantage_scale: Literal["group_std", "none"] = _field(
        "group_std", "group_std: (reward - mean) / std of the prompt's group (GRPO); none: reward - mean (Dr. GRPO)"
    )
    normalisation: Literal["token", "sequence"] = _field(
        "token", "token: mean over all tokens of the step (DAPO); sequence: mean over responses of their means (GRPO)"
    )
    drop_zero_signal: bool = _field(
        True, "leave groups whose rewards are all equal out of the denominator, since they carry no gradient (DAPO)"
    )
    clip_low: float = _field(0.2, "how far the probability ratio may fall below 1 before its gain stops counting")
    clip_high: float = _field(0.28, "how far it may rise above 1; larger than clip_low is DAPO's clip-higher")
    max_importance_weight: float = _field(
        2.0, "cap on the weight that corrects for the gap between SGLang's and Megatron's log-probs"
    )
    reference_kl_coef: float = _field(
        0.0, "weight of the k3 estimate of KL(student||reference); the reference is the student as the run began"
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """Megatron's Adam."""

    lr: float = _field(5e-7, "learning rate after warm-up")
    warmup_frac: float = _field(0.05, "share of the steps over which the rate rises from 0; constant afterwards")
    weight_decay: float = _field(0.0, "decoupled weight decay")
    adam_beta1: float = _field(0.9, "decay of the gradient's mean")
    adam_beta2: float = _field(0.95, "decay of the gradient's square")
    clip_grad: float = _field(1.0, "largest global gradient norm; 0 is no clipping")


@dataclass(frozen=True)
class EvalConfig:
    """Accuracy on the held-out problems, judged by math-verify."""

    num_problems: int = _field(100, "held-out problems evaluated, from the first on")
    samples_per_problem: int = _field(4, "k of Avg@k and Pass@k")
    temperature: float = _field(0.6, "sampling temperature")
    top_p: float = _field(0.95, "nucleus")
    top_k: int = _field(20, "sample among the k likeliest tokens; -1 is all")
    max_response_tokens: int = _field(256, "cap on a response's length")
    every_steps: int = _field(0, "evaluate every so many steps, besides the start and the end; 0 is never")
    entropy_problems: int = _field(32, "held-out problems over whose responses the student's entropy is measured")


@dataclass(frozen=True)
class ServersConfig:
    """The SGLang servers beside the trainer."""

    student_replicas: int = _field(1, "student servers; rollouts go to the least loaded")
    teacher_replicas: int = _field(1, "teacher servers")
    student_tp: int = _field(1, "tensor-parallel size of each student server")
    teacher_tp: int = _field(1, "tensor-parallel size of each teacher server")
    weight_sync: Literal["disk", "broadcast"] = _field(
        "disk",
        "how new weights reach the student's servers; disk: a directory that they can read; broadcast: a process group of "
        "rank 0 and the servers, gloo on CPU and NCCL on GPUs",
    )
    sync_bucket_mib: int = _field(256, "broadcast: size of one message; rank 0 holds one at a time")
    startup_timeout_s: float = _field(600.0, "longest wait for a server's health")
    request_timeout_s: float = _field(600.0, "longest wait for one reply")
    requests_per_replica: int = _field(64, "requests in flight to one replica")


@dataclass(frozen=True)
class RunConfig:
    """One run: who learns from whom, on what, how, for how long."""

    name: str = _field("run", "names the run folder: runs/NAME")
    seed: int = _field(1, "of prompts' order, sampling and Megatron")
    num_steps: int = _field(100, "optimizer steps")
    micro_batch_rollouts: int = _field(8, "rollouts in one forward and backward pass of one replica; changes no result")
    save_every_steps: int = _field(0, "Megatron checkpoint every so many steps, besides the end; 0 is the end only")
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    servers: ServersConfig = field(default_factory=ServersConfig)

    @property
    def rollouts_per_step(self) -> int:
        """Responses in one optimizer step, over all dp replicas (Megatron's global batch size)."""
        return self.rollouts.prompts_per_step * self.rollouts.rollouts_per_prompt

    @property
    def num_ranks(self) -> int:
        """Trainer processes."""
        return self.student.tp * self.student.pp * self.student.dp

    @property
    def max_horizon_tokens(self) -> int:
        """The longest response that training can ask for."""
        return int(max(self.curriculum.fastest_schedule(self.num_steps).values))

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt and response together, in training or evaluation."""
        return self.data.max_prompt_tokens + max(self.max_horizon_tokens, self.evaluation.max_response_tokens)

    @property
    def uses_student_prefixes(self) -> bool:
        """Whether any step samples from the student."""
        return max(self.rollouts.student_prefix_frac.values) > 0

    @property
    def teacher_writes(self) -> bool:
        """Whether any step samples from the teacher."""
        off_policy = min(self.rollouts.student_prefix_frac.values) < 1
        return off_policy and self.rollouts.off_policy_source == "teacher"

    @property
    def needs_teacher(self) -> bool:
        """Whether the run needs a teacher at all: RL and SFT alone do not."""
        return self.distill.weight > 0 or self.teacher_writes

    @property
    def needs_teacher_server(self) -> bool:
        """Whether a teacher server scores responses or writes prefixes."""
        return self.teacher_writes or (self.distill.weight > 0 and self.teacher.transport == "sglang_topk")


# --- rules ------------------------------------------------------------------------------------------------------------


def problems_of(config: RunConfig) -> list[str]:
    """Every rule that ``config`` breaks, as ``where = value: rule. Remedy.`` lines; empty if it is sound.

    Looks at values only: what needs the files (vocabularies, shapes) is checked by ``preflight``.
    """
    problems: list[str] = []

    def rule(holds: bool, where: str, text: str) -> None:
        if not holds:
            value: Any = config
            for part in where.split("."):
                value = getattr(value, part)
            shown = value.to_json() if isinstance(value, Schedule) else value
            problems.append(f"{where} = {shown!r}: {text}")

    for where, spec, value in walk(config):
        name = spec.name
        if isinstance(value, int | float) and not isinstance(value, bool):
            if name.endswith("_frac"):
                rule(0 <= value <= 1, where, "a share must lie in [0, 1].")
            elif name in ("tp", "pp", "dp", "student_tp", "teacher_tp", "num_steps") or name.endswith(
                ("_replicas", "_per_step", "_per_prompt", "_per_replica", "sync_every_steps")
            ):
                rule(value >= 1, where, "must be at least 1.")
            elif name.startswith(("num_", "max_")) or name.endswith(
                ("_tokens", "_mib", "_problems", "_per_problem", "_s")
            ):
                rule(value > 0, where, "must be positive.")
    for name in ("student", "teacher") if config.needs_teacher else ("student",):
        rule(bool(getattr(config, name).path), f"{name}.path", "must name a Hugging Face directory.")
    rule(
        bool(config.data.train_path),
        "data.train_path",
        "must name a .jsonl or .parquet file, or a saved data set's directory.",
    )
    rule(
        bool(config.data.heldout_path),
        "data.heldout_path",
        "must name a .jsonl or .parquet file, or a saved data set's directory.",
    )
    shares = config.rollouts.student_prefix_frac.values
    rule(all(0 <= v <= 1 for v in shares), "rollouts.student_prefix_frac", "a share must lie in [0, 1].")
    weights = config.distill.reverse_kl_weight.values
    rule(
        all(0 <= v <= 1 for v in weights),
        "distill.reverse_kl_weight",
        "must lie in [0, 1]: it weighs reverse KL, and forward KL gets the rest.",
    )
    _curriculum_rules(config, rule)
    _component_rules(config, rule)
    rule(config.optimizer.lr > 0, "optimizer.lr", "must be positive.")
    for where in ("rollouts.temperature", "distill.temperature"):
        section, name = where.split(".")
        rule(getattr(getattr(config, section), name) > 0, where, "must be positive.")
    rule(config.evaluation.temperature >= 0, "evaluation.temperature", "must not be negative (0 is greedy).")
    for section in ("rollouts", "evaluation"):
        rule(0 < getattr(config, section).top_p <= 1, f"{section}.top_p", "must lie in (0, 1].")
        top_k = getattr(config, section).top_k
        rule(top_k == -1 or top_k >= 1, f"{section}.top_k", "must be at least 1, or -1 for all tokens.")
    rule(config.teacher.top_k >= 1, "teacher.top_k", "must be at least 1.")
    rule(
        config.teacher.transport == "in_process" or config.distill.temperature == 1,
        "distill.temperature",
        "a tail bucket cannot be re-tempered, so a server's top-k scores hold at temperature 1 only. "
        "Set it to 1, or set teacher.transport=in_process.",
    )
    rule(
        config.teacher.transport == "sglang_topk" or config.student.pp == 1,
        "student.pp",
        "the in-process teacher runs without a pipeline. Set student.pp=1, or teacher.transport=sglang_topk.",
    )
    share = config.student.dp * config.micro_batch_rollouts
    rule(
        config.rollouts_per_step % share == 0,
        "micro_batch_rollouts",
        f"rollouts.prompts_per_step * rollouts.rollouts_per_prompt = {config.rollouts_per_step} must be a multiple of "
        f"student.dp * micro_batch_rollouts = {share}, so that every replica gets the same number of micro-batches.",
    )
    rule(
        config.rollouts.prompts_per_step % config.student.dp == 0,
        "rollouts.prompts_per_step",
        f"must be a multiple of student.dp = {config.student.dp}, so that a prompt's rollouts stay together.",
    )
    return problems


def _component_rules(config: RunConfig, rule: Callable[[bool, str, str], None]) -> None:
    """The rules of the loss's components, alone and together."""
    weights = {f"{name}.weight": getattr(config, name).weight for name in ("distill", "sft", "rl")}
    for where, weight in weights.items():
        rule(weight >= 0, where, "must not be negative.")
    rule(any(weights.values()), "distill.weight", "distill, sft and rl all have weight 0, and nothing would be learnt.")
    shares = config.rollouts.student_prefix_frac.values
    rule(
        not config.sft.weight or min(shares) < 1,
        "sft.weight",
        "cross entropy is computed on responses that the student did not write, and it writes all of them. Set "
        "rollouts.student_prefix_frac below 1, or sft.weight=0.",
    )
    rl = config.rl
    rule(
        not rl.weight or max(shares) > 0,
        "rl.weight",
        "the policy gradient holds for responses of the student only: on other tokens a log-ratio gradient is not the "
        "gradient of any objective here. Set rollouts.student_prefix_frac above 0, or rl.weight=0.",
    )
    rule(
        not rl.weight or config.rollouts.rollouts_per_prompt >= 2,
        "rollouts.rollouts_per_prompt",
        "an advantage is relative to the prompt's other responses. Set it to 2 or more (8 is usual), or rl.weight=0.",
    )
    rule(
        not rl.weight or config.rollouts.temperature == 1,
        "rollouts.temperature",
        "the policy gradient needs log-probs of the policy that sampled, and the loss takes them at temperature 1. "
        "Set it to 1, or rl.weight=0.",
    )
    rule(0 <= rl.clip_low < 1, "rl.clip_low", "must lie in [0, 1).")
    rule(rl.clip_high >= 0, "rl.clip_high", "must not be negative.")
    rule(rl.max_importance_weight > 0, "rl.max_importance_weight", "must be positive.")
    rule(rl.reference_kl_coef >= 0, "rl.reference_kl_coef", "must not be negative.")
    rule(
        not rl.reference_kl_coef or config.student.pp == 1,
        "rl.reference_kl_coef",
        "the reference model runs beside the student without a pipeline. Set student.pp=1, or the coefficient to 0.",
    )


def _curriculum_rules(config: RunConfig, rule: Callable[[bool, str, str], None]) -> None:
    """The rules of the curriculum; the fields of the kinds that are not chosen are held to them as well."""
    curriculum = config.curriculum
    rule(all(v >= 1 for v in curriculum.horizon_tokens.values), "curriculum.horizon_tokens", "must be positive.")
    rungs = curriculum.ladder_tokens
    rule(
        bool(rungs) and rungs[0] >= 1 and all(a < b for a, b in itertools.pairwise(rungs)),
        "curriculum.ladder_tokens",
        "must hold at least one horizon, positive and rising, e.g. [128, 256, 512].",
    )
    rule(curriculum.stage_steps >= 1, "curriculum.stage_steps", "must be at least 1.")
    rule(
        curriculum.start_tokens <= curriculum.end_tokens,
        "curriculum.start_tokens",
        f"must not exceed curriculum.end_tokens = {curriculum.end_tokens}: the horizon grows from one to the other.",
    )
    rule(curriculum.min_entropy_nats >= 0, "curriculum.min_entropy_nats", "must not be negative (0 is off).")
    if curriculum.kind == "entropy_gated" and rungs and min(curriculum.stage_steps, config.num_steps) >= 1:
        longest = config.max_horizon_tokens
        rule(
            curriculum.max_truncated_frac == 1 or config.evaluation.max_response_tokens >= longest,
            "evaluation.max_response_tokens",
            f"must be at least the longest horizon of training, {longest} tokens. A shorter cap truncates healthy responses, "
            "and curriculum.max_truncated_frac would hold the curriculum back for it. Raise it, or set "
            "curriculum.max_truncated_frac=1.",
        )


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    """Yield ``(dotted name, field, value)`` of every leaf of a config tree, in reading order."""
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Schedule):
            yield from walk(value, f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", spec, value


# --- loading and saving -----------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain JSON values; ``from_dict`` is the inverse."""
    plain: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if isinstance(value, Schedule):
            plain[spec.name] = value.to_json()
        elif dataclasses.is_dataclass(value):
            plain[spec.name] = to_dict(value)
        else:
            plain[spec.name] = list(value) if isinstance(value, tuple) else value
    return plain


def from_dict(data: Mapping[str, Any], check_rules: bool = True) -> RunConfig:
    """Build and validate a ``RunConfig`` from plain values.

    Args:
        data: as ``to_dict`` gives it; what is left out takes its default.
        check_rules: also hold the values to ``problems_of``; without, only keys and types are checked.

    Raises:
        ConfigError: listing every unknown key, every wrong type and every broken rule at once.
    """
    problems: list[str] = []
    config = _build(RunConfig, data, "", problems)
    if check_rules and not problems:
        problems = problems_of(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def with_overrides(config: RunConfig, overrides: Sequence[str], check_rules: bool = True) -> RunConfig:
    """Apply ``section.field=value`` overrides (values are JSON, or else strings) and validate the result.

    Raises:
        ConfigError: for a malformed or unknown override, or a rule broken by the outcome.
    """
    data = to_dict(config)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override = {override!r}: must read section.field=value, e.g. num_steps=10.")
        *sections, leaf = key.split(".")
        node = data
        for section in sections:
            # An unknown section becomes an unknown key, which from_dict reports with a suggestion.
            child = node.setdefault(section, {})
            node = child if isinstance(child, dict) else node.setdefault(f"{section}.{leaf}", {})
        try:
            node[leaf] = json.loads(text)
        except json.JSONDecodeError:
            node[leaf] = text
    return from_dict(data, check_rules)


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved config as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load(path: Path) -> RunConfig:
    """Read what ``save`` wrote.

    Raises:
        ConfigError: if the file is missing, is no JSON, or does not hold a sound config.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"config = {path}: no such file. Name a run folder of `megatron-distill train`.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"config = {path}: not JSON ({error}). Start the run again to rewrite it.") from error
    return from_dict(data)


def field_help(prefix: str = "") -> str:
    """Every field whose name starts with ``prefix``, with its type, default and meaning, for ``--help`` and the docs."""
    lines = []
    for where, spec, value in walk(RunConfig()):
        if not where.startswith(prefix):
            continue
        default = value.to_json() if isinstance(value, Schedule) else value
        kind = spec.type if isinstance(spec.type, str) else getattr(spec.type, "__name__", str(spec.type))
        kind = "|".join(typing.get_args(spec.type)) if typing.get_origin(spec.type) is Literal else kind
        lines.append(f"  {where}  ({kind}, default {json.dumps(default)})\n      {spec.metadata['help']}")
    return "\n".join(lines)


def _build(cls: type, data: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(data, Mapping):
        problems.append(f"{where.rstrip('.')} = {data!r}: must be a section with fields of its own.")
        return cls()
    specs = {spec.name: spec for spec in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in specs:
            close = difflib.get_close_matches(key, specs, n=1)
            hint = f"Did you mean {where}{close[0]}?" if close else f"Known: {', '.join(specs)}."
            problems.append(f"{where}{key} = {value!r}: unknown key. {hint}")
        elif dataclasses.is_dataclass(specs[key].type) and specs[key].type is not Schedule:
            values[key] = _build(typing.cast(type, specs[key].type), value, f"{where}{key}.", problems)
        else:
            values[key] = _coerce(specs[key].type, value, f"{where}{key}", problems)
    return cls(**values)


def _coerce(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """``value`` as the field's type, or a line in ``problems``."""
    origin = typing.get_origin(kind)
    if kind is Schedule:
        try:
            return Schedule.from_json(value)
        except ValueError as error:
            problems.append(f"{where} = {value!r}: {error}.")
            return constant(0)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            problems.append(f"{where} = {value!r}: must be one of {', '.join(map(repr, choices))}.")
        return value
    if origin is types.UnionType:
        kinds = typing.get_args(kind)
        return None if value is None and type(None) in kinds else _coerce(kinds[0], value, where, problems)
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_coerce(typing.get_args(kind)[0], item, where, problems) for item in value)
        problems.append(f'{where} = {value!r}: must be a list, e.g. ["a", "b"].')
        return ()
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        problems.append(f"{where} = {value!r}: must be of type {kind.__name__}, not {type(value).__name__}.")
    return value
