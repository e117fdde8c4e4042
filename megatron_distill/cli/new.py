"""``megatron-distill new FILE.py --student DIR --teacher DIR --train FILE --heldout FILE``: a recipe of one's own."""

import argparse
from pathlib import Path

from megatron_distill.cli.arguments import positive_int


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Write a commented recipe for your own models and data, and check it as a run would be. Edit it, or change fields on "
        "the command line."
    )
    parser.add_argument("file", type=Path, help="Python file to write; its name without .py names the run")
    parser.add_argument(
        "--student",
        required=True,
        metavar="DIR",
        help="Hugging Face directory of the student, or a hub id once fetched",
    )
    parser.add_argument(
        "--teacher",
        required=True,
        metavar="DIR",
        help="Hugging Face directory of the teacher, or a hub id once fetched",
    )
    parser.add_argument("--train", required=True, metavar="FILE", help="problems to train on")
    parser.add_argument("--heldout", required=True, metavar="FILE", help="problems to measure on")
    for what in ("prompt", "answer"):
        parser.add_argument(
            f"--{what}-key", default="", metavar="COLUMN", help=f"column of the {what}s (default: one of a usual name)"
        )
    parser.add_argument(
        "--horizon-tokens", type=positive_int, default=1024, metavar="N", help="longest response (default: 1024)"
    )
    parser.add_argument(
        "--on-bad-rows",
        choices=("stop", "drop"),
        default="stop",
        help="what becomes of rows without prompt or answer, or too long (default: stop)",
    )


def run(options: argparse.Namespace) -> None:
    """Write, check, and say what to type next."""
    from megatron_distill.launch.new_recipe import write_recipe

    print(
        write_recipe(
            options.file,
            options.student,
            options.teacher,
            options.train,
            options.heldout,
            options.horizon_tokens,
            options.prompt_key,
            options.answer_key,
            options.on_bad_rows,
        )
    )
