"""Studies on the recall task: where reverse KL over long responses runs away, what stops it, and what it does not depend on.

    megatron-distill study recall_studies.runaway --dir runs/study-recall           # or any other name below
    megatron-distill study recall_studies.runaway --dir runs/study-recall --quick   # minutes, one seed: a look

All of them share the folder, so that an arm which several ask for is made once. Written down before their confirming
runs: hypotheses (each question's claim and comparisons), settings (``recall``), what is judged (all evaluations on the way,
or the last one) and seeds. The settings were looked for with seeds of 100 and more, in which what runs away mostly came back
within 200 steps.

`runaway` asks whether it happens and what prevents it; `controls` which of its ingredients it needs; `gate` what the
entropy gate adds to a ladder; `stop_tokens` how much length comes from two stop tokens that are not one action; `top_k` what a
top k costs; `staleness` what stale rollouts cost under each direction; `hand_off` what RL makes of each student.
"""

from dataclasses import replace

from megatron_distill.recipes import recall
from megatron_distill.recipes.recall import (
    LONG_TOKENS,
    MIDDLE_TOKENS,
    SHORT_TOKENS,
    distil,
    with_flat_teacher,
    with_horizon,
    with_own_stop_only,
    with_teacher_prefixes,
    with_top_k,
    with_weight,
)

from megatron_distill.study.design import Arm, Comparison, Group, Question, Study, StudyFigure

SEEDS = (11, 12, 13, 14, 15)
_SCOPE = (
    "A student of 0.06 million parameters that is wrong about many facts learns look-ups from a teacher of 0.23 million that "
    "hesitates, the more the longer it has; responses take about 25 tokens, at most 160. The task is built so that loops feed "
    "themselves: it shows a mechanism that can yield what arXiv 2605.16826 reports of language models, and is no evidence "
    "that theirs is the same. Seeds vary the distillation; there is one teacher and one student to begin with."
)
_COLUMNS = (
    *("path_avg_at_k", "peak_response_tokens", "low_entropy_nats"),
    *("avg_at_k", "response_tokens", "truncated_frac", "entropy_nats", "horizon_tokens"),
)
_QUICK = ("num_steps=100", "save_every_steps=0", "evaluation.num_problems=100", "evaluation.every_steps=50")
_QUICK_LADDER = ("curriculum.stage_steps=33",)

# --- arms; a name stands for the same config in every study -------------------------------------------------------------

REVERSE_LONG = Arm("w1_long", f"w = 1, {LONG_TOKENS} tokens", with_weight(distil(), 1))
REVERSE_SHORT = Arm("w1_short", f"w = 1, {SHORT_TOKENS} tokens", with_horizon(REVERSE_LONG.config, SHORT_TOKENS))
REVERSE_MIDDLE = Arm("w1_middle", f"w = 1, {MIDDLE_TOKENS} tokens", with_horizon(REVERSE_LONG.config, MIDDLE_TOKENS))
REVERSE_GATED = Arm(
    "w1_gated",
    "w = 1, entropy-gated curriculum",
    replace(REVERSE_LONG.config, curriculum=recall.GATED),
    quick_overrides=_QUICK_LADDER,
)
HALF_LONG = Arm("w05_long", f"w = 0.5, {LONG_TOKENS} tokens", with_weight(distil(), 0.5))
MIXED_LONG = Arm("w02_long", f"w = 0.2, {LONG_TOKENS} tokens", distil())
FORWARD_LONG = Arm("w0_long", f"w = 0, {LONG_TOKENS} tokens", with_weight(distil(), 0))


