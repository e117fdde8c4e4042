"""``megatron-distill study NAME [--quick] [--seeds N ...]``: one task under many settings, several seeds, run or resumed."""

import argparse
from pathlib import Path

from megatron_distill.cli.arguments import NAME_HELP, add_cluster, chosen_train, positive_int
from megatron_distill.config.loading import load_made


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", help=NAME_HELP)
    parser.add_argument("--dir", type=Path, help="where the runs and the results go (default: runs/study-NAME)")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: a look, not a result")
    parser.add_argument(
        "--seeds", type=positive_int, nargs="+", default=(), metavar="N", help="make the runs of these seeds only"
    )
    add_cluster(parser, "run")


def run(options: argparse.Namespace) -> None:
    """Make the runs that are missing."""
    from megatron_distill.study.run import Study, run_study

    study = load_made(options.name, Study, "study")
    suffix = "-quick" if options.quick else ""
    folder = (options.dir or Path("runs") / f"study-{study.name}{suffix}").absolute()
    print(run_study(study.quick() if options.quick else study, folder, chosen_train(options), options.seeds))
