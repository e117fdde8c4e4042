"""What a run takes of memory and wires, from shapes alone: the arithmetic behind ``plan``.

In: a recipe's config and the models' architectures. Out: ``Part``s, each a number of bytes and the rule it came from.

Parameter counts are exact; weights, gradients and optimizer states were checked against Megatron on CPU. Activations and
logits were not measured on a GPU; they are upper bounds, at the longest prompt and response. Imports neither torch, Megatron
nor SGLang.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_distill.config import ParallelConfig, RunConfig
from megatron_distill.models.families import Rule, tensor_rules
from megatron_distill.models.hf_config import VOCAB_DIVISOR, HfConfig, padded_vocab_size
from megatron_distill.models.pipeline import stage_layers

GIB = 1 << 30
SERVER_SHARE = 0.85  # of a GPU's memory that SGLang plans with
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
CHUNK_LOGIT_BYTES = 512 << 20  # of one model, in fp32, on a GPU: what ``head_chunk_tokens=0`` stands for
OPTIMIZER_BYTES = {"fp32": 8, "bf16": 12}  # a parameter: two fp32 moments; under bf16 an fp32 master copy as well


@dataclass(frozen=True)
class Part:
    """One line of a memory account.

    Attributes:
        name: what takes the memory.
        num_bytes: on the fullest GPU.
        rule: the arithmetic in words.
    """

    name: str
    num_bytes: float
    rule: str


# --- parameters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counts:
    """Parameters that tensor parallelism splits, those that every rank holds whole, and those of experts."""

    split: int = 0
    whole: int = 0
    expert: int = 0

    def __add__(self, other: "_Counts") -> "_Counts":
        return _Counts(self.split + other.split, self.whole + other.whole, self.expert + other.expert)

    def dense_of_rank(self, parallel: ParallelConfig) -> int:
        return self.split // parallel.tp + self.whole

    def experts_of_rank(self, parallel: ParallelConfig) -> int:
        return self.expert // (parallel.ep * expert_tp(parallel))


def expert_tp(parallel: ParallelConfig) -> int:
    """Ranks that share one expert."""
    return parallel.tp if parallel.etp is None else parallel.etp


def expert_copies(parallel: ParallelConfig) -> int:
    """Ranks of a stage that hold the same experts: what a distributed optimizer shards their states over."""
    return parallel.tp * parallel.cp * parallel.dp // (parallel.ep * expert_tp(parallel))


@functools.lru_cache(maxsize=32)
def _counts(model: HfConfig) -> tuple[_Counts, _Counts, _Counts]:
    """Of one layer; of what is neither layer nor vocabulary; and of one vocabulary matrix, unpadded."""
    layer = other = _Counts()
    for rule in tensor_rules(replace(model, num_layers=1)):
        if rule.layout == "vocab":
            continue
        if rule.layer is None:
            other += _count(rule, model)
        else:
            layer += _count(rule, model)
    return layer, other, _Counts(split=model.vocab_size * model.hidden_size)


def _count(rule: Rule, model: HfConfig) -> _Counts:
    number = math.prod(rule.megatron_shape(model))
    if ".experts." in rule.megatron:
        return _Counts(expert=number)
    return _Counts(whole=number) if rule.tp_dim is None else _Counts(split=number)


_ALONE = ParallelConfig()


def num_parameters(model: HfConfig) -> int:
    """Parameters of a model as Hugging Face counts them: unpadded, tied matrices once."""
    layer, other, vocabulary = (sum(_held(counts, _ALONE)) for counts in _counts(model))
    return model.num_layers * layer + other + vocabulary * (1 if model.tie_word_embeddings else 2)


def _held(counts: _Counts, parallel: ParallelConfig) -> tuple[int, int]:
    return counts.dense_of_rank(parallel), counts.experts_of_rank(parallel)


def rank_layers(model: HfConfig, parallel: ParallelConfig) -> int:
    """Layers on the pipeline rank that holds the most."""
    stages = stage_layers(model.num_layers, parallel.pp * parallel.vpp)
    return max(sum(stages[rank :: parallel.pp]) for rank in range(parallel.pp))


def rank_parameters(model: HfConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """Parameters on the fullest rank of a Megatron layout, with the padding of the vocabulary: dense ones, and experts'.

    The first stage has the embedding, the last one the output layer, which is a copy of the embedding if they are tied.
    """
    (layer, expert), (other, _), _ = (_held(counts, parallel) for counts in _counts(model))
    matrix = padded_vocab_size(model.vocab_size, VOCAB_DIVISOR, parallel.tp) // parallel.tp * model.hidden_size
    layers = rank_layers(model, parallel)
    matrices = 1 if parallel.pp > 1 or model.tie_word_embeddings else 2
    return layers * layer + matrices * matrix + other, layers * expert


# --- the trainer ------------------------------------------------------------------------------------------------------


def trainer_memory(config: RunConfig, student: HfConfig, teacher: HfConfig | None) -> Iterator[Part]:
    """What the fullest trainer GPU holds."""
    layout, parallel = config.student, config.student.parallel
    size = WEIGHT_BYTES[layout.dtype]
    dense, experts = rank_parameters(student, parallel)
    number = dense + experts
    of_experts = f", {experts:,} of them experts'" if experts else ""
    moments = OPTIMIZER_BYTES[layout.dtype]
    shards, expert_shards = (
        (parallel.dp * parallel.cp, expert_copies(parallel)) if layout.distributed_optimizer else (1, 1)
    )
    yield Part("weights", number * size, f"{number:,} parameters a rank{of_experts} x {size} B")
    yield Part("gradients", number * 4, "fp32: 4 B a parameter")
    kinds = "fp32 master copy and two moments" if layout.dtype == "bf16" else "two fp32 moments"
    over = f"over {shards} rank(s)" + (f", experts' over {expert_shards}" if experts else "")
    yield Part(
        "optimizer",
        moments * (dense / shards + experts / expert_shards),
        f"{kinds}: {moments} B a parameter, {over}",
    )
    yield _activations(config, student)
    rollouts = config.micro_batch_rollouts * config.max_horizon_tokens
    response = (micro_batch_tokens(config) if config.micro_batch_tokens else rollouts) / parallel.cp
    columns = padded_vocab_size(student.vocab_size, VOCAB_DIVISOR, parallel.tp) // parallel.tp
    chunk = min(config.head_chunk_tokens or max(CHUNK_LOGIT_BYTES // (4 * columns), 1), response)
    copies, gradient = _logit_copies(config)
    yield Part(
        "logits",
        columns * chunk * size * copies,
        f"{chunk:,.0f} response tokens at a time x {columns:,} columns a rank, {gradient}",
    )
    summed, precision = (4, "fp32") if layout.dtype == "fp32" else (4 + size, f"fp32 and {layout.dtype}")
    yield Part(
        "head",
        (2 * response * size + columns * summed) * student.hidden_size,
        f"{response:,.0f} response tokens' hidden states and their gradient; the output matrix's gradient, {precision}",
    )
    frozen_models: dict[str, HfConfig] = {}
    if teacher is not None and config.distill.weight > 0 and config.teacher.in_trainer:
        frozen_models["teacher"] = teacher
    if config.rl.reference_kl_coef > 0:
        frozen_models["reference"] = student
    beside = dict(frozen_models)
    for name, model in frozen_models.items():
        shared = config.in_process_tp if name == "teacher" else parallel.tp
        frozen = sum(rank_parameters(model, replace(parallel, vpp=1, tp=shared)))
        yield Part(f"{name} weights", frozen * size, f"{frozen:,} parameters a rank x {size} B, no gradients")
    if teacher is not None and config.distill.weight > 0 and config.teacher.sends_hidden_states:
        beside["teacher"], width = teacher, teacher.hidden_size
        yield Part(
            "teacher head", columns * width * size, f"{columns:,} rows a rank x {width:,} x {size} B, no gradients"
        )
    for name, model in beside.items():
        spread = name == "teacher" and config.teacher.in_trainer and config.in_process_tp > parallel.tp
        read_before = name in frozen_models and (parallel.pp > 1 or spread)
        rows = response * model.hidden_size * (num_micro_batches(config) if read_before else 1)
        whose = "the step's" if read_before else "all tokens'"
        yield Part(f"{name} logits", (columns * chunk + rows) * size, f"of as many tokens, and {whose} hidden states")


def _logit_copies(config: RunConfig) -> tuple[int, str]:
    """Buffers of the size of a chunk's logits while its gradient is taken, and why."""
    distill = config.distill
    num_components = sum(bool(part.weight) for part in (distill, config.sft, config.rl)) + len(config.components)
    if num_components > 1:
        return 3, "the gradient of one component, and that of the next"
    has_whole_kl = (distill.divergence, distill.estimator, distill.support) == ("kl", "distribution", "teacher")
    if distill.weight and config.teacher.has_full_vocabulary and has_whole_kl:
        return 1, "whose place their gradient takes"
    return 2, "and their gradient"


