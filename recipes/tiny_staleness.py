"""What stale rollouts cost on the quickstart's task, and what they save.

megatron-distill study tiny_staleness.study --dir runs/study-tiny      # 24 runs of about 2 minutes; shares arms with tiny.study
"""

from dataclasses import replace

from megatron_distill.recipes import tiny

from megatron_distill.config import RunConfig
from megatron_distill.study.design import Arm, Comparison, Group, Question, Study, StudyFigure

STALE_STEPS = (1, 2, 4)


def study() -> Study:
    """Student prefixes under each direction of the KL, by weights that are 0, 1, up to 2 and up to 4 steps old; three seeds."""
    questions, arms = [], []
    for direction, weight in (("forward", 0.0), ("reverse", 1.0)):
        fresh = Arm(f"student_{direction}", f"{direction} KL, staleness 0", tiny.study_run(weight))
        stale = [
            Arm(f"{fresh.name}_stale_{steps}", f"{direction} KL, staleness {steps}", _stale(fresh.config, steps))
            for steps in STALE_STEPS
        ]
        arms += [fresh, *stale]
        questions.append(_question(direction, fresh, stale))
    return Study(
        name="tiny-staleness",
        title="Stale rollouts, on chained arithmetic",
        scope=tiny.SCOPE,
        command="megatron-distill study tiny_staleness.study --dir runs/study-tiny",
        arms=tuple(arms),
        seeds=tiny.STUDY_SEEDS,
        questions=tuple(questions),
        quick_arms=("student_reverse", "student_reverse_stale_1", "student_reverse_stale_4"),
        quick_overrides=tiny.QUICK,
    )


def _stale(config: RunConfig, steps: int) -> RunConfig:
    return replace(config, rollouts=replace(config.rollouts, max_staleness_steps=steps))


def _question(direction: str, fresh: Arm, stale: list[Arm]) -> Question:
    return Question(
        title=f"Staleness under {direction} KL",
        claim="Fresh rollouts teach more than stale ones.",
        arms={arm.name: arm.label for arm in (fresh, *stale)},
        columns=("avg_at_k", "pass_at_k", "entropy_nats", "response_tokens", "seconds"),
        figures=(
            StudyFigure(
                f"staleness_{direction}",
                "Held-out accuracy, length and entropy over training",
                "path",
                ("avg_at_k", "response_tokens", "entropy_nats"),
            ),
        ),
        comparisons=tuple(
            Comparison("avg_at_k", Group.of(fresh, label="staleness 0"), Group.of(arm, label=f"staleness {steps}"))
            for steps, arm in zip(STALE_STEPS, stale, strict=True)
        ),
    )
