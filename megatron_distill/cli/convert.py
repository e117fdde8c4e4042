"""``megatron-distill convert ...``: weights between Hugging Face and Megatron.

::

    megatron-distill convert hf-to-megatron Qwen3-0.6B  checkpoints/qwen3 --tp 2
    megatron-distill convert megatron-to-hf checkpoints/run  Qwen3-0.6B-distilled --hf Qwen3-0.6B
    megatron-distill convert inspect PATH
    megatron-distill convert verify A B --logits "1 + 1 ="

Names to know: ``configure`` and ``run`` (for the main command line), ``main`` (for the scripts in ``tools/``).
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_distill.cli.arguments import positive_float, positive_int
from megatron_distill.errors import CheckpointError, DistillError

_GIB = 1 << 30


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the four sub-commands; each parser sets ``act``, which takes the parsed options."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (declare, text) in _BOTH_WAYS.items():
        declare(commands.add_parser(name, help=text))

    inspect = commands.add_parser("inspect", help="print what a checkpoint is, and whether it is complete")
    inspect.add_argument("path", help="Hugging Face directory or Megatron checkpoint")
    inspect.add_argument("--hf", metavar="DIR", help="where config.json is, if not in PATH")
    inspect.set_defaults(act=_inspect)

    verify = commands.add_parser("verify", help="compare two checkpoints, tensor by tensor")
    verify.add_argument("a", help="Hugging Face directory or Megatron checkpoint")
    verify.add_argument("b", help="the other checkpoint, of either kind")
    verify.add_argument("--hf", metavar="DIR", help="where config.json is, if not in a Megatron checkpoint")
    verify.add_argument("--logits", metavar="TEXT", help="also compare the logits on this text, in fp32")
    verify.add_argument(
        "--atol", type=positive_float, default=1e-4, help="largest logit difference to accept (default 1e-4)"
    )
    verify.set_defaults(act=_verify)


def run(options: argparse.Namespace) -> None:
    """Do what the chosen sub-command does."""
    options.act(options)


def main(command: str, argv: Sequence[str] | None = None) -> int:
    """Run one sub-command as a script of its own; a user's error is one message and exit code 1."""
    declare, text = _BOTH_WAYS[command]
    parser = argparse.ArgumentParser(prog=Path(sys.argv[0]).name, description=text)
    declare(parser)
    options = parser.parse_args(argv)
    try:
        run(options)
    except DistillError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _declare_to_megatron(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="directory with config.json and safetensors")
    parser.add_argument("target", help="directory to create; give it to megatron.training as --load")
    parser.add_argument(
        "--tp", type=positive_int, default=1, help="tensor-parallel size you will start with (others load too)"
    )
    parser.add_argument("--pp", type=positive_int, default=1, help="pipeline-parallel size, checked and recorded")
    parser.add_argument("--ep", type=positive_int, default=1, help="expert-parallel size, checked and recorded")
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=positive_int, default=128, help="as in megatron.training (default 128)"
    )
    _add_output_options(parser)
    parser.set_defaults(act=_to_megatron)


def _declare_to_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="what --save wrote (the latest iteration is taken), or one iter_* folder")
    parser.add_argument("target", help="directory to create")
    parser.add_argument("--hf", metavar="DIR", help="where config.json and the tokenizer are, if not in SOURCE/hf")
    _add_output_options(parser)
    parser.set_defaults(act=_to_hf)


_BOTH_WAYS = {
    "hf-to-megatron": (_declare_to_megatron, "Hugging Face directory -> Megatron torch_dist checkpoint"),
    "megatron-to-hf": (_declare_to_hf, "Megatron torch_dist checkpoint -> Hugging Face directory"),
}
"""The sub-commands that are scripts in ``tools/`` too: what declares their arguments, and what they do."""


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-file-gib", type=positive_float, default=4.0, help="size of one weight file (default 4 GiB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET once the new one is complete")


# The modules that do the work import torch, which takes seconds: not before a command is chosen.


def _to_megatron(options: argparse.Namespace) -> None:
    from megatron_distill.convert.offline import ARGUMENTS_FILE, hf_to_megatron

    start = time.monotonic()
    hf_to_megatron(
        options.source,
        options.target,
        tp=options.tp,
        pp=options.pp,
        ep=options.ep,
        make_vocab_size_divisible_by=options.make_vocab_size_divisible_by,
        max_file_bytes=int(options.max_file_gib * _GIB),
        overwrite=options.overwrite,
    )
    print(
        f"wrote {options.target} in {time.monotonic() - start:.1f} s\n"
        f"load it with: --load {shlex.quote(options.target)} $(cat {shlex.quote(f'{options.target}/{ARGUMENTS_FILE}')})"
    )


def _to_hf(options: argparse.Namespace) -> None:
    from megatron_distill.convert.offline import megatron_to_hf

    start = time.monotonic()
    megatron_to_hf(
        options.source,
        options.target,
        hf_dir=options.hf,
        max_file_bytes=int(options.max_file_gib * _GIB),
        overwrite=options.overwrite,
    )
    print(f"wrote {options.target} in {time.monotonic() - start:.1f} s")


def _inspect(options: argparse.Namespace) -> None:
    from megatron_distill.convert.inspection import inspect_checkpoint

    description = inspect_checkpoint(options.path, options.hf)
    print(description)
    if description.problem:
        raise CheckpointError(f"{options.path}: cannot be used, see `weights` above.")


def _verify(options: argparse.Namespace) -> None:
    from megatron_distill.convert.verify import compare_logits, compare_tensors

    comparison = compare_tensors(options.a, options.b, options.hf)
    print(comparison)
    if options.logits is not None:
        difference = compare_logits(options.a, options.b, options.logits, options.hf)
        print(f"logits: largest difference {difference:.3g}")
        if difference > options.atol:
            raise CheckpointError(
                f"--logits: largest difference = {difference:.3g}: must be at most --atol = {options.atol:g}. The two "
                "checkpoints do not compute the same. See the tensors listed above."
            )
    elif not comparison.same:
        raise CheckpointError(
            f"{options.a} and {options.b}: {len(comparison.differing)} tensors differ. They are not the same model. Add "
            "--logits TEXT to see by how much."
        )
