"""What a run folder tells about a run, read once: the data behind ``report`` and ``compare``.

In: a ``RunFolder``, of a finished run or of one under way. Out: a ``RunRecord`` of plain values and arrays.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_distill.config import all_fields, flatten, plain_value
from megatron_distill.errors import DataError
from megatron_distill.pages.plots import Floats, Series
from megatron_distill.runs.run_folder import HELDOUT, RunFolder, read_json, read_lines
from megatron_distill.training.curriculum import valid_records

ABSENT = "-"
"""Shown for a config field that a run does not have, having been made by another version."""


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder tells it.

    Attributes:
        name: the run folder's last path component.
        config: dotted field name -> plain value, as written when the run started.
        steps: metrics, one record a step.
        evaluations: summaries, in step order.
        further: the same of each set beside the held-out one, by its name.
        decisions: of the curriculum, those that count.
        samples: responses kept along the way.
        is_finished: whether it ran to its end.
        failure: the first cause, if it failed.
    """

    name: str
    config: dict[str, Any]
    steps: list[dict[str, float]]
    evaluations: list[dict[str, Any]]
    further: dict[str, list[dict[str, Any]]]
    decisions: list[Mapping[str, Any]]
    samples: list[dict[str, Any]]
    is_finished: bool
    failure: str

    def column(self, metric: str) -> Floats:
        """[N] values of a metric over the recorded steps, nan where it was not measured, or is no number."""
        return np.array([_number(record.get(metric)) for record in self.steps], float)

    def has(self, metric: str) -> bool:
        """Whether any step measured the metric."""
        return bool(np.isfinite(self.column(metric)).any())

    def curve(self, metric: str, label: str = "", kind: Any = "line") -> Series:
        """A metric over the steps."""
        return Series(label or metric, self.column("step"), self.column(metric), kind)

    def evaluated(self, key: str, label: str) -> Series:
        """A number of the evaluations' summaries over the steps, with its interval if it has one."""

        def values(key: str) -> Floats:
            return np.array([summary[key] for summary in self.evaluations], float)

        has_interval = bool(self.evaluations) and f"{key}_low" in self.evaluations[0]
        low, high = (values(f"{key}_low"), values(f"{key}_high")) if has_interval else (None, None)
        return Series(label, values("step"), values(key), "points", low, high)


def _is_sample(record: Mapping[str, Any]) -> bool:
    texts = ("written_by", "stop_reason", "answer", "prompt", "response")
    return isinstance(record.get("step"), int | float) and all(isinstance(record.get(name), str) for name in texts)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def read_run(folder: RunFolder) -> RunRecord:
    """Read a run folder.

    Raises:
        DataError: if there is no such folder, it is not a run folder, nothing was measured yet, or a file is broken.
    """
    where = f"run folder = {folder.root}"
    remedy = "Name a folder that `megatron-distill train` wrote, such as runs/NAME."
    if not folder.root.is_dir():
        raise DataError(f"{where}: no such folder. {remedy}")
    if not folder.config.exists():
        raise DataError(f"{where}: has no {folder.config.name}, so it is not a run folder. {remedy}")
    config, evaluations = read_json(folder.config), folder.evaluations()
    further = {name: folder.evaluations(name) for name in folder.evaluated_sets() if name != HELDOUT}
    steps = folder.steps()
    failure = folder.first_failure()
    if not steps and not evaluations:
        cause = f"It failed: {failure['message']}" if failure else "Wait for its first step."
        raise DataError(f"{where}: holds no step and no evaluation yet. {cause}")
    return RunRecord(
        name=folder.root.absolute().name,
        config=flatten(config),
        steps=steps,
        evaluations=evaluations,
        further=further,
        decisions=valid_records(read_lines(folder.curriculum)),
        samples=[record for record in read_lines(folder.samples) if _is_sample(record)],
        is_finished=folder.finished.exists(),
        failure=failure["message"] if failure else "",
    )


def default_config() -> dict[str, Any]:
    """The default of every field, by dotted name."""
    return flatten({name: plain_value(default) for name, (_, default) in all_fields().items()})


def field_meanings() -> dict[str, str]:
    """The help text of every field, by dotted name."""
    return {where: spec.metadata.get("help", "") for where, (spec, _) in all_fields().items()}


def shown(value: Any) -> str:
    """A config value as a person would type it; a schedule as its points."""
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, Mapping) and "points" in value:
        joint = " to " if value.get("interpolate") else ", then "
        return joint.join(f"{shown(number)} at step {step}" for step, number in value["points"])
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e9:
        return str(int(value))
    return json.dumps(value)