def micro_batch_tokens(config: RunConfig) -> int:
    """The most tokens that one micro-batch of a replica can hold."""
    longest = config.data.max_prompt_tokens + config.max_horizon_tokens
    return (
        max(config.micro_batch_tokens, longest) if config.micro_batch_tokens else config.micro_batch_rollouts * longest
    )


def num_micro_batches(config: RunConfig) -> int:
    """Of a replica's step, if every rollout is as long as it may be."""
    rollouts = config.rollouts_per_step // config.student.parallel.dp
    longest = config.data.max_prompt_tokens + config.max_horizon_tokens
    return math.ceil(rollouts / max(micro_batch_tokens(config) // longest, 1))


def _layer_elements(config: RunConfig, model: HfConfig) -> float:
    """What the backward pass needs of a token and layer, in elements on one rank.

    Follows Korthikanti et al. 2022 (arXiv 2205.05198), section 4, for a pre-norm gated layer with grouped queries and no
    dropout. H hidden, Q and K all query and key channels, F feed-forward:

        4 H                 inputs and outputs of the two norms (split over tp under sequence parallelism only)
        Q + 2 K             projections
        2 (Q + K) or Q + K  rotated queries and keys; and once more where queries and keys are normed
        Q                   attention's output
        3 F                 gate and up, and their product; of the chosen experts, evenly chosen, F / etp, with their inputs and
                            outputs 2 H each
        K gathered          under context parallelism without flash kernels, everybody's keys and values
    """
    layout, parallel = config.student, config.student.parallel
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_dim
    keys = model.num_query_groups * model.head_dim
    row = config.data.max_prompt_tokens + config.max_horizon_tokens
    split = queries + 2 * keys + (2 if model.qk_norm else 1) * (queries + keys) + queries
    if model.num_experts:
        split += model.experts_per_token * (3 * model.expert_ffn_hidden_size + 2 * hidden * expert_tp(parallel))
    else:
        split += 3 * model.ffn_hidden_size
    if layout.dtype == "fp32":  # no flash attention in fp32: scores and probabilities are kept
        split += 2 * keys * (parallel.cp - 1)
        split += 2 * model.num_attention_heads * row if layout.recompute == "none" else 0
    whole = 4 * hidden
    return (split + whole) / parallel.tp if parallel.sequence_parallel else split / parallel.tp + whole


def _activations(config: RunConfig, model: HfConfig) -> Part:
    """What the backward pass needs of a micro-batch, on the pipeline's fullest stage, without the output layer."""
    layout, parallel, size = config.student, config.student.parallel, WEIGHT_BYTES[config.student.dtype]
    layer, layers = _layer_elements(config, model), rank_layers(model, parallel)
    # On the first stage of a 1F1B schedule; of an interleaved one, counted in chunks (arXiv 2104.04473, section 2.2).
    in_flight = parallel.pp if parallel.vpp == 1 else parallel.pp + (parallel.pp - 1) / parallel.vpp
    in_flight = min(in_flight, num_micro_batches(config))
    if layout.recompute == "full":
        kept = model.hidden_size / parallel.tp if parallel.sequence_parallel else float(model.hidden_size)
        elements, rule = layers * in_flight * kept + layer, f"inputs of {layers} layers, and one layer recomputed"
    else:
        elements, rule = layers * in_flight * layer, f"{layers} layers"
    tokens = micro_batch_tokens(config) / parallel.cp
    return Part(
        "activations",
        tokens * size * elements,
        f"{tokens:,.0f} tokens, {rule}, {in_flight:.3g} micro-batch(es) in flight",
    )


# --- servers and wires ------------------------------------------------------------------------------------------------


def server_memory(config: RunConfig, model: HfConfig, tp: int, gpu_gib: float) -> tuple[tuple[Part, ...], int]:
    """What a server's GPU holds, and the tokens that its key-value cache then has room for."""
    size = WEIGHT_BYTES[config.student.dtype]
    weights = num_parameters(model) * size / tp
    token = 2 * model.num_layers * max(model.num_query_groups / tp, 1) * model.head_dim * size
    share = config.servers.shared_gpu_frac or SERVER_SHARE
    cache = max(gpu_gib * share * GIB - weights, 0.0)
    parts = (
        Part("weights", weights, f"{num_parameters(model):,} parameters x {size} B over tp {tp}"),
        Part("key-value cache", cache, f"the rest of {share:.0%} of the GPU, at {token:,.0f} B a token"),
    )
    return parts, int(cache // token)


def wire(config: RunConfig, student: HfConfig, teacher: HfConfig | None) -> Iterator[Part]:
    """Bytes a step between the trainer and the servers, and between a replica's ranks."""
    size = WEIGHT_BYTES[config.student.dtype]
    responses = config.rollouts_per_step * config.max_horizon_tokens
    if config.uses_student_prefixes:
        weights = num_parameters(student) * size
        readers = config.servers.student_replicas
        how = "written once, read by" if config.servers.weight_sync == "disk" else "gathered on rank 0, broadcast to"
        yield Part("weight sync", weights * (1 + readers), f"{how} {readers} student server(s)")
    if config.distill.weight > 0 and config.teacher.sends_hidden_states and teacher is not None:
        # Base64 of the last hidden state, and JSON for the token's log-prob.
        token = teacher.hidden_size * size * 4 / 3 + 36
        yield Part(
            "hidden states", responses * token, f"{responses:,} tokens at most x {token:,.0f} B, from the teacher"
        )
        others = config.student.parallel.num_ranks // config.student.parallel.dp - 1
        spread = responses * teacher.hidden_size * size * others
        if others:
            yield Part(
                "to other ranks", spread, f"the same in binary, from each replica's leader to its {others} other(s)"
            )
    elif config.distill.weight > 0 and not config.teacher.in_trainer:
        stops = max(len(config.rollouts.stop_tokens), 1)
        # Base64 of an int32 id and an fp32 log-prob for each of the k; JSON for the token itself and each stop token.
        token = config.teacher.num_logprobs * 8 * 4 / 3 + 36 * (1 + stops)
        yield Part("teacher scores", responses * token, f"{responses:,} tokens at most x {token:,.0f} B")
