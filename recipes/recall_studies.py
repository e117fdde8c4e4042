"""Studies on the recall task: where reverse KL over long responses runs away, what stops it, and what it does not depend on.

    megatron-distill study recall_studies.runaway --dir runs/study-recall           # or any other name below
    megatron-distill study recall_studies.runaway --dir runs/study-recall --quick   # minutes, one seed: a look

All of them share the folder, also with ``recall_open_questions``, so that an arm which several ask for is made once. Written
down before their confirming runs: hypotheses (each question's claim and comparisons), settings (``recall``), what is judged
(all evaluations on the way, or the last one) and seeds. The settings were looked for with seeds of 100 and more, in which what
runs away mostly came back within 200 steps. Since then claims were cut down to what their comparisons test: "does not run away"
to "runs away less", and, of what another page teaches in `recall_open_questions.open_book`, "nothing" to "less".

`runaway` asks whether it happens and what prevents it; `controls` which of its ingredients it needs; `design_space` where
among prefix sources and between the directions of the KL it happens; `gate` what the entropy gate adds to a ladder; `hand_off`
what RL makes of each student.
"""

from dataclasses import replace
from itertools import pairwise

from megatron_distill.recipes import recall
from megatron_distill.recipes.recall import LONG_TOKENS, by_sequence, distil, with_flat_teacher, with_weight
from megatron_distill.recipes.recall_arms import (
    COLUMNS,
    FORWARD_LONG,
    FORWARD_LONG_TEACHER,
    MIXED_LONG,
    QUICK_LADDER,
    REVERSE_GATED,
    REVERSE_LONG,
    REVERSE_LONG_TEACHER,
    REVERSE_MIDDLE,
    REVERSE_SHORT,
    divergences,
    healthier,
    labels,
    over_steps,
    remedied,
    study_of,
)

from megatron_distill.study.design import Arm, Comparison, Group, Question, Study, StudyFigure


def runaway() -> Study:
    """Weight of reverse KL, and horizon: which runs run away, and both remedies."""
    arms = (REVERSE_LONG, REVERSE_SHORT, REVERSE_GATED, MIXED_LONG, FORWARD_LONG)
    long, mix = Group.of(REVERSE_LONG, label="w = 1, long"), Group.of(MIXED_LONG, label="w = 0.2, long")
    forward = Group.of(FORWARD_LONG, label="w = 0, long")
    short = Group.of(REVERSE_SHORT, label="w = 1, short")
    length = Question(
        title="Training length under reverse KL: accuracy against stability",
        claim="Over a long horizon reverse KL runs away: on the way its responses are longer, its entropy is lower and it is "
        "less accurate than over a short one.",
        arms=labels(REVERSE_LONG, REVERSE_SHORT, REVERSE_GATED),
        columns=COLUMNS,
        figures=(over_steps("length", "Held-out accuracy, length and entropy over training"), divergences("length")),
        comparisons=healthier(short, long),
    )
    settled = Question(
        title="Training length under reverse KL: at the end",
        claim="What ran away has not come back by the last step: it is longer, with less entropy, and less accurate.",
        arms=labels(REVERSE_LONG, REVERSE_SHORT),
        columns=COLUMNS,
        figures=(),
        comparisons=(
            Comparison("response_tokens", long, short),
            Comparison("entropy_nats", short, long),
            Comparison("avg_at_k", short, long),
        ),
    )
    mixing = Question(
        title="Remedy: KL mixing",
        claim="Over the long horizon mostly forward KL (w = 0.2) runs away less, and is more accurate on the way than either "
        "end.",
        arms=labels(REVERSE_LONG, MIXED_LONG, FORWARD_LONG),
        columns=COLUMNS,
        figures=(over_steps("mixing", "Held-out accuracy, length and entropy over training"), divergences("mixing")),
        comparisons=(*healthier(mix, long), Comparison("path_avg_at_k", mix, forward)),
    )
    return study_of(
        "recall-runaway",
        "Reverse KL that runs away",
        "recall_studies.runaway",
        arms,
        (length, settled, mixing, remedied("curriculum", REVERSE_GATED, REVERSE_LONG)),
    )


