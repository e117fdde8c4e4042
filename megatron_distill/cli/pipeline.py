"""``megatron-distill pipeline NAME``: stages with gates between them, run or resumed."""

import argparse
from pathlib import Path

from megatron_distill.cli.arguments import NAME_HELP, add_cluster, chosen_train
from megatron_distill.config.loading import load_made


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", help=NAME_HELP)
    parser.add_argument("--dir", type=Path, help="where the stages' run folders go (default: runs/NAME)")
    add_cluster(parser, "run each stage as a Slurm job")
    parser.add_argument("--dry-run", action="store_true", help="check every stage, start none")


def run(options: argparse.Namespace) -> None:
    """Run the stages that have not finished."""
    from megatron_distill.launch.pipeline import Pipeline, dry_run, run_pipeline

    pipeline = load_made(options.name, Pipeline, "pipeline")
    folder = (options.dir or Path("runs") / pipeline.name).absolute()
    if options.dry_run:
        print(dry_run(pipeline, folder))
        return
    print(run_pipeline(pipeline, folder, chosen_train(options)))
