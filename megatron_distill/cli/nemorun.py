"""The recipes on NeMo-Run's own command line, for those who live there; found through the entry-point group ``nemo_run.cli``.

    nemorun distill train -y --factory tiny_quickstart
    nemorun distill train -y recipe=tiny.quickstart 'overrides=["num_steps=10"]'
    nemorun distill launch -y recipe=qwen3.b06_from_4b_1x8_4096 cluster=ours.py:ours

The same as ``megatron-distill train`` and ``launch``, which this calls. NeMo-Run's ``run.executor=`` does not apply: a run is
several kinds of processes, and a cluster profile says where each goes.
"""

import sys

import nemo_run as run

from megatron_distill.cli.main import main
from megatron_distill.config.loading import all_recipes


@run.cli.entrypoint(namespace="distill")
def train(recipe: str, overrides: list[str] = []) -> None:  # noqa: B006  NeMo-Run's parser knows no other default list
    """Run a recipe on this machine, or resume it."""
    _exit_with(main(["train", recipe, *overrides]))


@run.cli.entrypoint(namespace="distill")
def launch(recipe: str, cluster: str, overrides: list[str] = []) -> None:  # noqa: B006
    """Run a recipe as a Slurm job, or resume it."""
    _exit_with(main(["launch", recipe, "--cluster", cluster, *overrides]))


def _exit_with(code: int) -> None:
    """NeMo-Run ends with 0 whatever happened, unless told otherwise."""
    if code:
        sys.exit(code)


def _register(name: str) -> None:
    def factory() -> run.Partial:
        return run.Partial(train, recipe=name)

    run.cli.factory(factory, target=train, name=name.replace(".", "_"))


for _name in all_recipes():
    _register(_name)
