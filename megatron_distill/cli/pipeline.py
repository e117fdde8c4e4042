"""``megatron-distill pipeline NAME``: stages with gates between them, run or resumed."""

import argparse
import functools
from pathlib import Path

from megatron_distill.cli.arguments import NAME_HELP, add_cluster
from megatron_distill.config.loading import load_made
from megatron_distill.launch.launch import Train
from megatron_distill.launch.pipeline import Check, Pipeline, dry_run, run_pipeline


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", help=NAME_HELP)
    parser.add_argument("--dir", type=Path, help="where the stages' run folders go (default: runs/NAME)")
    add_cluster(parser, "run each stage as a Slurm job")
    parser.add_argument("--dry-run", action="store_true", help="check every stage, start none")


def run(options: argparse.Namespace) -> None:
    """Run the stages that have not finished."""
    pipeline = load_made(options.name, Pipeline, "pipeline")
    folder = (options.dir or Path("runs") / pipeline.name).absolute()
    train, check = _place(options.cluster)
    if options.dry_run:
        print(dry_run(pipeline, folder, check))
        return
    print(run_pipeline(pipeline, folder, train, check))


def _place(profile_name: str) -> tuple[Train, Check | None]:
    """What makes a stage's run, and what checks it for that: a Slurm job of the named profile, or this machine."""
    if profile_name:
        from megatron_distill.launch import cluster

        profile = cluster.load_profile(profile_name)
        return functools.partial(cluster.train, profile), lambda config, run: cluster.check_job(config, profile, run)
    from megatron_distill.launch import local

    return local.train, None
