"""From a run's config to Megatron's command line: what a user of ``megatron.training`` would have typed.

In: ``RunConfig`` and the student's architecture. Out: a list of flags, and nothing else; Megatron parses and checks them
itself.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Sequence

from megatron_distill.config import RunConfig
from megatron_distill.config.flags import MEGATRON, not_parsed, value_of
from megatron_distill.errors import ConfigError
from megatron_distill.megatron import cpu_backend
from megatron_distill.megatron.backend import MegatronBackend, kernel_arguments
from megatron_distill.models.context_parallel import sequence_multiple
from megatron_distill.models.hf_config import VOCAB_DIVISOR, HfConfig, padded_vocab_size
from megatron_distill.models.megatron_gpt import megatron_arguments
from megatron_distill.models.pipeline import megatron_layout, stage_layers
from megatron_distill.runs.run_folder import RunFolder


def row_multiple(config: RunConfig, backend: MegatronBackend) -> int:
    """What a packed row's length is a multiple of: cp ranks share it, and sequence parallelism cuts a share into tp parts.

    Each part is a matrix whose rows multiplication in eight or four bits takes so many at a time.
    """
    parallel = config.student.parallel
    part = parallel.tp * parallel.cp * _quantised_rows(config.student.megatron_args)
    return math.lcm(backend.row_multiple, parallel.tp * sequence_multiple(parallel.cp), part)


def _quantised_rows(arguments: Sequence[str]) -> int:
    """Megatron's own numbers, by which it pads what reaches an expert itself; 1 without quantisation."""
    fp8, fp4 = value_of(arguments, "fp8-format"), value_of(arguments, "fp4-format")
    if fp8 is None and fp4 is None:
        return 1
    from megatron.core.fp4_utils import get_fp4_align_size
    from megatron.core.fp8_utils import get_fp8_align_size

    recipe = value_of(arguments, "fp8-recipe" if fp8 else "fp4-recipe")
    return int(get_fp8_align_size(recipe) if fp8 else get_fp4_align_size(recipe))


