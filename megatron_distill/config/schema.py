"""The fields of a run's config, section by section, each with its default and its help text.

In: nothing. Out: ``RunConfig`` and its sections, plain frozen values; what is derived from them is a property.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_distill.config.checkpoints import CheckpointConfig
from megatron_distill.config.curricula import CurriculumConfig, FixedHorizon
from megatron_distill.config.data import DataConfig
from megatron_distill.config.fields import function, plain
from megatron_distill.config.objective import REWARDS, DistillConfig, RlConfig, SftConfig
from megatron_distill.config.schedules import Schedule, constant
from megatron_distill.config.servers import ServersConfig

SERVER_RESERVED_TOKENS = 8  # places of a server's context that SGLang keeps for itself (7), and one to spare
SERVING_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # ``StudentConfig.dtype`` as SGLang spells it


@dataclass(frozen=True)
class ParallelConfig:
    """How the student lies on the trainer's ranks: tp * pp * cp * dp of them."""

    tp: int = plain(1, "tensor-parallel size: ranks that share each layer and the vocabulary", "[1, 65536]")
    pp: int = plain(1, "pipeline-parallel size: ranks that share the layers", "[1, 65536]")
    vpp: int = plain(1, "virtual pipeline stages a rank: more of them idle less and talk more", "[1, 65536]")
    dp: int = plain(1, "data-parallel size: replicas that share a step's rollouts", "[1, 65536]")
    cp: int = plain(1, "context-parallel size: ranks that share each sequence", "[1, 65536]")
    ep: int = plain(
        1,
        "expert-parallel size: ranks, among those of tp, cp and dp, that share the experts of each layer",
        "[1, 65536]",
    )
    etp: int | None = plain(None, "tensor-parallel size inside an expert; null is tp's", "[1, 65536]")
    sequence_parallel: bool = plain(False, "shard activations over tp between layers")

    @property
    def num_ranks(self) -> int:
        """Trainer processes."""
        return self.tp * self.pp * self.cp * self.dp


