"""``megatron-distill train RECIPE [section.field=value ...]``: run a recipe on this machine, or resume it."""

import argparse

from megatron_distill import config as config_module
from megatron_distill.cli.arguments import (
    SYNTAX,
    add_recipe,
    add_run_dir,
    add_verbose,
    chosen_config,
    chosen_folder,
    print_end,
)
from megatron_distill.config.loading import all_recipes


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = "Run a recipe on this machine. The same command again resumes from the last checkpoint."
    parser.epilog = f"recipes: {', '.join(all_recipes())}\n\n{SYNTAX}\n\nfields:\n{config_module.field_help()}"
    add_recipe(parser)
    add_run_dir(parser)
    add_verbose(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the processes, start none")


def run(options: argparse.Namespace) -> None:
    """Train, or say what would be started."""
    from megatron_distill.launch import preflight
    from megatron_distill.launch.launch import check_folder
    from megatron_distill.launch.local import local_tasks, train, visible_gpus

    config = chosen_config(options)
    folder = chosen_folder(options, config)
    if options.dry_run:
        check_folder(config, folder)
        for note in preflight.check(config, folder):
            print(f"data: {note}")
        print(f"{options.recipe}: sound. It would start, in {folder.root}:")
        for task in local_tasks(config, folder, visible_gpus()):
            print(f"  {task.name:<12} {task.command}")
        return
    train(config, folder, verbose=options.verbose)
    print_end(folder)