def sequence_length(config: RunConfig, backend: MegatronBackend) -> int:
    """Longest packed row, in tokens: the longest prompt and response, rounded up."""
    multiple = row_multiple(config, backend)
    return -(-config.max_sequence_tokens // multiple) * multiple


def student_padded_vocab_size(config: RunConfig, student: HfConfig) -> int:
    """Rows of the embedding over all tensor-parallel ranks."""
    return padded_vocab_size(student.vocab_size, VOCAB_DIVISOR, config.student.parallel.tp)


def flag_problems(arguments: Sequence[str]) -> list[str]:
    """A sentence for each of a user's flags that Megatron's own parser refuses; asked in a process of its own.

    Raises:
        ConfigError: Megatron cannot be imported.
    """
    asked = subprocess.run([sys.executable, "-m", __name__, *arguments], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ConfigError(f"megatron = cannot be asked for its flags: {asked.stderr.strip()[-300:]}. Run `doctor`.")
    problems: list[str] = json.loads(asked.stdout.splitlines()[-1])
    return problems


def training_arguments(config: RunConfig, student: HfConfig, folder: RunFolder, backend: MegatronBackend) -> list[str]:
    """The flags of ``megatron.training`` for one run; what a user adds comes last, since the last of two flags counts.

    Two of them are not obvious. ``--full-validation`` of one empty validation set and ``--eval-interval 1`` makes the
    loop call ``pretrain``'s public ``non_loss_data_func`` after every step, on every rank, with parameters in sync: that
    is where weights are pushed and, unless a checkpoint is due, the next step's rollouts are drawn.
    ``--calculate-per-token-loss`` divides gradients by the global token count, once, so that micro-batches and replicas
    cannot change the result.
    """
    student_config, optimizer, parallel = config.student, config.optimizer, config.student.parallel
    values = {
        "tensor-model-parallel-size": parallel.tp,
        "pipeline-model-parallel-size": parallel.pp,
        "micro-batch-size": 1 if config.micro_batch_tokens else config.micro_batch_rollouts,
        "global-batch-size": config.rollouts_per_step,
        "seq-length": sequence_length(config, backend),
        "make-vocab-size-divisible-by": VOCAB_DIVISOR,
        "tokenizer-type": "NullTokenizer",  # token ids in, token ids out
        "train-iters": config.num_steps,
        "lr": optimizer.lr,
        "min-lr": optimizer.lr if optimizer.lr_decay == "constant" else 0.0,
        "lr-decay-style": optimizer.lr_decay,
        "lr-warmup-iters": config.warmup_steps,
        "weight-decay": optimizer.weight_decay,
        "adam-beta1": optimizer.adam_beta1,
        "adam-beta2": optimizer.adam_beta2,
        "clip-grad": optimizer.clip_grad,
        "seed": config.seed,
        "dataloader-type": "external",
        "rerun-mode": "disabled",  # replays would ask the servers again
        "eval-interval": 1,
        "log-interval": 1,
        "distributed-timeout-minutes": 120,  # ranks wait while responses are sampled
        "save-interval": config.save_every_steps or config.num_steps,
        "ckpt-format": "torch_dist",
    }
    switches = ["calculate-per-token-loss", "exit-signal-handler"]
    # --full-validation alone fails on a single set in megatron-core 0.19.2 (it takes an int for a list).
    switches += ["full-validation", "multiple-validation-sets"]
    stages = parallel.pp * parallel.vpp
    if student.num_layers % stages:
        values["pipeline-model-parallel-layout"] = megatron_layout(stage_layers(student.num_layers, stages))
    elif parallel.vpp > 1:
        values["num-virtual-stages-per-pipeline-rank"] = parallel.vpp
    if parallel.cp > 1:
        values["context-parallel-size"] = parallel.cp
    if parallel.ep > 1:
        values["expert-model-parallel-size"] = parallel.ep
    if parallel.etp is not None:
        values["expert-tensor-parallel-size"] = parallel.etp
    step = folder.latest_checkpoint_step()
    if step < config.num_steps:  # else only the end is left, and Megatron would write the last checkpoint over itself
        values["save"] = folder.checkpoints
    if step:
        values["load"] = folder.checkpoints
        switches.append("override-opt-param-scheduler")  # a resumed run may be longer than it was planned to be
    if student_config.dtype == "bf16":
        switches.append("bf16")
    if student_config.distributed_optimizer:
        # States by the names of parameters, and not by this layout's buffers: any other layout can load them.
        switches += ["use-distributed-optimizer", "dist-ckpt-optim-fully-reshardable"]
    if parallel.sequence_parallel:
        switches.append("sequence-parallel")
    if student_config.recompute == "full":
        values |= {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    elif student_config.recompute == "selective":
        values["recompute-granularity"] = "selective"  # of the core attention
    flags = [f"--{name}={value}" for name, value in values.items()] + [f"--{name}" for name in switches]
    flags += kernel_arguments(backend, student.num_experts)
    return megatron_arguments(student) + flags + list(student_config.megatron_args)


def main() -> None:
    """``python -m megatron_distill.megatron.arguments FLAG ...``: print what is wrong with them, as a JSON list."""
    cpu_backend.install()
    from megatron.training.arguments import add_megatron_arguments

    flags = sys.argv[1:]
    problems = not_parsed(add_megatron_arguments(argparse.ArgumentParser()), flags, MEGATRON, "Megatron")
    others = [flag for flag in flags if flag.startswith("--optimizer=") and flag != "--optimizer=adam"]
    if others and importlib.util.find_spec("emerging_optimizers") is None:
        problems.append(f"{others[-1]}: needs a package. Type: pip install emerging-optimizers.")
    print(json.dumps(problems))


if __name__ == "__main__":
    main()
