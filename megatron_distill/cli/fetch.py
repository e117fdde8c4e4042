"""``megatron-distill fetch RECIPE|ID``: bring models and data sets from the Hugging Face hub, once, before a run."""

import argparse
from typing import Literal

from megatron_distill.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Bring what a recipe names by a hub id (student, teacher, data, evaluation sets) into Hugging Face's cache, or one "
        "model or data set. A run looks nothing up: it takes what was fetched, and records its revision. Token and cache are "
        "those of huggingface_hub (hf auth login, HF_HOME)."
    )
    parser.add_argument(
        "what", help="a recipe (module.function, or path/to/file.py:function), or an id: owner/name[@revision]"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of a recipe")
    parser.add_argument("--dataset", action="store_true", help="the id is a data set's")


def run(options: argparse.Namespace) -> None:
    """Fetch, and say where everything lies."""
    from megatron_distill.models import hub

    kind: hub.Kind = "dataset" if options.dataset else "model"
    if hub.hub_id(options.what.partition(":")[0]):
        if options.overrides:
            raise ConfigError(
                f"{' '.join(options.overrides)}: sets fields of a recipe, and {options.what} is an id. Leave it out."
            )
        print(f"{options.what}: {hub.fetch(options.what, kind)}")
        return
    if options.dataset:
        raise ConfigError(f"--dataset: goes with an id, owner/name, and {options.what} is none. Leave it out.")
    problems = []
    for where, (text, its_kind) in _wanted(options).items():
        if hub.hub_id(text) is None:
            print(f"{where} = {text}: a path, left as it is")
            continue
        try:
            print(f"{where} = {text}: {hub.fetch(text, its_kind)}", flush=True)
        except ConfigError as error:
            problems.append(f"{where} = {text}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def _wanted(options: argparse.Namespace) -> dict[str, tuple[str, Literal["model", "dataset"]]]:
    """``{field: (place, kind)}`` of a recipe, its evaluation sets included."""
    from megatron_distill.config import with_overrides
    from megatron_distill.config.loading import load_recipe
    from megatron_distill.evaluate.sets import load_sets
    from megatron_distill.models import hub
    from megatron_distill.runs.run_folder import HELDOUT

    config = with_overrides(load_recipe(options.what), options.overrides)
    wanted = hub.places(config)
    for one in load_sets(config):
        if one.name != HELDOUT:
            wanted[f"evaluation set {one.name}"] = (one.path, "dataset")
    return wanted