def controls() -> Study:
    """Which ingredients the runaway needs: the rising hazard, the learning rate, the student's own prefixes, the weight of long
    responses, the dose."""
    flat = Arm("w1_long_flat", "w = 1, long, flat teacher", with_flat_teacher(REVERSE_LONG.config))
    slow_optimizer = replace(REVERSE_LONG.config.optimizer, lr=recall.LR * 0.4)
    slow = Arm("w1_long_slow", "w = 1, long, lr 4e-4", replace(REVERSE_LONG.config, optimizer=slow_optimizer))
    mean = Arm("w1_long_by_sequence", "w = 1, long, mean per response", by_sequence(REVERSE_LONG.config))
    long = Group.of(REVERSE_LONG, label="w = 1, long")
    needs = tuple(
        Question(
            title=title,
            claim=claim,
            arms=labels(REVERSE_LONG, arm),
            columns=COLUMNS,
            figures=(over_steps(arm.name, title),),
            comparisons=healthier(Group.of(arm), long),
        )
        for arm, title, claim in (
            (
                flat,
                "Needs a hazard that rises",
                "Under a teacher whose hesitation does not feed itself it runs away less.",
            ),
            (slow, "Depends on the learning rate", "At 0.4 of the learning rate it runs away less."),
            (REVERSE_LONG_TEACHER, "Needs the student's prefixes", "At the teacher's prefixes it runs away less."),
            (
                mean,
                "Needs a mean over tokens",
                "Where a response that loops weighs no more than one that answers, it runs away less.",
            ),
        )
    )
    dose = Question(
        title="Dose: horizon",
        claim="The middle horizon lies between: shorter responses than the long one, longer than the short one.",
        arms=labels(REVERSE_SHORT, REVERSE_MIDDLE, REVERSE_LONG),
        columns=COLUMNS,
        figures=(
            StudyFigure(
                "dose",
                "Against the horizon",
                "dose",
                ("path_avg_at_k", "peak_response_tokens"),
                "curriculum.horizon_tokens",
            ),
        ),
        comparisons=(
            Comparison("peak_response_tokens", long, Group.of(REVERSE_MIDDLE, label="middle")),
            Comparison(
                "peak_response_tokens", Group.of(REVERSE_MIDDLE, label="middle"), Group.of(REVERSE_SHORT, label="short")
            ),
        ),
    )
    return study_of(
        "recall-controls",
        "What the runaway needs",
        "recall_studies.controls",
        (REVERSE_LONG, REVERSE_SHORT, REVERSE_MIDDLE, flat, slow, REVERSE_LONG_TEACHER, mean),
        (*needs, dose),
    )


def design_space() -> Study:
    """{teacher, student} prefixes x {forward, reverse} KL over the long horizon, and the weights between the directions.

    Asked last: of its arms all but w = 0.5 and 0.8 had been made for other studies, and three seeds of them looked at."""
    half, most = (
        Arm(f"w0{tenths}_long", f"w = 0.{tenths}, {LONG_TOKENS} tokens", with_weight(distil(), tenths / 10))
        for tenths in (5, 8)
    )
    by_weight = (FORWARD_LONG, MIXED_LONG, half, most, REVERSE_LONG)
    reverse, forward, reverse_teacher, forward_teacher = (
        Group.of(arm) for arm in (REVERSE_LONG, FORWARD_LONG, REVERSE_LONG_TEACHER, FORWARD_LONG_TEACHER)
    )
    prefixes = Question(
        title="Prefix source and direction",
        claim="Of the four reverse KL at the student's prefixes runs away the furthest; at the teacher's, reverse KL is more "
        "accurate and forward KL keeps more entropy; under forward KL the student's prefixes are the more accurate.",
        arms=labels(FORWARD_LONG_TEACHER, REVERSE_LONG_TEACHER, FORWARD_LONG, REVERSE_LONG),
        columns=(*COLUMNS, "seconds", "reuse_seconds"),
        figures=(
            over_steps("design_space", "Over training"),
            StudyFigure(
                "plane", "Accuracy against entropy, on the way", "scatter", ("path_avg_at_k",), "low_entropy_nats"
            ),
        ),
        comparisons=(
            *(one for sound in (forward, reverse_teacher, forward_teacher) for one in healthier(sound, reverse)),
            Comparison("path_avg_at_k", reverse_teacher, forward_teacher),
            Comparison("entropy_nats", forward_teacher, reverse_teacher),
            Comparison("path_avg_at_k", forward, forward_teacher),
        ),
    )
    weight = Question(
        title="Weight of reverse KL",
        claim="The more reverse KL, the longer the longest responses, the lower the entropy and, from w = 0.2 on, the accuracy "
        "on the way.",
        arms=labels(*by_weight),
        columns=COLUMNS,
        figures=(
            over_steps("weight", "Over training"),
            StudyFigure(
                "weight_dose",
                "Against the weight of reverse KL",
                "dose",
                ("path_avg_at_k", "peak_response_tokens", "low_entropy_nats"),
                "distill.reverse_kl_weight",
            ),
        ),
        comparisons=(
            *(one for less, more in pairwise(by_weight[1:]) for one in healthier(Group.of(less), Group.of(more))),
            Comparison("path_avg_at_k", Group.of(MIXED_LONG), forward),
        ),
    )
    return study_of(
        "recall-design-space",
        "Prefixes, directions and the weights between",
        "recall_studies.design_space",
        (*by_weight, REVERSE_LONG_TEACHER, FORWARD_LONG_TEACHER),
        (prefixes, weight),
        quick=(FORWARD_LONG.name, half.name, REVERSE_LONG.name, REVERSE_LONG_TEACHER.name),
    )


