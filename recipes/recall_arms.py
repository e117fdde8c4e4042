"""What the studies of the recall task share: arms that several ask for, tables, figures, and how sound is told from sick.

An arm's name stands for the same config in every study, since all of them make their runs in one folder.
"""

from dataclasses import replace

from megatron_distill.recipes import recall
from megatron_distill.recipes.recall import (
    LONG_TOKENS,
    MIDDLE_TOKENS,
    SHORT_TOKENS,
    distil,
    with_horizon,
    with_teacher_prefixes,
    with_weight,
)

from megatron_distill.study.design import Arm, Comparison, Group, Question, Study, StudyFigure

SEEDS = (11, 12, 13, 14, 15)
SCOPE = (
    "A student of 0.06 million parameters that is wrong about many facts learns look-ups from a teacher of 0.23 million that "
    "hesitates, the more the longer it has; responses take about 25 tokens, at most 160. The task is built so that loops feed "
    "themselves: it shows a mechanism that can yield what arXiv 2605.16826 reports of language models, and is no evidence "
    "that theirs is the same. Seeds vary the distillation; there is one teacher and one student to begin with."
)
COLUMNS = (
    *("path_avg_at_k", "peak_response_tokens", "peak_training_tokens", "low_entropy_nats"),
    *("avg_at_k", "response_tokens", "truncated_frac", "entropy_nats", "horizon_tokens"),
)
QUICK = ("num_steps=100", "save_every_steps=0", "evaluation.num_problems=100", "evaluation.every_steps=50")
QUICK_LADDER = ("curriculum.stage_steps=33",)

REVERSE_LONG = Arm("w1_long", f"w = 1, {LONG_TOKENS} tokens", with_weight(distil(), 1))
REVERSE_SHORT = Arm("w1_short", f"w = 1, {SHORT_TOKENS} tokens", with_horizon(REVERSE_LONG.config, SHORT_TOKENS))
REVERSE_MIDDLE = Arm("w1_middle", f"w = 1, {MIDDLE_TOKENS} tokens", with_horizon(REVERSE_LONG.config, MIDDLE_TOKENS))
REVERSE_GATED = Arm(
    "w1_gated",
    "w = 1, entropy-gated curriculum",
    replace(REVERSE_LONG.config, curriculum=recall.GATED),
    quick_overrides=QUICK_LADDER,
)
MIXED_LONG = Arm("w02_long", f"w = 0.2, {LONG_TOKENS} tokens", distil())
FORWARD_LONG = Arm("w0_long", f"w = 0, {LONG_TOKENS} tokens", with_weight(distil(), 0))
REVERSE_LONG_TEACHER, FORWARD_LONG_TEACHER = (
    Arm(f"{arm.name}_teacher", f"{arm.label}, teacher prefixes", with_teacher_prefixes(arm.config))
    for arm in (REVERSE_LONG, FORWARD_LONG)
)


def study_of(
    name: str,
    title: str,
    recipe: str,
    arms: tuple[Arm, ...],
    questions: tuple[Question, ...],
    quick: tuple[str, ...] = (),
    scope: str = SCOPE,
) -> Study:
    """A study of this task, with its seeds; ``recipe`` is its function, ``quick`` the arms of a quick look, by default all."""
    return Study(
        name=name,
        title=title,
        scope=scope,
        command=f"megatron-distill study {recipe} --dir runs/study-recall",
        arms=arms,
        seeds=SEEDS,
        questions=questions,
        quick_arms=quick or tuple(arm.name for arm in arms),
        quick_overrides=QUICK,
    )


def labels(*arms: Arm) -> dict[str, str]:
    """The arms of a question as it names them: by their own labels."""
    return {arm.name: arm.label for arm in arms}


def over_steps(name: str, title: str) -> StudyFigure:
    """Accuracy, length and entropy of the evaluations on the way."""
    return StudyFigure(f"{name}_steps", title, "path", ("avg_at_k", "response_tokens", "entropy_nats"))


def divergences(name: str) -> StudyFigure:
    """What the loss shows of it in training: a low reverse KL is no sign of health."""
    metrics = ("reverse_kl_nats", "student_entropy_nats", "response_tokens")
    return StudyFigure(f"{name}_training", "Reverse KL, entropy and length in training", "curves", metrics)


def remedied(name: str, remedy: Arm, without: Arm, title: str = "Remedy: entropy-gated length curriculum") -> Question:
    """Whether an arm with a remedy stayed sounder than the one without."""
    better, worse = Group.of(remedy), Group.of(without)
    return Question(
        title=title,
        claim=f"More accurate on the way, with shorter responses and more entropy: {remedy.label}, against {without.label}.",
        arms=labels(without, remedy),
        columns=COLUMNS,
        figures=(over_steps(name, title),),
        comparisons=healthier(better, worse),
    )


def healthier(sound: Group, sick: Group) -> tuple[Comparison, ...]:
    """That one did not run away and the other did, at any evaluation: what ran away may have come back by the last step."""
    return (
        Comparison("peak_response_tokens", sick, sound),
        Comparison("low_entropy_nats", sound, sick),
        Comparison("path_avg_at_k", sound, sick),
    )
