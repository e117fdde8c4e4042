"""Stages that build on each other: distil, then reinforce, then measure. Each hands over by its run folder alone.

    stage 1 (a run) ── hf/ ──> gate ──> stage 2 (a run on that model) ── hf/ ──> gate ──> ...  ──> compare.html

Every stage is a run of its own, on this machine or as a Slurm job. It is a NeMo-Run experiment of its own too, since
NeMo-Run 0.11 runs later local stages although an earlier one failed, and exits 0. A finished stage is not repeated, nor taken
for one of another config; a failed one is resumed by the same command.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig
from megatron_distill.errors import ConfigError, DistillError
from megatron_distill.launch.launch import Train
from megatron_distill.launch.resume import refused_changes
from megatron_distill.models import hub
from megatron_distill.runs.run_folder import HELDOUT, RunFolder
from megatron_distill.runs.summary import closing_table

Evaluations = Mapping[str, list[dict[str, Any]]]
"""A stage's evaluations by set (``heldout``, and those of ``evaluation.sets``), each first to last."""

Gate = Callable[[Evaluations], str | None]
"""Judges a finished stage's evaluations: None to go on, or the reason to stop."""

Check = Callable[[RunConfig, RunFolder], None]
"""Refuses a run that where it would be made cannot take."""


@dataclass(frozen=True)
class Stage:
    """One run of a pipeline.

    Attributes:
        name: of the stage, and of its run folder.
        config: of the run; its student's path is replaced by the model that the stage before it left.
        gate: must pass before the next stage starts.
    """

    name: str
    config: RunConfig
    gate: Gate


@dataclass(frozen=True)
class Pipeline:
    """Stages in order."""

    name: str
    stages: tuple[Stage, ...]


def not_worse(metric: str = "avg_at_k", evaluation_set: str = HELDOUT) -> Gate:
    """A gate that stops when a stage leaves the model worse than it found it, beyond the start's 95% interval.

    Args:
        metric: an evaluation's number with an interval: ``avg_at_k``, ``pass_at_k`` or ``maj_at_k``.
        evaluation_set: by name.
    """

    def judge(evaluations: Evaluations) -> str | None:
        measured = _of_set(evaluations, evaluation_set)
        first, last = measured[0], measured[-1]
        low = first[f"{metric}_low"]
        if last[metric] >= low:
            return None
        return (
            f"{_named(metric, evaluation_set)} = {last[metric]:.3f} after the stage, {first[metric]:.3f} before: it must not "
            f"fall below {low:.3f}, the lower end of the start's interval. Look at the stage's report before going on"
        )

    return judge


def at_least(value: float, metric: str = "avg_at_k", evaluation_set: str = HELDOUT) -> Gate:
    """A gate that stops when a stage leaves a number of the last evaluation on a set below ``value``."""

    def judge(evaluations: Evaluations) -> str | None:
        last = _of_set(evaluations, evaluation_set)[-1][metric]
        if last >= value:
            return None
        return f"{_named(metric, evaluation_set)} = {last:.3f} after the stage: it must be at least {value:.3f}"

    return judge


def all_of(*gates: Gate) -> Gate:
    """A gate of several, e.g. one for each set; the first that stops tells why."""

    def judge(evaluations: Evaluations) -> str | None:
        return next((reason for gate in gates if (reason := gate(evaluations))), None)

    return judge


def _of_set(evaluations: Evaluations, name: str) -> list[dict[str, Any]]:
    if not evaluations.get(name):
        raise ConfigError(
            f"gate's evaluation_set = {name!r}: the stage was measured on {', '.join(evaluations) or 'nothing'}. "
            "Name one of these, or add it to the stage's evaluation.sets."
        )
    return evaluations[name]


def _named(metric: str, evaluation_set: str) -> str:
    return metric if evaluation_set == HELDOUT else f"{metric} on {evaluation_set}"