def gate() -> Study:
    """The entropy gate against ladders without one, at a pace that is safe and at one that is not."""
    paced = {
        "w1_ladder": ("w = 1, ladder", recall.LADDER),
        "w1_hasty_ladder": ("w = 1, hasty ladder", recall.HASTY_LADDER),
        "w1_hasty_gated": ("w = 1, hasty, gated", recall.HASTY_GATED),
        "w1_progressive": ("w = 1, progressive", recall.PROGRESSIVE),
    }
    ladder, hasty, hasty_gated, progressive = (
        Arm(name, label, replace(REVERSE_LONG.config, curriculum=curriculum))
        for name, (label, curriculum) in paced.items()
    )
    return study_of(
        "recall-gate",
        "What the entropy gate adds",
        "recall_studies.gate",
        (REVERSE_LONG, REVERSE_GATED, replace(ladder, quick_overrides=QUICK_LADDER), hasty, hasty_gated, progressive),
        (
            remedied("gate_hasty", hasty_gated, hasty, "The gate saves a ladder that is climbed too fast"),
            remedied("gate_paced", REVERSE_GATED, ladder, "The gate at a ladder's own pace"),
            remedied("gate_progressive", REVERSE_GATED, progressive, "Gated against progressive"),
            remedied("gate_fixed", REVERSE_GATED, REVERSE_LONG, "Gated against fixed"),
        ),
    )


def hand_off() -> Study:
    """GRPO from what each distillation left, and from the untaught student."""
    before = (REVERSE_SHORT, MIXED_LONG, FORWARD_LONG)
    rl = recall.grpo()
    alone = Arm("rl_alone", "RL alone", rl)
    after = tuple(Arm(f"rl_after_{arm.name}", f"RL after {arm.label}", rl, after=arm.name) for arm in before)
    reverse, mixed, forward = (Group.of(arm) for arm in after)
    question = Question(
        title="Hand-off to RL",
        claim="RL gains more after forward KL than after reverse KL, and ends higher after distillation than alone.",
        arms=labels(alone, *after),
        columns=("avg_at_k", "gain_avg_at_k", "entropy_nats", "response_tokens", "seconds"),
        figures=(
            StudyFigure("hand_off", "Before and after RL", "hand_off", ("avg_at_k", "entropy_nats")),
            StudyFigure("hand_off_steps", "During RL", "curves", ("reward", "student_entropy_nats", "response_tokens")),
        ),
        comparisons=(
            Comparison("gain_avg_at_k", forward, reverse),
            Comparison("gain_avg_at_k", mixed, reverse),
            Comparison("avg_at_k", forward, Group.of(alone, label="RL alone")),
        ),
    )
    return study_of(
        "recall-hand-off", "Distil, then reinforce", "recall_studies.hand_off", (*before, alone, *after), (question,)
    )
