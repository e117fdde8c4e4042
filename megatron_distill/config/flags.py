"""Flags of Megatron and SGLang that a user may not add: what the config or the models decide, and what a run relies on.

In: ``student.megatron_args``, ``servers.student_args``, ``servers.teacher_args``. Out: for each refused flag, why, and what to
set instead. Whether a flag exists at all and takes its value, only Megatron's and SGLang's parsers know: ``megatron.arguments``
and ``sglang.server`` bring those.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

_FIELDS = {
    "tensor-model-parallel-size": "student.parallel.tp",
    "pipeline-model-parallel-size": "student.parallel.pp",
    "num-virtual-stages-per-pipeline-rank": "student.parallel.vpp",
    "num-layers-per-virtual-pipeline-stage": "student.parallel.vpp",
    "context-parallel-size": "student.parallel.cp",
    "expert-model-parallel-size": "student.parallel.ep",
    "expert-tensor-parallel-size": "student.parallel.etp",
    "sequence-parallel": "student.parallel.sequence_parallel",
    "bf16": "student.dtype",
    "fp16": "student.dtype",
    "use-distributed-optimizer": "student.distributed_optimizer",
    "dist-ckpt-optim-fully-reshardable": "student.distributed_optimizer",
    "recompute-granularity": "student.recompute",
    "recompute-method": "student.recompute",
    "transformer-impl": "student.layer_spec",
    "micro-batch-size": "micro_batch_rollouts or micro_batch_tokens",
    "global-batch-size": "rollouts.prompts_per_step",
    "rampup-batch-size": "rollouts.prompts_per_step",
    "seq-length": "curriculum.horizon_tokens",
    "train-iters": "num_steps",
    "train-samples": "num_steps",
    "exit-interval": "num_steps",
    "lr": "optimizer.lr",
    "min-lr": "optimizer.lr_decay",
    "lr-decay-style": "optimizer.lr_decay",
    "lr-warmup-iters": "optimizer.warmup_frac",
    "lr-warmup-samples": "optimizer.warmup_frac",
    "lr-warmup-fraction": "optimizer.warmup_frac",
    "weight-decay": "optimizer.weight_decay",
    "adam-beta1": "optimizer.adam_beta1",
    "adam-beta2": "optimizer.adam_beta2",
    "clip-grad": "optimizer.clip_grad",
    "seed": "seed",
    "save-interval": "save_every_steps",
    "non-persistent-save-interval": "save_every_steps",
    "save-retain-interval": "checkpoints.keep_every_steps",
}
"""Flag: the field of the config that decides it."""

_ARCHITECTURE = (
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "kv-channels"),
    *("vocab-size", "make-vocab-size-divisible-by", "max-position-embeddings", "normalization", "norm-epsilon"),
    *("position-embedding-type", "rotary-base", "use-rope-scaling", "rope-scaling-factor", "swiglu", "qk-layernorm"),
    *("rotary-seq-len-interpolation-factor", "group-query-attention", "add-qkv-bias", "disable-bias-linear"),
    *("untie-embeddings-and-output-weights", "num-experts", "moe-ffn-hidden-size", "moe-router-topk"),
    *("moe-router-pre-softmax", "hidden-dropout", "attention-dropout", "tokenizer-type"),
    *("mtp-num-layers", "use-checkpoint-args"),
)

_RUN = {
    "calculate-per-token-loss": "each component divides its loss by its own global token count",
    "dataloader-type": "rollouts are the data",
    "eval-interval": "what happens between two steps hangs on it",
    "eval-iters": "what happens between two steps hangs on it",
    "full-validation": "what happens between two steps hangs on it",
    "multiple-validation-sets": "what happens between two steps hangs on it",
    "cuda-graph-impl=full_iteration": "what comes before a step hangs on Megatron's schedule, which a graph would not call",
    "rerun-mode": "a replayed step would ask the servers again",
    "exit-signal-handler": "a stopped run saves by it",
    "save": "checkpoints are in the run folder",
    "load": "checkpoints are in the run folder",
    "async-save": "nobody watches Megatron's process that saves beside training. If it dies, as it does without a GPU, the "
    "trainer waits for ever",
    "fp8-param-gather": "weights go to servers and files as they lie, in bf16. To compute in eight bits --fp8-format is enough",
    "fp4-param-gather": "weights go to servers and files as they lie, in bf16. To compute in four bits --fp4-format is enough",
    "fp8-output-proj": "the output layer sees a chunk of a response's tokens at a time, of any number",
    "te-precision-config-file": "rows are padded for --fp8-format or --fp4-format, of all layers alike",
    "defer-embedding-wgrad-compute": "the head's gradient is computed with the loss, and nothing is left to defer",
    "ckpt-format": "conversion and resume read it",
    "distributed-backend": "the machine decides it",
    "no-save-optim": "a resumed run equals an unbroken one; for weights alone there is checkpoints.export_hf",
    "no-load-optim": "a resumed run equals an unbroken one",
    "no-save-rng": "a resumed run equals an unbroken one",
    "no-load-rng": "a resumed run equals an unbroken one",
    "finetune": "a resumed run equals an unbroken one",
    "ckpt-step": "it goes on from its latest checkpoint. To begin at another, use megatron-distill fork",
    "pretrained-checkpoint": "it begins with the weights of student.path",
    "exit-duration-in-mins": "it ends at num_steps, or when it is told to: it then saves, and the same command resumes it",
    "skip-train": "nothing would be learnt",
    "freeze-all-layers": "nothing would be learnt",
    "optimizer=sgd": "Megatron 0.19 cannot load a checkpoint of it, so the run could not be resumed",
    "use-megatron-fsdp": "weights go to servers and files from tensor-parallel shards. There is student.distributed_optimizer",
    "use-torch-fsdp2": "weights go to servers and files from tensor-parallel shards. There is student.distributed_optimizer",
    "perform-rl-step": "it has an RL of its own, by rl.weight",
}

MEGATRON = (
    {name: f"is decided by {field}. Set that instead" for name, field in _FIELDS.items()}
    | dict.fromkeys(_ARCHITECTURE, "is decided by the model in student.path. Leave it out")
    | {name: f"belongs to the run: {reason}. Leave it out" for name, reason in _RUN.items()}
)
"""Refused flags of ``megatron.training``, or one value of a flag: why."""

_ENDPOINT = "belongs to the run: the trainer finds the server there. Leave it out"
_IDS = "belongs to the run: token ids go in and come out, and text is never tokenised again. Leave it out"
_KEY = "belongs to the run: each has a random key of its own. Leave it out"
SGLANG = {
    "model-path": "is decided by student.path or teacher.path. Set that instead",
    "model": "is decided by student.path or teacher.path. Set that instead",
    "tp-size": "is decided by servers.student_tp or servers.teacher_tp. Set that instead",
    "tensor-parallel-size": "is decided by servers.student_tp or servers.teacher_tp. Set that instead",
    "dtype": "is decided by student.dtype. Set that instead",
    "context-length": "is decided by data.max_prompt_tokens and the longest response. Set those instead",
    "enable-deterministic-inference": "is decided by servers.deterministic. Set that instead",
    "enable-return-hidden-states": "is decided by teacher.transport. Set that instead",
    "return-hidden-states-mode": "is decided by teacher.transport. Set that instead",
    "device": "belongs to the run: the machine decides it. Leave it out",
    "weight-version": "belongs to the run: it counts the weights that were pushed. Leave it out",
    "skip-tokenizer-init": _IDS,
    "host": _ENDPOINT,
    "port": _ENDPOINT,
    "api-key": _KEY,
    "admin-api-key": _KEY,
    "config": "may hold flags that the run decides. Write its flags out",
}
"""Refused flags of ``sglang.launch_server``: why."""


QUANTISED = ("fp8-format", "fp4-format")
"""Flags by which Megatron multiplies in eight or four bits."""


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """What ``--name`` is set to, the last time it is; "" of a switch, None if it is not among the arguments."""
    values = [value for flag, _, value in (one.partition("=") for one in arguments) if flag == f"--{name}"]
    return values[-1] if values else None


def refused(arguments: Sequence[str], reasons: Mapping[str, str]) -> Iterator[str]:
    """A sentence for every argument that may not be there; nothing if all may.

    Args:
        arguments: of a config.
        reasons: ``MEGATRON`` or ``SGLANG``.
    """
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        if not argument.startswith("--") or not name:
            yield f"{argument!r} is no flag. Write one string a flag: --name=value, or --name."
        for one in (name, f"{name}{equals}{value}"):
            if one in reasons:
                yield f"--{one} {reasons[one]}."
                break


def not_parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str], reasons: Mapping[str, str], whose: str
) -> list[str]:
    """A sentence for every argument that a parser does not know, does not take, or knows as another name of a refused one.

    Args:
        parser: a new one of the program that gets the arguments; it is changed.
        arguments: of a config.
        reasons: ``MEGATRON`` or ``SGLANG``.
        whose: the program's name.
    """
    actions = parser._option_string_actions
    owned = {actions[f"--{name}"].dest: name for name in reasons if f"--{name}" in actions}
    for action in parser._actions:
        action.required = False  # each argument is tried by itself

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser.error = refuse  # type: ignore[method-assign]
    sentences = []
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag not in actions:
            sentences.append(f"{argument}: {whose} knows no such flag. Mend or drop it.")
        elif (owner := owned.get(actions[flag].dest)) and flag != f"--{owner}":
            sentences.append(f"{argument}: sets the same as --{owner}, which {reasons[owner]}.")
        else:
            try:
                parser.parse_args([argument])
            except ValueError as error:
                sentences.append(f"{argument}: {whose} does not take it: {error}. Mend or drop it.")
    return sentences