def runaway() -> Study:
    """Weight of reverse KL, and horizon: which runs run away, and both remedies."""
    arms = (REVERSE_LONG, REVERSE_SHORT, REVERSE_GATED, MIXED_LONG, FORWARD_LONG)
    long, mix = Group("w = 1, long", (REVERSE_LONG.name,)), Group("w = 0.2, long", (MIXED_LONG.name,))
    forward = Group("w = 0, long", (FORWARD_LONG.name,))
    short = Group("w = 1, short", (REVERSE_SHORT.name,))
    length = Question(
        title="Training length under reverse KL: accuracy against stability",
        claim="Over a long horizon reverse KL runs away: on the way its responses are longer, its entropy is lower and it is "
        "less accurate than over a short one.",
        arms=_labels(REVERSE_LONG, REVERSE_SHORT, REVERSE_GATED),
        columns=_COLUMNS,
        figures=(_over_steps("length", "Held-out accuracy, length and entropy over training"), _divergences("length")),
        comparisons=_healthier(short, long),
    )
    settled = Question(
        title="Training length under reverse KL: at the end",
        claim="What ran away has not come back by the last step: it is longer, with less entropy, and less accurate.",
        arms=_labels(REVERSE_LONG, REVERSE_SHORT),
        columns=_COLUMNS,
        figures=(),
        comparisons=(
            Comparison("response_tokens", long, short),
            Comparison("entropy_nats", short, long),
            Comparison("avg_at_k", short, long),
        ),
    )
    mixing = Question(
        title="Remedy: KL mixing",
        claim="Over the long horizon mostly forward KL (w = 0.2) does not run away, and is more accurate on the way than "
        "either end.",
        arms=_labels(REVERSE_LONG, MIXED_LONG, FORWARD_LONG),
        columns=_COLUMNS,
        figures=(_over_steps("mixing", "Held-out accuracy, length and entropy over training"), _divergences("mixing")),
        comparisons=(*_healthier(mix, long), Comparison("path_avg_at_k", mix, forward)),
    )
    return _study(
        "recall-runaway",
        "Reverse KL that runs away",
        "runaway",
        arms,
        (length, settled, mixing, _remedy("curriculum", REVERSE_GATED, REVERSE_LONG)),
    )


