"""``megatron-distill fork RUN [--step N] [RECIPE] [section.field=value ...]``: a new run from a run's checkpoint."""

import argparse
import shlex
from pathlib import Path

from megatron_distill import config as config_module
from megatron_distill.cli.arguments import RECIPE_HELP, SYNTAX, add_run_dir, chosen_config, chosen_folder, positive_int


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Make a new run from a run's checkpoint: weights and optimizer state as they are, another config. num_steps counts "
        "from the first run's beginning. Nothing is started: the command to go on with is printed."
    )
    parser.epilog = SYNTAX
    parser.add_argument("run", type=Path, help="run folder to begin from")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="RECIPE|section.field=value",
        help=f"{RECIPE_HELP} (default: the run's own config); values as JSON, or plain text",
    )
    parser.add_argument("--step", type=positive_int, help="of the checkpoint (default: the latest)")
    add_run_dir(parser)


def run(options: argparse.Namespace) -> None:
    """Make the folder, and say how to go on."""
    from megatron_distill.launch.fork import fork
    from megatron_distill.runs.run_folder import RunFolder

    source = RunFolder(options.run.absolute())
    named = [word for word in options.overrides if "=" not in word][:1]
    options.recipe = named[0] if named else str(source.config)
    options.overrides = [word for word in options.overrides if word not in named]
    config = chosen_config(options)
    folder = chosen_folder(options, config)
    step = fork(source, options.step, config, folder)
    changes = _differences(config_module.load(source.config), config)
    print(f"{folder.root} stands at step {step} of {source.root}; other than there:\n{changes}\n")
    print(f"megatron-distill train {shlex.quote(str(folder.config))} --run-dir {shlex.quote(str(folder.root))}")


def _differences(before: config_module.RunConfig, config: config_module.RunConfig) -> str:
    was, is_now = (config_module.flatten(config_module.to_dict(one)) for one in (before, config))
    changed = sorted(name for name in was.keys() | is_now.keys() if was.get(name) != is_now.get(name))
    return "\n".join(f"  {name} = {is_now.get(name)!r} (was {was.get(name)!r})" for name in changed) or "  nothing"
