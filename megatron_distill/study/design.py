"""What a study is: arms that differ in what is asked about, seeds that each arm is repeated with, questions to the numbers.

In: a function in ``recipes/`` that returns a ``Study``. Out: plain values that ``study.run`` follows and the results
file repeats, so that tables, figures and verdicts can be made again without the recipe. Importing this starts nothing.

    Study ── arms: Arm (a run's config), ...      each is run once for every seed, however many questions ask for it
          └─ questions: Question ── claim          what is said to hold, in words
                                 ├─ comparisons    the same in numbers: each is judged by itself
                                 ├─ columns        measures of its table
                                 └─ figures
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig, flatten
from megatron_distill.errors import ConfigError


@dataclass(frozen=True)
class Measure:
    """A number of a run, taken at an evaluation.

    Attributes:
        label: in tables and on axes, with the unit.
        form: format spec.
        meaning: for the notes below the tables.
    """

    label: str
    form: str
    meaning: str


MEASURES: dict[str, Measure] = {
    "avg_at_k": Measure("Avg@k", ".3f", "mean accuracy over samples and held-out problems, judged by math-verify"),
    "pass_at_k": Measure("Pass@k", ".3f", "share of held-out problems that any of the k samples solves"),
    "gain_avg_at_k": Measure("Avg@k gained", "+.3f", "Avg@k at the end less Avg@k at the start of the same run"),
    "entropy_nats": Measure(
        "entropy, nats", ".3f", "predictive entropy per token of the student's own held-out responses"
    ),
    "response_tokens": Measure("length, tokens", ".1f", "mean length of held-out responses"),
    "truncated_frac": Measure("truncated", ".3f", "share of held-out responses cut at the evaluation's cap"),
    "path_avg_at_k": Measure("Avg@k on the way", ".3f", "mean of Avg@k over the evaluations after the first"),
    "peak_response_tokens": Measure(
        "longest, tokens", ".1f", "largest mean length of held-out responses at an evaluation after the first"
    ),
    "low_entropy_nats": Measure(
        "lowest entropy, nats", ".3f", "smallest predictive entropy at an evaluation after the first"
    ),
    "peak_training_tokens": Measure(
        "longest in training, tokens",
        ".1f",
        "largest mean length of training responses over a stretch of steps (a fortieth of the run), which sees what comes and "
        "goes between two evaluations; where the teacher writes they are the teacher's",
    ),
    "horizon_tokens": Measure("horizon, tokens", ".0f", "cap on response length in the last training step"),
    "student_tokens": Measure("tokens by student", ",.0f", "tokens that the student sampled for training"),
    "teacher_tokens": Measure("tokens by teacher", ",.0f", "tokens that the teacher sampled for training"),
    "sampled_tokens": Measure("sampled tokens", ",.0f", "tokens that student and teacher sampled for training"),
    "seconds": Measure("time in steps, s", ",.0f", "seconds in training steps; neither start-up nor evaluation"),
    "reuse_seconds": Measure(
        "time if kept, s",
        ",.0f",
        "the same without sampling and scoring of responses that the teacher wrote: they do not depend on the student, so "
        "teacher.cache_dir can keep them from an earlier run",
    ),
}
"""Everything that a table or a comparison can name, and a figure of any kind but "curves"."""

CURVES = (
    "forward_kl_nats",
    "reverse_kl_nats",
    "student_entropy_nats",
    "response_tokens",
    "truncated_frac",
    "horizon_tokens",
    "reward",
)
"""The training metrics that are kept of a run, for figures of kind "curves"."""

Kind = Literal["scatter", "path", "dose", "curves", "hand_off"]


@dataclass(frozen=True)
class StudyFigure:
    """One figure of a question, with what stands on its axes.

    Attributes:
        name: of the file, without its suffix.
        title: above it.
        kind: scatter: one point an arm, ``y[0]`` against ``x``, at the end; path: an arm's evaluations joined, each of ``y``
            against ``x``; dose: each of ``y`` at the end against the config field ``x``; curves: training metrics ``y`` over
            the steps; hand_off: each of ``y`` before distillation, before RL and after RL.
        y: measures, one for "scatter"; for "curves", names of ``CURVES``.
        x: a measure, "step", or for "dose" a config field that is a number, and not the same in all arms of the study.
    """

    name: str
    title: str
    kind: Kind
    y: tuple[str, ...]
    x: str = "step"


@dataclass(frozen=True)
class Group:
    """Arms whose mean stands on one side of a comparison.

    Attributes:
        label: in sentences.
        arms: their names, at least one.
    """

    label: str
    arms: tuple[str, ...]

    @classmethod
    def of(cls, *arms: "Arm", label: str = "") -> "Group":
        """These arms, under the first one's label if it is given none."""
        return cls(label or arms[0].label, tuple(arm.name for arm in arms))


