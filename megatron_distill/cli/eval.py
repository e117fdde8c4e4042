"""``megatron-distill eval RUN_OR_MODEL [--problems FILE | --set NAME] [--step N]``: measure a model on problems."""

import argparse
from pathlib import Path

from megatron_distill import config as config_module


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fields = [config_module.field_help(section) for section in ("evaluation.", "servers.student_")]
    columns = "  and how problems are read (train --help):  data.prompt_key=question data.answer_marker='####'"
    parser.epilog = "\n\n".join(["fields (defaults):", *fields, columns])
    parser.description = (
        "Measure a model on problems, on servers of its own. Responses are kept from the first on: the same command again, "
        "after it was interrupted, draws only the rest."
    )
    parser.add_argument(
        "model", help="a run folder (its hf/ is measured), a Hugging Face directory, or a hub id once fetched"
    )
    measured_on = parser.add_mutually_exclusive_group()
    measured_on.add_argument(
        "--problems", default="", metavar="FILE", help="where problems are (default for a run: its held-out set)"
    )
    measured_on.add_argument("--set", default="", metavar="NAME", help="a set as in evaluation.sets, e.g. math500")
    parser.add_argument("--step", type=int, metavar="N", help="of a run: its checkpoint of step N; 0: as it began")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON file to write (default for a run: eval/PROBLEMS.json)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="values as JSON, or plain text")


def run(options: argparse.Namespace) -> None:
    """Measure, and print the result."""
    from megatron_distill.evaluate.command import evaluate_model

    print(
        evaluate_model(
            options.model, options.problems, options.out, options.overrides, step=options.step, set_name=options.set
        )
    )