@dataclass(frozen=True)
class StudentConfig:
    """The model that is trained, by Megatron, and served for rollouts, by SGLang."""

    path: str = plain(
        "", "Hugging Face directory of the student (config, safetensors, tokenizer), or its hub id once fetched"
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: Literal["fp32", "bf16"] = plain("fp32", "parameters and activations in training")
    distributed_optimizer: bool = plain(False, "shard optimizer state over dp x cp")
    recompute: Literal["none", "selective", "full"] = plain(
        "none",
        "activations that the backward pass computes again instead of keeping them; selective: inside attention, which flash "
        "kernels do by themselves; full: of whole layers",
    )
    layer_spec: Literal["auto", "transformer_engine", "local"] = plain(
        "auto",
        "whose layers the trainer runs; auto: Transformer Engine's for bf16 on a GPU, else Megatron's own (local), whose "
        "attention takes a mask that grows with the square of a row",
    )
    megatron_args: tuple[str, ...] = plain(
        (),
        "more flags of megatron.training, as --name=value or --name, after the run's own, so that they win; those that the "
        "config decides are refused",
    )


@dataclass(frozen=True)
class TeacherConfig:
    """The model that is imitated, and how its distribution reaches the loss."""

    path: str = plain("", "Hugging Face directory or hub id of the teacher; its tokenizer must equal the student's")
    transport: str = function(
        "sglang_topk",
        ("sglang_topk", "sglang_hidden", "sglang_urls", "in_process"),
        "sglang_topk: a server sends its top-k log-probs and the tail is one bucket; "
        "sglang_hidden: a server sends its last hidden states, and the trainer holds its output layer: full vocabulary, exact; "
        "sglang_urls: top-k log-probs by servers that run already, see teacher.urls; "
        "in_process: Megatron holds the teacher beside the student, full vocabulary, sharded alike, or over more ranks; "
        "path/to/file.py:function: whatever the function makes of a TeacherContext",
    )
    in_process_tp: int | None = plain(
        None,
        "in_process: tensor-parallel size of the teacher; null is the student's. A multiple of that lays each layer on the "
        "ranks of so many neighbouring replicas, which then pass each other's micro-batches through it",
        "[1, 65536]",
    )
    num_logprobs: int = plain(
        64, "log-probs a token from the server (sglang_topk), at most the vocabulary size", "[1, 1e9]"
    )
    tail: Literal["bucket", "renormalised", "dropped"] = plain(
        "bucket", "what becomes of the mass outside the top-k; bucket is the only unbiased-in-sign choice"
    )
    urls: dict[str, Any] = plain(
        {},
        'sglang_urls: running SGLang servers by name, e.g. {"math": "http://node7:30000", "code": "http://node8:30000"}; '
        "teacher.path is then a directory with their tokenizer and config.json",
    )
    column: str = plain(
        "", "sglang_urls: column of the training data that names the server, among teacher.urls, which scores a problem"
    )
    key_variable: str = plain(
        "", "sglang_urls: environment variable that holds the servers' API key, which is itself written nowhere"
    )
    prompt_builder: str = function(
        "same",
        ("same",),
        "what the teacher sees of a problem before the student's response; same: the student's prompt; or "
        "path/to/file.py:function as data.prompt_builder, e.g. with a worked solution for self-distillation",
    )
    max_prompt_tokens: int | None = plain(
        None, "longest prompt that teacher.prompt_builder makes; null is data.max_prompt_tokens", "[1, 1e9]"
    )
    max_missing_frac: float = plain(
        0.1, "share of a step's rollouts that may lack teacher scores; more is an error", "[0, 1]"
    )
    cache_dir: str = plain(
        "", "directory in which the server's scores and responses are kept, for later epochs and runs; empty keeps none"
    )

    @property
    def in_trainer(self) -> bool:
        """Whether the teacher is a Megatron model beside the student, so that no signal travels."""
        return self.transport == "in_process"

    @property
    def sends_hidden_states(self) -> bool:
        """Whether a server sends hidden states, and the trainer holds the teacher's output layer."""
        return self.transport == "sglang_hidden"

    @property
    def has_full_vocabulary(self) -> bool:
        """Whether the loss has the teacher's whole distribution, and not its likeliest tokens alone."""
        return self.in_trainer or self.sends_hidden_states

    @property
    def runs_elsewhere(self) -> bool:
        """Whether responses are scored by servers that the run does not start."""
        return self.transport == "sglang_urls"


@dataclass(frozen=True)
class RolloutConfig:
    """Who writes the prefix, and how it is sampled."""

    student_prefix_frac: Schedule = plain(
        constant(1.0),
        "share of a step's prompts whose response the student writes; the teacher writes the others",
        "[0, 1]",
    )
    prompts_per_step: int = plain(32, "prompts in one optimizer step, over all dp replicas", "[1, 1e9]")
    rollouts_per_prompt: int = plain(1, "responses to each prompt: the group of group-relative RL", "[1, 1e9]")
    off_policy_source: Literal["teacher", "data"] = plain(
        "teacher", "who writes what the student does not: the teacher's server, or the data's own solutions"
    )
    sync_every_steps: int = plain(
        1,
        "optimizer steps between weight syncs to the student's servers; above 1 rollouts are stale, and say so, and a resume, "
        "which syncs first, draws fresher ones than a run that was not interrupted",
        "[1, 1e9]",
    )
    max_staleness_steps: int = plain(
        0,
        "0: a step's rollouts are drawn by its own weights, before it trains; 1: they are drawn while the step before it "
        "trains, by weights one step old; k >= 2: they are drawn while the k steps before it train, and weights change under "
        "responses that are being written: faster, and no longer a function of the seed",
        "[0, 1000]",
    )
    temperature: float = plain(1.0, "sampling temperature of rollouts", "(0, inf)")
    top_p: float = plain(1.0, "nucleus of rollouts", "(0, 1]")
    top_k: int = plain(-1, "sample among the k likeliest tokens; -1 is all", "[-1, 1e9]")
    source: str = function(
        "streamed",
        ("streamed",),
        "where samples come from; streamed: prompts of data.train_path, each response scored and judged as it ends; or "
        "path/to/file.py:function, of a SourceContext",
    )
    environment: str = function(
        "single_turn",
        ("single_turn",),
        "how a response comes about; single_turn: the model answers once; or path/to/file.py:function, which may call "
        "tools between turns",
    )
    stop_tokens: tuple[str, ...] = plain(
        (),
        "tokens that end a response; they stop generation and count as one action in the loss; by default all that end either "
        "model's. Those that end the student's by its files (eos_token_id) must be among them",
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """Megatron's Adam."""

    lr: float = plain(5e-7, "learning rate after warm-up", "(0, inf)")
    warmup_frac: float = plain(0.05, "share of the steps over which the rate rises from 0", "[0, 1]")
    lr_decay: Literal["constant", "linear", "cosine"] = plain(
        "constant", "how the rate goes on after warm-up; linear, cosine: down to 0 at num_steps"
    )
    weight_decay: float = plain(0.0, "decoupled weight decay", "[0, inf)")
    adam_beta1: float = plain(0.9, "decay of the gradient's mean", "[0, 1)")
    adam_beta2: float = plain(0.95, "decay of the gradient's square", "[0, 1)")
    clip_grad: float = plain(1.0, "largest global gradient norm; 0 is no clipping", "[0, inf)")


@dataclass(frozen=True)
class EvalConfig:
    """Accuracy on the held-out problems."""

    reward: str = function("math", REWARDS, "judges responses; above 0.5 counts as right: a name as in rl.reward")
    num_problems: int = plain(100, "held-out problems evaluated, from the first on", "[1, 1e9]")
    samples_per_problem: int = plain(4, "k of Avg@k and Pass@k", "[1, 1e9]")
    temperature: float = plain(0.6, "sampling temperature", "[0, inf)")
    top_p: float = plain(0.95, "nucleus", "(0, 1]")
    top_k: int = plain(20, "sample among the k likeliest tokens; -1 is all", "[-1, 1e9]")
    max_response_tokens: int = plain(256, "cap on a response's length", "[1, 1e9]")
    sets: tuple[str, ...] = function(
        (),
        ("aime24", "aime25", "amc23", "math500", "gsm8k"),
        "further sets to evaluate on: aime24, aime25, amc23, math500, gsm8k (from the hub, once fetched), or "
        "path/to/file.py:function, of the RunConfig",
    )
    every_steps: int = plain(0, "evaluate every so many steps, besides the start and the end; 0 is never", "[0, 1e9]")
    entropy_problems: int = plain(
        32, "held-out problems over whose responses the student's entropy is measured", "[1, 1e9]"
    )


@dataclass(frozen=True)
class RunConfig:
    """One run: who learns from whom, on what, how, for how long."""

    name: str = plain("run", "names the run folder: runs/NAME")
    seed: int = plain(1, "of the prompts' order, of sampling and of Megatron", "[1, 2147483647]")
    num_steps: int = plain(100, "optimizer steps", "[1, 1e9]")
    micro_batch_rollouts: int = plain(
        8, "rollouts in one forward and backward pass of one replica; changes no result", "[1, 1e9]"
    )
    micro_batch_tokens: int = plain(
        0,
        "the most tokens of prompts and responses in one pass, instead of a number of rollouts: a step then has as few passes "
        "as its tokens fill, dealt evenly, the same number on every replica; a longer rollout has a pass to itself; 0 goes by "
        "micro_batch_rollouts; changes no result",
        "[0, 1e9]",
    )
    head_chunk_tokens: int = plain(
        0,
        "response tokens whose logits exist at a time: a micro-batch's loss and its gradient are computed "
        "chunk by chunk; 0 is as many as fill 64 MiB on a CPU and 512 MiB on a GPU in fp32; changes no result",
        "[0, 1e9]",
    )
    cpu_threads: int = plain(
        1,
        "OpenMP threads of each trainer rank and each CPU server of a run on one machine (elsewhere the cluster profile's env "
        "decides); 0: its share of the cores, which doctor tells; more than 1 is for large models on idle cores, and the last "
        "digits of results depend on the number",
        "[0, 1024]",
    )
    components: tuple[str, ...] = function(
        (), (), "further terms of the loss beside distill, sft and rl, each path/to/file.py:function, of the RunConfig"
    )
    on_damaged_checkpoint: Literal["stop", "use_previous"] = plain(
        "stop",
        "what a start does that finds its last checkpoint damaged; stop: say which file, and end; use_previous: put it aside "
        "and go on from the one before it",
    )
    trackers: tuple[str, ...] = function(
        (),
        ("tensorboard", "wandb", "mlflow", "trackio"),
        "where the run can be followed besides the console and the report: tensorboard, wandb, mlflow, trackio, or "
        "path/to/file.py:function; see docs/trackers.md",
    )
    save_every_steps: int = plain(
        0, "Megatron checkpoint every so many steps, besides the end; 0 is the end only", "[0, 1e9]"
    )
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    curriculum: CurriculumConfig = field(default_factory=FixedHorizon)
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
        return self.student.parallel.num_ranks

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps over which the learning rate rises: fewer than all, which Megatron asserts."""
        return min(math.ceil(self.optimizer.warmup_frac * self.num_steps), self.num_steps - 1)

    def is_saved_at(self, step: int) -> bool:
        """Whether Megatron writes a checkpoint once ``step`` optimizer steps are done."""
        every = self.save_every_steps or self.num_steps
        return step > 0 and (step % every == 0 or step == self.num_steps)

    @property
    def max_horizon_tokens(self) -> int:
        """The longest response that training can ask for."""
        return int(max(self.curriculum.fastest_schedule(self.num_steps).values))

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt and response together, in training or evaluation."""
        return self.data.max_prompt_tokens + max(self.max_horizon_tokens, self.evaluation.max_response_tokens)

    @property
    def server_context_tokens(self) -> int:
        """Tokens that a server must hold: the longest sequence, and the places that SGLang keeps for itself."""
        more = max((self.teacher.max_prompt_tokens or 0) - self.data.max_prompt_tokens, 0)
        return self.max_sequence_tokens + more + SERVER_RESERVED_TOKENS

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
    def in_process_tp(self) -> int:
        """Ranks that share each layer of a teacher in the trainer."""
        return self.teacher.in_process_tp or self.student.parallel.tp

    @property
    def writes_solutions(self) -> bool:
        """Whether any step takes the data's own solutions for responses."""
        return min(self.rollouts.student_prefix_frac.values) < 1 and self.rollouts.off_policy_source == "data"

    @property
    def needs_teacher(self) -> bool:
        """Whether the run needs a teacher at all: RL and SFT alone do not."""
        return self.distill.weight > 0 or self.teacher_writes

    @property
    def needs_teacher_server(self) -> bool:
        """Whether a teacher server scores responses or writes prefixes."""
        asks = self.distill.weight > 0 and not self.teacher.in_trainer and not self.teacher.runs_elsewhere
        return self.teacher_writes or (asks and self.servers.teacher_replicas > 0)


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    """Yield ``(dotted name, field, value)`` of every leaf of a config tree, in reading order."""
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Schedule):
            yield from walk(value, f"{prefix}{spec.name}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for number, one in enumerate(value):
                yield from walk(one, f"{prefix}{spec.name}[{number}].")
        else:
            yield f"{prefix}{spec.name}", spec, value


def all_fields() -> dict[str, tuple["dataclasses.Field[Any]", Any]]:
    """``{dotted name: (field, default)}`` of every field that a config may have, whatever kind its curriculum is of."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for where, spec, value in walk(RunConfig()):
        found[where] = spec, value
        if where == "curriculum.horizon_tokens":
            for kind in typing.get_args(CurriculumConfig):
                found |= {
                    name: (one, default) for name, one, default in walk(kind(), "curriculum.") if name not in found
                }
    return found