@dataclass(frozen=True)
class Comparison:
    """One thing that a claim says of the numbers: a measure is greater in one group of arms than in another, without an arm in
    common."""

    measure: str
    greater: Group
    lesser: Group

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm that it needs."""
        return self.greater.arms + self.lesser.arms


@dataclass(frozen=True)
class Question:
    """Something to be learnt from several arms.

    Attributes:
        title: heading, e.g. "KL direction: accuracy against entropy".
        claim: what is said to hold, one sentence, without a verdict.
        arms: name -> label in this question: the rows of its table, and what its figures show.
        columns: measures of its table.
        figures: what is drawn for the question.
        comparisons: the claim in numbers.
    """

    title: str
    claim: str
    arms: dict[str, str]
    columns: tuple[str, ...]
    figures: tuple[StudyFigure, ...]
    comparisons: tuple[Comparison, ...]

    def without(self, missing: set[str]) -> "Question":
        """The same question to fewer arms: comparisons that need a missing one are not made."""
        return replace(
            self,
            arms={arm: label for arm, label in self.arms.items() if arm not in missing},
            comparisons=tuple(one for one in self.comparisons if not missing & set(one.arms)),
        )


@dataclass(frozen=True)
class Arm:
    """One setting of the study.

    Attributes:
        name: of its folder, ``runs/NAME``.
        label: in the table of settings.
        config: of its runs; name and seed are set for each.
        after: an earlier arm, whose student of the same seed this one goes on with; empty: the config's own.
        quick_overrides: of this arm, beside the study's.
    """

    name: str
    label: str
    config: RunConfig
    after: str = ""
    quick_overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """Arms, seeds and questions.

    Attributes:
        name: of the study's folder.
        title: the heading of its page.
        scope: what was trained on what, and how far that carries; stands above the results.
        command: what to type to repeat it.
        arms: in the order in which a seed's runs are made.
        seeds: of the repetitions; intervals are taken over them.
        questions: in the order of the page.
        quick_arms: the arms of ``quick``.
        quick_overrides: ``section.field=value`` that shorten the runs of ``quick``.
        runs: folder of the runs, in the one that the study is given.
    """

    name: str
    title: str
    scope: str
    command: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    questions: tuple[Question, ...]
    quick_arms: tuple[str, ...]
    quick_overrides: tuple[str, ...]
    runs: str = "runs"

    def quick(self) -> "Study":
        """A look at the study within minutes: its first seed, few arms, short runs, kept apart from the whole ones. It judges
        nothing."""
        kept = tuple(
            replace(arm, config=config_module.with_overrides(arm.config, (*self.quick_overrides, *arm.quick_overrides)))
            for arm in self.arms
            if arm.name in self.quick_arms
        )
        missing = {arm.name for arm in self.arms} - {arm.name for arm in kept}
        fewer = (question.without(missing) for question in self.questions)
        return replace(
            self,
            name=f"{self.name}-quick",
            title=f"{self.title} (quick look)",
            command=f"{self.command} --quick",
            arms=kept,
            seeds=self.seeds[:1],
            questions=tuple(question for question in fewer if len(question.arms) > 1),
            runs=f"{self.runs}-quick",
        )


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted fields that say what a run is: neither its name and seed nor this machine's paths. Of a model's path, and of a
    function's file, the last component is kept, which tells arms apart."""
    own, models = ("name", "seed"), ("student.path", "teacher.path")
    return {
        field: Path(value).name if field in models else _without_folder(value)
        for field, value in flatten(config).items()
        if field in models or not (field in own or field.endswith(("path", "_dir")))
    }


