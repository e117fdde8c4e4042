"""``megatron-distill launch RECIPE --cluster PROFILE``: run a recipe as one Slurm job, follow it, or resume it."""

import argparse
from pathlib import Path

from megatron_distill.cli.arguments import add_recipe, add_run_dir, add_verbose, chosen_config, chosen_folder, print_end


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = "Run a recipe as one Slurm job. The same command again follows the job, or resumes the run."
    add_recipe(parser)
    parser.add_argument(
        "--cluster", required=True, metavar="PROFILE", help="a profile of recipes/clusters.py, or FILE:NAME"
    )
    add_run_dir(parser)
    add_verbose(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the job's scripts, submit none")
    parser.add_argument("--detach", action="store_true", help="submit and return; the same command follows it later")


def run(options: argparse.Namespace) -> None:
    """Submit and follow, or print the job."""
    from megatron_distill.launch import cluster, preflight
    from megatron_distill.launch.launch import check_folder
    from megatron_distill.launch.nodes import groups_of

    config = chosen_config(options)
    profile = cluster.load_profile(options.cluster)
    folder = chosen_folder(options, config)
    if options.dry_run:
        groups_of(config, profile)
        check_folder(config, folder)
        if Path(config.student.path).exists():
            for note in preflight.check(config, folder):
                print(f"# data: {note}")
        else:
            print(f"# {config.student.path} is not visible here: models and data were not checked")
        for name, text in cluster.dry_run(config, profile, folder).items():
            print(f"# --- {name} ---\n{text}")
        return
    if options.detach:
        job_id, submitted = cluster.ensure_job(profile, config, folder)
        print(submitted or f"Slurm job {job_id}: waiting or running; the same command without --detach follows it")
        return
    cluster.train(profile, config, folder, verbose=options.verbose)
    print_end(folder)