def run_pipeline(pipeline: Pipeline, folder: Path, train: Train, check: Check | None = None) -> str:
    """Run what has not been run yet, stage by stage.

    Args:
        pipeline: the stages.
        folder: a run folder for each stage goes below it; absolute.
        train: makes a stage's run, on this machine or on a cluster.
        check: of every run to be made, before the first one is, for what a cluster asks besides.

    Returns:
        The stages' first and last evaluations, for the console.

    Raises:
        ConfigError: a stage is unsound, however late it comes; nothing was started.
        DistillError: a stage finished before with another config, and nothing was started; or a stage failed or its gate
            did, and later stages were not started.
    """
    from megatron_distill.pages.compare import compare_runs  # which draws, and recipes import this module

    runs = _planned(_sound(pipeline), folder, check)
    tables = []
    for number, (stage, config, run) in enumerate(runs, 1):
        print(f"stage {number}/{len(runs)}: {stage.name}", flush=True)
        if run.has_finished(config.num_steps):
            print(f"  finished before: {run.root}", flush=True)
        else:
            train(config, run, sys.stdout)
        evaluations = run.evaluations()
        tables.append(f"{stage.name}\n{closing_table(evaluations)}")
        reason = stage.gate({name: run.evaluations(name) for name in run.evaluated_sets()})
        if reason is not None:
            raise DistillError(f"pipeline stage {stage.name!r} = gate failed: {reason}. Report: {run.report}")
    told = "\n\n" + "\n\n".join(tables) + f"\n\n  runs:  {folder}\n  model: {runs[-1][2].hf}"
    if len(runs) > 1:
        page = folder / "compare.html"
        compare_runs([run for _, _, run in runs], page)
        told += f"\n  page:  {page}"
    return told


def dry_run(pipeline: Pipeline, folder: Path, check: Check | None = None) -> str:
    """Check every stage as ``run_pipeline`` does, and start none.

    Returns:
        What would be run, and from what.

    Raises:
        ConfigError: a stage is unsound.
        DistillError: a stage finished before with another config.
    """
    lines = [f"{pipeline.name}: sound. It would run, in {folder}:"]
    for stage, config, run in _planned(_sound(pipeline), folder, check):
        todo = f"steps {run.latest_checkpoint_step() + 1} to {config.num_steps}"
        if run.has_finished(config.num_steps):
            todo = "nothing: it has finished"
        lines.append(f"  {stage.name:<12} {todo}, from {config.student.path}")
    return "\n".join(lines)


def _planned(pipeline: Pipeline, folder: Path, check: Check | None) -> list[tuple[Stage, RunConfig, RunFolder]]:
    """Each stage with its run's config, on the model that the stage before it leaves, and its run folder.

    Raises:
        ConfigError: a run's config is unsound.
        DistillError: a stage finished before with another config.
    """
    planned: list[tuple[Stage, RunConfig, RunFolder]] = []
    for stage in pipeline.stages:
        run = RunFolder(folder / stage.name)
        config = replace(stage.config, name=f"{pipeline.name}/{stage.name}")
        if planned:
            config = replace(config, student=replace(config.student, path=str(planned[-1][2].hf)))
        config = config_module.from_dict(config_module.to_dict(config))
        if run.has_finished(config.num_steps):
            _check_same_config(stage, config, run)
        elif check is not None:
            with _told_of(stage):
                check(config, run)
        planned.append((stage, config, run))
    return planned


def _check_same_config(stage: Stage, config: RunConfig, run: RunFolder) -> None:
    if changed := refused_changes(config_module.load(run.config), config):
        raise DistillError(
            f"pipeline stage {stage.name!r} = {run.root}: finished with another config ({', '.join(changed)} differ), and its "
            "gate would judge what that one measured. Choose another --dir, or delete the folder, and those of the stages "
            "after it, to repeat them."
        )


def _sound(pipeline: Pipeline) -> Pipeline:
    stages = tuple(replace(stage, config=hub.resolved(stage.config)) for stage in pipeline.stages)
    pipeline = replace(pipeline, stages=stages)
    check_pipeline(pipeline)
    return pipeline


def check_pipeline(pipeline: Pipeline) -> None:
    """Check every stage as far as it can be before the one before it has run: on its recipe's own student.

    Raises:
        ConfigError: naming the stage.
    """
    from megatron_distill.launch import preflight  # which loads tokenizers, and recipes import this module

    names = [stage.name for stage in pipeline.stages]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"pipeline.stages = {names}: must be one or more, of different names.")
    for stage in pipeline.stages:
        with _told_of(stage):
            preflight.check(stage.config)


@contextlib.contextmanager
def _told_of(stage: Stage) -> Iterator[None]:
    """Whatever is refused is refused by the stage's name."""
    try:
        yield
    except DistillError as error:
        raise ConfigError(f"pipeline stage {stage.name!r}: {error}") from error