def _without_folder(value: Any) -> Any:
    """A config's value, with ``file.py:function`` for every ``/folder/file.py:function``."""
    if isinstance(value, list | tuple):
        return [_without_folder(item) for item in value]
    return value.rpartition("/")[2] if isinstance(value, str) and ".py:" in value else value


def check_study(study: Study) -> None:
    """Check that the study hangs together, that its figures can be drawn, and that every run's config is sound.

    Raises:
        ConfigError: listing all problems at once.
    """
    names = [arm.name for arm in study.arms]
    problems = [f"study.arms = {name!r}: named twice. Rename one." for name, n in Counter(names).items() if n > 1]
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        problems.append(f"study.seeds = {study.seeds}: must hold different seeds, at least one, e.g. (1, 2, 3).")
    for index, arm in enumerate(study.arms):
        if arm.after and arm.after not in names[:index]:
            problems.append(
                f"study.arms[{arm.name}].after = {arm.after!r}: must be an arm before it, whose student it goes on with. "
                f"Before it: {', '.join(names[:index]) or 'none'}."
            )
        problems += [f"study.arms[{arm.name}]: {problem}" for problem in config_module.problems_of(arm.config)]
    settings = {arm.name: settings_of(config_module.to_dict(arm.config)) for arm in study.arms}
    for question in study.questions:
        where = f"study.questions[{question.title}]"
        problems += [f"{where} = {problem}" for problem in _unknown(question, names)]
        problems += [f"{where}.{problem}" for problem in _unclear_sides(question)]
        for figure in question.figures:
            unclear = _unclear_axes(figure)
            if figure.kind == "dose":
                unclear += _unclear_dose(figure.x, question, settings)
            problems += [f"{where}.figures[{figure.name}].{problem}" for problem in unclear]
    if problems:
        raise ConfigError("\n".join(problems))


def _unknown(question: Question, arms: list[str]) -> list[str]:
    asked = (*question.arms, *(arm for one in question.comparisons for arm in one.arms))
    measures = (*question.columns, *(one.measure for one in question.comparisons))
    return [
        *(f"{arm!r}: no such arm. Known: {', '.join(arms)}." for arm in dict.fromkeys(asked) if arm not in arms),
        *(
            f"{m!r}: no such measure. Known: {', '.join(MEASURES)}."
            for m in dict.fromkeys(measures)
            if m not in MEASURES
        ),
    ]


def _unclear_sides(question: Question) -> list[str]:
    """Comparisons in which not every side has arms, each of them once."""
    return [
        f"comparisons[{one.measure}: {one.greater.label} > {one.lesser.label}] = {one.greater.arms} > {one.lesser.arms}: each "
        "side must have arms, and none may come twice. An arm says nothing against itself. Name other arms."
        for one in question.comparisons
        if not one.greater.arms or not one.lesser.arms or len(set(one.arms)) < len(one.arms)
    ]


def _unclear_axes(figure: StudyFigure) -> list[str]:
    """What a figure cannot be drawn with, but for a dose's config field."""
    of_y = CURVES if figure.kind == "curves" else tuple(MEASURES)
    of_x = (figure.x,) if figure.kind == "dose" else (*MEASURES, *(("step",) if figure.kind != "scatter" else ()))
    problems = [
        f"{axis} = {name!r}: no such thing is kept of a run for a figure of kind {figure.kind!r}. Known: {', '.join(known)}."
        for axis, names, known in (("x", (figure.x,), of_x), ("y", figure.y, of_y))
        for name in names
        if name not in known
    ]
    if not figure.y or (figure.kind == "scatter" and len(figure.y) > 1):
        number = "one" if figure.kind == "scatter" else "at least one"
        problems.append(f"y = {figure.y}: a figure of kind {figure.kind!r} shows {number}. Name it in a tuple.")
    return problems


def _unclear_dose(field: str, question: Question, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why a config field is no x axis, given those of all arms."""
    remedy = (
        "Name a config field (docs/config.md) that is a number in each of the question's arms and differs between arms."
    )
    for arm in question.arms:
        if arm in settings and not isinstance(settings[arm].get(field), int | float):
            return [f"x = {field!r}: is {settings[arm].get(field, 'not there')!r} in arm {arm!r}. {remedy}"]
    first, *others = (one.get(field) for one in settings.values())
    return [] if any(other != first for other in others) else [f"x = {field!r}: is {first!r} in all arms. {remedy}"]
