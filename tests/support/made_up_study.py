"""A small study and its runs, without training: numbers that depend on the seed and on the arm."""

from dataclasses import replace
from typing import Any, TextIO

import numpy as np
from megatron_distill.recipes import tiny

from megatron_distill.config import DistillConfig, RunConfig
from megatron_distill.config.schedules import constant
from megatron_distill.runs.run_folder import RunFolder, write_json
from megatron_distill.study.design import CURVES, Arm, Comparison, Group, Question, Study, StudyFigure
from megatron_distill.study.results import ArmFacts, Results, RunResult
from tests.support.made_up import leave_finished_run

NUM_STEPS = 6
EVERY_STEPS = 3


def made_up_run(config: RunConfig, folder: RunFolder, out: TextIO | None = None, accuracy: float = 0.5) -> None:
    """A finished run's folder as training leaves it, with numbers that depend on the seed and the accuracy."""
    rng = np.random.default_rng((config.seed, round(100 * accuracy)))
    share = config.rollouts.student_prefix_frac.at(0)
    metrics = []
    for step in range(1, config.num_steps + 1):
        record = {name: float(rng.uniform(0.1, 1.0)) for name in CURVES}
        times = {"step_s": 3.0, "rollout_s": 2.0, "score_s": 0.5}
        metrics.append(record | times | {"step": step, "response_tokens": 60.0, "student_prefix_frac": share})
    evaluations = {}
    every_steps = config.evaluation.every_steps or config.num_steps
    for step in sorted({*range(0, config.num_steps, every_steps), config.num_steps}):
        avg = 0.3 + (accuracy - 0.3) * step / config.num_steps + float(rng.normal(0, 0.005))
        evaluations[step] = {"avg_at_k": avg, "pass_at_k": avg + 0.2}
    leave_finished_run(config, folder, evaluations, metrics)
    write_json(folder.root / "env.json", {"python": "3.12", "cpus": 2, "packages": {"torch": "2", "apex": None}})


def arm(name: str, weight: float, **changes: Any) -> Arm:
    base = tiny.quickstart()
    config = replace(
        base,
        num_steps=NUM_STEPS,
        distill=DistillConfig(reverse_kl_weight=constant(weight)),
        evaluation=replace(base.evaluation, every_steps=EVERY_STEPS),
    )
    return Arm(name, f"the {name} | arm", config, **changes)


def small_study(draw: bool = False, **changes: Any) -> Study:
    """Two arms and one that goes on from the first; if drawn, with every kind of figure, which is what takes the time."""
    arms = (arm("low", 0.0), arm("high", 1.0), arm("then", 0.5, after="low"))
    figures = (
        StudyFigure("scatter", "scatter", "scatter", ("avg_at_k",), "entropy_nats"),
        StudyFigure("path", "path", "path", ("avg_at_k", "entropy_nats"), "seconds"),
        StudyFigure("dose", "dose", "dose", ("avg_at_k",), "distill.reverse_kl_weight"),
        StudyFigure("curves", "curves", "curves", ("horizon_tokens", "reward")),
        StudyFigure("hand_off", "hand-off", "hand_off", ("avg_at_k",)),
    )
    question = Question(
        "High or low",
        "High is more accurate <than> low.",
        {one.name: one.label for one in arms},
        ("avg_at_k", "gain_avg_at_k", "seconds", "reuse_seconds", "student_tokens", "teacher_tokens"),
        figures if draw else (),
        (Comparison("avg_at_k", Group("high", ("high",)), Group("low", ("low",))),),
    )
    study = Study(
        "s",
        "A study",
        "Of made-up numbers.",
        "megatron-distill study x.s",
        arms,
        (1, 2, 3),
        (question,),
        ("low", "high"),
        (),
    )
    return replace(study, **changes)


class MadeUpRuns(list[tuple[str, int]]):
    """In place of training: makes up a run when called, and lists the arm and seed of those that it made."""

    def __call__(self, config: RunConfig, folder: RunFolder, out: TextIO) -> None:
        name = folder.root.parent.name
        print("a step", file=out)
        made_up_run(config, folder, accuracy=0.8 if name == "high" else 0.5)
        self.append((name, config.seed))


def results_of(values: dict[str, list[float]]) -> Results:
    """Results in which ``avg_at_k`` of each arm takes the given values over seeds 1, 2, ..."""
    runs = [
        RunResult(name, seed, [{"step": 0.0, "avg_at_k": value}], {})
        for name, numbers in values.items()
        for seed, value in enumerate(numbers, 1)
    ]
    arms = {name: ArmFacts(name, "", {}) for name in values}
    return Results("t", "s", "c", [1, 2, 3], arms, [], {}, [], runs)


HIGH_ABOVE_LOW = Comparison("avg_at_k", Group("high", ("high",)), Group("low", ("low",)))
