"""What a study has measured so far: one small file, from which every table, figure and sentence can be made again.

``Results`` hold per run its evaluations with what they had cost until then, and a few training metrics, down-sampled (see
``run_results``). They are kept as ``results.json``, which holds no path and no response, so that it can be committed beside the
command that made it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from megatron_distill.config.json_files import write_whole
from megatron_distill.errors import DataError
from megatron_distill.runs.run_folder import finite_or_none, read_json
from megatron_distill.study.design import Comparison, Group, Question, StudyFigure

_ROUNDING = 1e-9
"""Of the mean: a smaller standard deviation over seeds is what fp64 leaves of equal numbers."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95% interval.

    Attributes:
        mean: nan without a seed.
        low: lower end; nan with fewer than two seeds; the mean where all seeds agree.
        high: upper end.
        num_seeds: behind it.
    """

    mean: float
    low: float
    high: float
    num_seeds: int

    @property
    def p_value(self) -> float:
        """How often chance makes a mean this far from 0 where the true one is 0, by Student's t; nan where nothing tells how
        chance moves it: with fewer than two seeds, or where all agree on something else than 0."""
        if self.num_seeds < 2:
            return math.nan
        half, freedom = (self.high - self.low) / 2, self.num_seeds - 1
        if half == 0:
            return 1.0 if self.mean == 0 else math.nan
        return float(2 * student_t.sf(abs(self.mean) / half * student_t.ppf(0.975, freedom), freedom))

    def shown(self, form: str) -> str:
        """E.g. ``0.81 [0.79, 0.83]``; the mean alone where there is one seed or all agree; "-" where there is nothing."""
        if not self.num_seeds:
            return "-"
        if self.num_seeds == 1 or self.low == self.high:
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def overlaps(self, other: "Interval") -> bool:
        """Whether two intervals share a value."""
        return self.low <= other.high and other.low <= self.high


def over_seeds(values: Iterable[float]) -> Interval:
    """Mean and 95% t-interval, ``mean +- t(n - 1) * s / sqrt(n)``; what is not finite is left out. Where s is rounding alone,
    all seeds agree, and the interval is the mean.

    It tells how far another seed's training and sampling could move the mean. The held-out problems are the same for all
    seeds, so what another set of problems would change is not in it.
    """
    finite = np.array([value for value in values if math.isfinite(value)])
    n = len(finite)
    mean = float(finite.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    spread = float(finite.std(ddof=1))
    if spread <= _ROUNDING * abs(mean):
        return Interval(mean, mean, mean, n)
    half = float(student_t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class RunResult:
    """A finished run in numbers.

    Attributes:
        arm: its name.
        seed: the run's seed, which pairs it with runs of other arms.
        evaluations: in step order: "step", "k", "num_problems", and every measure.
        curves: "step" and the training metrics, down-sampled, nan where not measured.
        environment: where in ``Results.environments`` stands what made it.
    """

    arm: str
    seed: int
    evaluations: list[dict[str, float]]
    curves: dict[str, list[float]]
    environment: int = 0


@dataclass(frozen=True)
class ArmFacts:
    """An arm as the results file keeps it.

    Attributes:
        label: in the table of settings.
        after: the arm whose student it goes on with, or empty.
        settings: dotted field -> value, of the fields that differ between arms, as far as this arm has them (a curriculum of
            another kind has others).
    """

    label: str
    after: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Results:
    """All that a study's tables, figures and sentences are made from.

    Attributes:
        title: the heading of the study's page.
        scope: what was trained on what, and how far that carries.
        command: what repeats it.
        seeds: planned.
        arms: name -> facts, in the study's order.
        questions: what the study asked, as it was designed.
        common: dotted field -> value, of the fields that all arms share; no paths.
        environments: code, versions and hardware that made the runs, each kind once.
        runs: finished ones.
    """

    title: str
    scope: str
    command: str
    seeds: list[int]
    arms: dict[str, ArmFacts]
    questions: list[Question]
    common: dict[str, Any]
    environments: list[dict[str, Any]]
    runs: list[RunResult]

    def runs_of(self, arm: str) -> list[RunResult]:
        """The finished runs of an arm, in the order of their seeds."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    def final(self, arm: str, measure: str) -> dict[int, float]:
        """{seed: a measure at the run's last evaluation}."""
        return {run.seed: run.evaluations[-1][measure] for run in self.runs_of(arm)}

    def of_group(self, group: Group, measure: str) -> dict[int, float]:
        """{seed: a measure's mean over the group's arms} of the seeds for which all of them have finished."""
        by_arm = [self.final(arm, measure) for arm in group.arms]
        shared = sorted(set.intersection(*(set(values) for values in by_arm)))
        return {seed: float(np.mean([values[seed] for values in by_arm])) for seed in shared}


# --- the file ---------------------------------------------------------------------------------------------------------


def save(results: Results, path: Path) -> None:
    """Write the results, a run a line."""
    plain = finite_or_none(asdict(results))
    runs = ",\n  ".join(json.dumps(run) for run in plain.pop("runs"))
    head = json.dumps(plain, indent=1).removesuffix("\n}")
    write_whole(path, f'{head},\n "runs": [\n  {runs}\n ]\n}}\n'.encode())


def load(path: Path) -> Results:
    """Read what ``save`` wrote, today or when it kept the environment of the first run alone.

    Raises:
        DataError: if the file is missing or holds something else.
    """
    try:
        plain = read_json(path)
        if "environment" in plain:
            plain["environments"] = [plain.pop("environment")]
        arms = {name: ArmFacts(**facts) for name, facts in plain["arms"].items()}
        questions = [_question(question) for question in plain["questions"]]
        runs = [
            RunResult(
                run["arm"],
                run["seed"],
                [{name: _number(value) for name, value in one.items()} for one in run["evaluations"]],
                {name: [_number(value) for value in values] for name, values in run["curves"].items()},
                run.get("environment", 0),
            )
            for run in plain["runs"]
        ]
        return Results(**plain | {"arms": arms, "questions": questions, "runs": runs})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"results = {path}: not a study's results ({type(error).__name__}: {error}). Name the results.json that "
            "`megatron-distill study` wrote."
        ) from error


def _question(plain: Mapping[str, Any]) -> Question:
    def group(one: Mapping[str, Any]) -> Group:
        return Group(one["label"], tuple(one["arms"]))

    return Question(
        title=plain["title"],
        claim=plain["claim"],
        arms=dict(plain["arms"]),
        columns=tuple(plain["columns"]),
        figures=tuple(StudyFigure(**one | {"y": tuple(one["y"])}) for one in plain["figures"]),
        comparisons=tuple(
            Comparison(one["measure"], group(one["greater"]), group(one["lesser"])) for one in plain["comparisons"]
        ),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
