"""``megatron-distill study NAME [--quick] [--seeds N ...]``: one task under many settings, several seeds, run or resumed."""

import argparse
from pathlib import Path
from typing import Any

from megatron_distill.cli.arguments import NAME_HELP, add_cluster, positive_int
from megatron_distill.config.loading import load_made
from megatron_distill.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", help=NAME_HELP)
    parser.add_argument("--dir", type=Path, help="where the runs and the results go (default: runs/study-NAME)")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: a look, not a result")
    parser.add_argument(
        "--seeds", type=positive_int, nargs="+", default=(), metavar="N", help="make the runs of these seeds only"
    )
    add_cluster(parser, "submit all runs at once, as Slurm job arrays")
    parser.add_argument("--max-running", type=positive_int, default=0, metavar="N", help="of an array's runs at a time")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the arrays' scripts, submit none"
    )
    parser.add_argument("--detach", action="store_true", help="submit and return; the same command follows them later")


def run(options: argparse.Namespace) -> None:
    """Make the runs that are missing, or submit them."""
    from megatron_distill.study.run import Study, planned, run_study

    study = load_made(options.name, Study, "study")
    suffix = "-quick" if options.quick else ""
    folder = (options.dir or Path("runs") / f"study-{study.name}{suffix}").absolute()
    study = study.quick() if options.quick else study
    if options.cluster:
        _on_cluster(planned(study, folder, options.seeds), options)
        return
    for flag in ("max_running", "dry_run", "detach"):
        if getattr(options, flag):
            raise ConfigError(f"--{flag.replace('_', '-')}: is for Slurm. Add --cluster PROFILE, or leave it out.")
    from megatron_distill.launch import local

    print(run_study(study, folder, local.train, options.seeds))


def _on_cluster(runs: Any, options: argparse.Namespace) -> None:
    from megatron_distill.launch.cluster import load_profile
    from megatron_distill.study import submit

    profile = load_profile(options.cluster)
    if options.dry_run:
        for name, text in submit.dry_run(runs, profile, options.max_running).items():
            print(f"# --- {name} ---\n{text}")
        return
    jobs = submit.submit_missing(runs, profile, options.max_running)
    if not options.detach:
        print(submit.follow(runs, jobs))
