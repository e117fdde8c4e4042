"""What several commands share: naming a recipe and changing it, naming a run folder, choosing a cluster, the end.

In: a command's parser, or its parsed options. Out: the config, or the folder.
"""

import argparse
import math
from pathlib import Path

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig
from megatron_distill.config.loading import load_recipe
from megatron_distill.runs.run_folder import RunFolder

NAME_HELP = "module.function below recipes/, or path/to/file.py:function"
RECIPE_HELP = f"{NAME_HELP}, or a run's config.json"

SYNTAX = """values:
  num_steps=200  name=my-run  rollouts.top_p=0.95            numbers and words as they are
  'rollouts.stop_tokens=["<|endoftext|>", "<|im_end|>"]'     a list, as JSON; quoted, for the shell
  'data.template_options={"enable_thinking": false}'         an object, as JSON
  rl.reward=my_rewards.py:exact                              a function of your own
schedules (of type "schedule" below) are a number, or values that begin at a step:
  distill.reverse_kl_weight=0.2
  'distill.reverse_kl_weight={"points": [[0, 0.8], [100, 0.2]]}'                        0.2 from step 100 on
  'distill.reverse_kl_weight={"points": [[0, 0.8], [100, 0.2]], "interpolate": true}'   a straight line down to it"""


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe's name and any number of overrides; ``chosen_config`` reads them."""
    parser.add_argument("recipe", help=RECIPE_HELP)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="values as JSON, or plain text")


def chosen_config(options: argparse.Namespace) -> RunConfig:
    """The named recipe's config, or that of a run, with the overrides applied, its hub ids as the folders that were fetched.

    Raises:
        ConfigError: there is no such recipe or file, or an override is wrong.
    """
    from megatron_distill.models import hub

    is_runs = options.recipe.endswith(".json")
    config = config_module.load(Path(options.recipe)) if is_runs else load_recipe(options.recipe)
    return hub.resolved(config_module.with_overrides(config, options.overrides))


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """Where the run folder goes; ``chosen_folder`` reads it."""
    parser.add_argument("--run-dir", type=Path, help="where the run folder goes (default: runs/NAME)")


def chosen_folder(options: argparse.Namespace, config: RunConfig) -> RunFolder:
    """The run's folder, by an absolute path."""
    return RunFolder((options.run_dir or Path("runs") / config.name).absolute())


def add_cluster(parser: argparse.ArgumentParser, does: str) -> None:
    """An optional cluster profile for a command that makes several runs.

    Args:
        parser: of the command.
        does: what it does with it, e.g. "run each stage as a Slurm job".
    """
    parser.add_argument("--cluster", default="", metavar="PROFILE", help=f"{does} of this profile")


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """How much the console shows."""
    parser.add_argument("--verbose", action="store_true", help="print every metric of each step (docs/metrics.md)")


def positive_int(text: str) -> int:
    """An argument's number, 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 0 < value < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: must be a whole number of 1 or more")
    return value


def positive_float(text: str) -> float:
    """An argument's number, above 0 and finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: must be a number above 0")
    return value


def print_end(folder: RunFolder) -> None:
    """What a finished run is worth, and where it is."""
    from megatron_distill.runs.summary import closing_summary

    print(f"\n{closing_summary(folder)}\n\n  report: {folder.report}\n  model:  {folder.hf}")
