"""The command line: ``megatron-distill COMMAND ...``.

    train RECIPE [section.field=value ...]     run a recipe on this machine, or resume it
    launch RECIPE --cluster PROFILE            run a recipe as a Slurm job, or resume it
    plan RECIPE                                layout, memory and bytes on the wire; what would make it fit
    eval RUN_OR_MODEL                          measure a model on problems
    report RUN                                 (re)write a run's page and plots
    doctor                                     what is installed, and what works here
    convert ...                                Hugging Face <-> Megatron checkpoints

A user's error is printed without a traceback and ends with code 1; Ctrl-C stops everything and ends with code 130.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_distill import __version__
from megatron_distill import config as config_module
from megatron_distill.cluster import add_launch_parser
from megatron_distill.errors import DistillError
from megatron_distill.plan import add_plan_parser
from megatron_distill.recipe import all_recipes, load_recipe
from megatron_distill.run_folder import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors into one message and an exit code."""
    options = _parser().parse_args(argv)
    try:
        options.func(options)
    except DistillError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; start the same command again to resume from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="run a recipe on this machine, or resume it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a recipe on this machine. The same command again resumes from the last checkpoint.",
        epilog=f"recipes: {', '.join(all_recipes())}\n\nfields:\n{config_module.field_help()}",
    )
    train.add_argument("recipe", help="module.function below recipes/, or path/to/file.py:function")
    train.add_argument("overrides", nargs="*", metavar="section.field=value", help="values as JSON, or plain text")
    train.add_argument("--run-dir", type=Path, help="where the run folder goes (default: runs/NAME)")
    train.add_argument("--dry-run", action="store_true", help="check everything, print the processes, start none")
    train.set_defaults(func=_train)
    add_launch_parser(commands)
    add_plan_parser(commands)
    report = commands.add_parser("report", help="(re)write a run's page and plots")
    report.add_argument("run_dir", type=Path)
    report.set_defaults(func=_report)
    doctor = commands.add_parser("doctor", help="what is installed, and what works here")
    doctor.set_defaults(func=_doctor)
    return parser


def _train(options: argparse.Namespace) -> None:
    from megatron_distill import preflight
    from megatron_distill.console import Console, closing_table
    from megatron_distill.doctor import environment
    from megatron_distill.launch import prepare_folder
    from megatron_distill.local import local_tasks, run_local, visible_gpus
    from megatron_distill.report import write_report
    from megatron_distill.run_folder import write_json

    config = config_module.with_overrides(load_recipe(options.recipe), options.overrides)
    folder = RunFolder((options.run_dir or Path("runs") / config.name).absolute())
    preflight.check(config)
    if options.dry_run:
        print(f"{options.recipe}: sound. It would start, in {folder.root}:")
        for task in local_tasks(config, folder, visible_gpus()):
            print(f"  {task.name:<12} {task.command}")
        return
    resumed_step = prepare_folder(config, folder)
    config_module.save(config, folder.config)
    write_json(folder.root / "env.json", environment() | {"command": sys.argv, "working_directory": os.getcwd()})
    with Console(folder, config.num_steps) as console:
        console.say(f"resuming {folder.root} at step {resumed_step}" if resumed_step else f"run folder: {folder.root}")
        run_local(config, folder, console)
    write_report(folder)
    print(f"\n{closing_table(folder.evaluations())}\n\n  report: {folder.report}\n  model:  {folder.hf}")


def _report(options: argparse.Namespace) -> None:
    from megatron_distill.report import write_report

    print(write_report(RunFolder(options.run_dir)))


def _doctor(options: argparse.Namespace) -> None:
    from megatron_distill.doctor import diagnose

    print(diagnose())


if __name__ == "__main__":
    sys.exit(main())