def controls() -> Study:
    """Which ingredients the runaway needs: the rising hazard, the learning rate, the student's own prefixes, the dose."""
    flat = Arm("w1_long_flat", "w = 1, long, flat teacher", with_flat_teacher(REVERSE_LONG.config))
    slow_optimizer = replace(REVERSE_LONG.config.optimizer, lr=recall.LR * 0.4)
    slow = Arm("w1_long_slow", "w = 1, long, lr 4e-4", replace(REVERSE_LONG.config, optimizer=slow_optimizer))
    teacher = Arm("w1_long_teacher", "w = 1, long, teacher prefixes", with_teacher_prefixes(REVERSE_LONG.config))
    long = Group("w = 1, long", (REVERSE_LONG.name,))
    needs = tuple(
        Question(
            title=title,
            claim=claim,
            arms=_labels(REVERSE_LONG, arm),
            columns=_COLUMNS,
            figures=(_over_steps(arm.name, title),),
            comparisons=_healthier(Group(arm.label, (arm.name,)), long),
        )
        for arm, title, claim in (
            (
                flat,
                "Needs a hazard that rises",
                "Under a teacher whose hesitation does not feed itself nothing runs away.",
            ),
            (slow, "Depends on the learning rate", "At 0.4 of the learning rate nothing runs away."),
            (teacher, "Needs the student's prefixes", "At the teacher's prefixes nothing runs away."),
        )
    )
    dose = Question(
        title="Dose: horizon",
        claim="The middle horizon lies between: shorter responses than the long one, longer than the short one.",
        arms=_labels(REVERSE_SHORT, REVERSE_MIDDLE, REVERSE_LONG),
        columns=_COLUMNS,
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
            Comparison("peak_response_tokens", long, Group("middle", (REVERSE_MIDDLE.name,))),
            Comparison(
                "peak_response_tokens", Group("middle", (REVERSE_MIDDLE.name,)), Group("short", (REVERSE_SHORT.name,))
            ),
        ),
    )
    return _study(
        "recall-controls",
        "What the runaway needs",
        "controls",
        (REVERSE_LONG, REVERSE_SHORT, REVERSE_MIDDLE, flat, slow, teacher),
        (*needs, dose),
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
    return _study(
        "recall-gate",
        "What the entropy gate adds",
        "gate",
        (REVERSE_LONG, REVERSE_GATED, replace(ladder, quick_overrides=_QUICK_LADDER), hasty, hasty_gated, progressive),
        (
            _remedy("gate_hasty", hasty_gated, hasty, "The gate saves a ladder that is climbed too fast"),
            _remedy("gate_paced", REVERSE_GATED, ladder, "The gate at a ladder's own pace"),
            _remedy("gate_progressive", REVERSE_GATED, progressive, "Gated against progressive"),
            _remedy("gate_fixed", REVERSE_GATED, REVERSE_LONG, "Gated against fixed"),
        ),
    )


def stop_tokens() -> Study:
    """How much of length inflation comes from two stop tokens that are not one action: over w, prefix source and horizon."""
    merged = (REVERSE_LONG, MIXED_LONG, FORWARD_LONG, REVERSE_SHORT)
    written = tuple(
        Arm(f"{arm.name}_teacher", f"{arm.label}, teacher prefixes", with_teacher_prefixes(arm.config))
        for arm in (REVERSE_LONG, FORWARD_LONG)
    )
    unmerged = {
        arm.name: Arm(f"{arm.name}_unmerged", f"{arm.label}, not merged", with_own_stop_only(arm.config))
        for arm in (*merged, *written)
    }
    questions = tuple(
        Question(
            title=f"Stop tokens: {arm.label}",
            claim="Two stop tokens that are not merged make responses longer, and less accurate.",
            arms=_labels(arm, unmerged[arm.name]),
            columns=_COLUMNS,
            figures=(_over_steps(f"stop_{arm.name}", arm.label),),
            comparisons=(
                Comparison(
                    "response_tokens", Group("not merged", (unmerged[arm.name].name,)), Group("merged", (arm.name,))
                ),
                Comparison("avg_at_k", Group("merged", (arm.name,)), Group("not merged", (unmerged[arm.name].name,))),
            ),
        )
        for arm in (*merged, *written)
    )
    return _study(
        "recall-stop-tokens",
        "Stop tokens and length",
        "stop_tokens",
        (*merged, *written, *unmerged.values()),
        questions,
        quick=(
            FORWARD_LONG.name,
            REVERSE_SHORT.name,
            f"{FORWARD_LONG.name}_unmerged",
            f"{REVERSE_SHORT.name}_unmerged",
        ),
    )


def top_k() -> Study:
    """What a top k costs in learning, what becomes of the tail, and what one token tells, on a run that behaves."""
    full = Arm("top_64", "all 64 tokens", with_top_k(distil(), 64))
    buckets = tuple(Arm(f"top_{k}", f"top {k}, tail in a bucket", with_top_k(distil(), k)) for k in (1, 2, 8))
    others = tuple(
        Arm(f"top_2_{tail}", f"top 2, tail {tail}", with_top_k(distil(), 2, tail))
        for tail in ("renormalised", "dropped")
    )
    estimated = Arm(
        "w0_k3",
        "forward KL, estimated from the written token (k3)",
        replace(FORWARD_LONG.config, distill=replace(FORWARD_LONG.config.distill, estimator="k3")),
    )
    everything = Group("all 64", (full.name,))
    two = Group("bucket", ("top_2",))
    size = Question(
        title="Size of the top k",
        claim="The whole distribution teaches more than a top k with its tail in a bucket.",
        arms=_labels(full, *buckets),
        columns=_COLUMNS,
        figures=(
            _over_steps("top_k", "Over training"),
            StudyFigure("top_k_dose", "Against k", "dose", ("avg_at_k", "entropy_nats"), "teacher.num_logprobs"),
        ),
        comparisons=tuple(Comparison("avg_at_k", everything, Group(arm.label, (arm.name,))) for arm in buckets),
    )
    tail = Question(
        title="The tail of a top 2",
        claim="A bucket for the tail teaches more than conditioning on the top k, or dropping the tail.",
        arms=_labels(full, buckets[1], *others),
        columns=_COLUMNS,
        figures=(_over_steps("tail", "Over training"),),
        comparisons=tuple(Comparison("avg_at_k", two, Group(arm.label, (arm.name,))) for arm in others),
    )
    sampled = Question(
        title="One token against the distribution",
        claim="At equal tokens, forward KL over the distribution teaches more than its estimate from the written token.",
        arms=_labels(FORWARD_LONG, estimated),
        columns=_COLUMNS,
        figures=(_over_steps("sampled", "Over training"),),
        comparisons=(
            Comparison("avg_at_k", Group("distribution", (FORWARD_LONG.name,)), Group("estimate", (estimated.name,))),
        ),
    )
    return _study(
        "recall-top-k",
        "What a part of the teacher's distribution costs",
        "top_k",
        (full, *buckets, *others, FORWARD_LONG, estimated),
        (size, tail, sampled),
        quick=(full.name, "top_2", "top_2_renormalised", "top_2_dropped"),
    )


def staleness() -> Study:
    """Rollouts by weights that are 0, 1, up to 2 or up to 4 steps old, under each direction of the KL."""
    fresh = (REVERSE_SHORT, FORWARD_LONG)
    stale = {
        arm.name: tuple(
            Arm(
                f"{arm.name}_stale_{steps}",
                f"{arm.label}, staleness {steps}",
                replace(arm.config, rollouts=replace(arm.config.rollouts, max_staleness_steps=steps)),
            )
            for steps in (1, 2, 4)
        )
        for arm in fresh
    }
    questions = tuple(
        Question(
            title=f"Staleness: {arm.label}",
            claim="Fresh rollouts teach more than stale ones, and take longer.",
            arms=_labels(arm, *stale[arm.name]),
            columns=(*_COLUMNS, "seconds"),
            figures=(_over_steps(f"stale_{arm.name}", arm.label),),
            comparisons=tuple(
                Comparison(measure, Group("fresh", (arm.name,)), Group(one.label, (one.name,)))
                for one in stale[arm.name]
                for measure in ("avg_at_k", "seconds")
            ),
        )
        for arm in fresh
    )
    arms = tuple(one for arm in fresh for one in (arm, *stale[arm.name]))
    return _study("recall-staleness", "Stale rollouts", "staleness", arms, questions)


def hand_off() -> Study:
    """GRPO from what each distillation left, and from the untaught student."""
    before = (REVERSE_SHORT, MIXED_LONG, FORWARD_LONG)
    rl = recall.grpo()
    alone = Arm("rl_alone", "RL alone", rl)
    after = tuple(Arm(f"rl_after_{arm.name}", f"RL after {arm.label}", rl, after=arm.name) for arm in before)
    reverse, mixed, forward = (Group(arm.label, (arm.name,)) for arm in after)
    question = Question(
        title="Hand-off to RL",
        claim="RL gains more after forward KL than after reverse KL, and ends higher after distillation than alone.",
        arms=_labels(alone, *after),
        columns=("avg_at_k", "gain_avg_at_k", "entropy_nats", "response_tokens", "seconds"),
        figures=(
            StudyFigure("hand_off", "Before and after RL", "hand_off", ("avg_at_k", "entropy_nats")),
            StudyFigure("hand_off_steps", "During RL", "curves", ("reward", "student_entropy_nats", "response_tokens")),
        ),
        comparisons=(
            Comparison("gain_avg_at_k", forward, reverse),
            Comparison("gain_avg_at_k", mixed, reverse),
            Comparison("avg_at_k", forward, Group("RL alone", (alone.name,))),
        ),
    )
    return _study("recall-hand-off", "Distil, then reinforce", "hand_off", (*before, alone, *after), (question,))


def _study(
    name: str,
    title: str,
    function: str,
    arms: tuple[Arm, ...],
    questions: tuple[Question, ...],
    quick: tuple[str, ...] = (),
) -> Study:
    return Study(
        name=name,
        title=title,
        scope=_SCOPE,
        command=f"megatron-distill study recall_studies.{function} --dir runs/study-recall",
        arms=arms,
        seeds=SEEDS,
        questions=questions,
        quick_arms=quick or tuple(arm.name for arm in arms),
        quick_overrides=_QUICK,
    )


def _labels(*arms: Arm) -> dict[str, str]:
    return {arm.name: arm.label for arm in arms}


def _over_steps(name: str, title: str) -> StudyFigure:
    return StudyFigure(f"{name}_steps", title, "path", ("avg_at_k", "response_tokens", "entropy_nats"))


def _divergences(name: str) -> StudyFigure:
    """What the loss shows of it in training: a low reverse KL is no sign of health."""
    metrics = ("reverse_kl_nats", "student_entropy_nats", "response_tokens")
    return StudyFigure(f"{name}_training", "Reverse KL, entropy and length in training", "curves", metrics)


def _remedy(name: str, remedy: Arm, without: Arm, title: str = "Remedy: entropy-gated length curriculum") -> Question:
    better, worse = Group(remedy.label, (remedy.name,)), Group(without.label, (without.name,))
    return Question(
        title=title,
        claim=f"More accurate on the way, with shorter responses and more entropy: {remedy.label}, against {without.label}.",
        arms=_labels(without, remedy),
        columns=_COLUMNS,
        figures=(_over_steps(name, title),),
        comparisons=_healthier(better, worse),
    )


def _healthier(sound: Group, sick: Group) -> tuple[Comparison, ...]:
    """That one did not run away and the other did, at any evaluation: what ran away may have come back by the last step."""
    return (
        Comparison("peak_response_tokens", sick, sound),
        Comparison("low_entropy_nats", sound, sick),
        Comparison("path_avg_at_k", sound, sick),
    )
