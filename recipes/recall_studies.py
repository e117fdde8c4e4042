"""Studies on the recall task: where reverse KL over long responses runs away, what stops it, and what it does not depend on.

    megatron-distill study recall_studies.runaway --dir runs/study-recall           # or any other name below
    megatron-distill study recall_studies.runaway --dir runs/study-recall --quick   # minutes, one seed: a look

All of them share the folder, so that an arm which several ask for is made once. Written down before their confirming
runs: hypotheses (each question's claim and comparisons), settings (``recall``), what is judged (all evaluations on the way,
or the last one) and seeds. The settings were looked for with seeds of 100 and more, in which what runs away mostly came back
within 200 steps.

`runaway` asks whether it happens and what prevents it; `controls` which of its ingredients it needs; `gate` what the
entropy gate adds to a ladder; `stop_tokens` how much length comes from two stop tokens that are not one action; `top_k` what a
top k costs; `staleness` what stale rollouts cost under each direction; `hand_off` what RL makes of each student; `open_book`
what a model learns from itself if it may look things up.
"""

from dataclasses import replace

from megatron_distill.recipes import recall
from megatron_distill.recipes.recall import (
    by_heart,
    by_sequence,
    distil,
    self_distillation,
    with_another_page,
    with_flat_teacher,
    with_hidden_states,
    with_own_stop_only,
    with_teacher_prefixes,
    with_top_k,
    with_weight,
)
from megatron_distill.recipes.recall_arms import (
    COLUMNS,
    FORWARD_LONG,
    MIXED_LONG,
    QUICK_LADDER,
    REVERSE_GATED,
    REVERSE_LONG,
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
    long, mix = Group("w = 1, long", (REVERSE_LONG.name,)), Group("w = 0.2, long", (MIXED_LONG.name,))
    forward = Group("w = 0, long", (FORWARD_LONG.name,))
    short = Group("w = 1, short", (REVERSE_SHORT.name,))
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
        claim="Over the long horizon mostly forward KL (w = 0.2) does not run away, and is more accurate on the way than "
        "either end.",
        arms=labels(REVERSE_LONG, MIXED_LONG, FORWARD_LONG),
        columns=COLUMNS,
        figures=(over_steps("mixing", "Held-out accuracy, length and entropy over training"), divergences("mixing")),
        comparisons=(*healthier(mix, long), Comparison("path_avg_at_k", mix, forward)),
    )
    return study_of(
        "recall-runaway",
        "Reverse KL that runs away",
        "runaway",
        arms,
        (length, settled, mixing, remedied("curriculum", REVERSE_GATED, REVERSE_LONG)),
    )


def controls() -> Study:
    """Which ingredients the runaway needs: the rising hazard, the learning rate, the student's own prefixes, the weight of long
    responses, the dose."""
    flat = Arm("w1_long_flat", "w = 1, long, flat teacher", with_flat_teacher(REVERSE_LONG.config))
    slow_optimizer = replace(REVERSE_LONG.config.optimizer, lr=recall.LR * 0.4)
    slow = Arm("w1_long_slow", "w = 1, long, lr 4e-4", replace(REVERSE_LONG.config, optimizer=slow_optimizer))
    teacher = Arm("w1_long_teacher", "w = 1, long, teacher prefixes", with_teacher_prefixes(REVERSE_LONG.config))
    mean = Arm("w1_long_by_sequence", "w = 1, long, mean per response", by_sequence(REVERSE_LONG.config))
    long = Group("w = 1, long", (REVERSE_LONG.name,))
    needs = tuple(
        Question(
            title=title,
            claim=claim,
            arms=labels(REVERSE_LONG, arm),
            columns=COLUMNS,
            figures=(over_steps(arm.name, title),),
            comparisons=healthier(Group(arm.label, (arm.name,)), long),
        )
        for arm, title, claim in (
            (
                flat,
                "Needs a hazard that rises",
                "Under a teacher whose hesitation does not feed itself nothing runs away.",
            ),
            (slow, "Depends on the learning rate", "At 0.4 of the learning rate nothing runs away."),
            (teacher, "Needs the student's prefixes", "At the teacher's prefixes nothing runs away."),
            (
                mean,
                "Needs a mean over tokens",
                "Where a response that loops weighs no more than one that answers, nothing runs away.",
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
            Comparison("peak_response_tokens", long, Group("middle", (REVERSE_MIDDLE.name,))),
            Comparison(
                "peak_response_tokens", Group("middle", (REVERSE_MIDDLE.name,)), Group("short", (REVERSE_SHORT.name,))
            ),
        ),
    )
    return study_of(
        "recall-controls",
        "What the runaway needs",
        "controls",
        (REVERSE_LONG, REVERSE_SHORT, REVERSE_MIDDLE, flat, slow, teacher, mean),
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
    return study_of(
        "recall-gate",
        "What the entropy gate adds",
        "gate",
        (REVERSE_LONG, REVERSE_GATED, replace(ladder, quick_overrides=QUICK_LADDER), hasty, hasty_gated, progressive),
        (
            remedied("gate_hasty", hasty_gated, hasty, "The gate saves a ladder that is climbed too fast"),
            remedied("gate_paced", REVERSE_GATED, ladder, "The gate at a ladder's own pace"),
            remedied("gate_progressive", REVERSE_GATED, progressive, "Gated against progressive"),
            remedied("gate_fixed", REVERSE_GATED, REVERSE_LONG, "Gated against fixed"),
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
            arms=labels(arm, unmerged[arm.name]),
            columns=COLUMNS,
            figures=(over_steps(f"stop_{arm.name}", arm.label),),
            comparisons=(
                Comparison(
                    "response_tokens", Group("not merged", (unmerged[arm.name].name,)), Group("merged", (arm.name,))
                ),
                Comparison("avg_at_k", Group("merged", (arm.name,)), Group("not merged", (unmerged[arm.name].name,))),
            ),
        )
        for arm in (*merged, *written)
    )
    return study_of(
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
    """What a top k costs, what becomes of its tail, what hidden states tell beyond it and one token does, on a sound run."""
    full = Arm("top_64", "all 64 tokens", with_top_k(distil(), 64))
    buckets = tuple(Arm(f"top_{k}", f"top {k}, tail in a bucket", with_top_k(distil(), k)) for k in (1, 2, 8))
    others = tuple(
        Arm(f"top_2_{tail}", f"top 2, tail {tail}", with_top_k(distil(), 2, tail))
        for tail in ("renormalised", "dropped")
    )
    hidden = Arm("hidden", "hidden states: exact", with_hidden_states(distil()))
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
        arms=labels(full, *buckets),
        columns=COLUMNS,
        figures=(
            over_steps("top_k", "Over training"),
            StudyFigure("top_k_dose", "Against k", "dose", ("avg_at_k", "entropy_nats"), "teacher.num_logprobs"),
        ),
        comparisons=tuple(Comparison("avg_at_k", everything, Group(arm.label, (arm.name,))) for arm in buckets),
    )
    tail = Question(
        title="The tail of a top 2",
        claim="A bucket for the tail teaches more than conditioning on the top k, or dropping the tail.",
        arms=labels(full, buckets[1], *others),
        columns=COLUMNS,
        figures=(over_steps("tail", "Over training"),),
        comparisons=tuple(Comparison("avg_at_k", two, Group(arm.label, (arm.name,))) for arm in others),
    )
    exact = Question(
        title="Hidden states against a top k",
        claim="Hidden states, from which the trainer makes the exact distribution, teach more than a top k with its tail in a "
        "bucket. (All 64 tokens are the same distribution, told otherwise.)",
        arms=labels(hidden, full, *buckets),
        columns=(*COLUMNS, "seconds"),
        figures=(over_steps("hidden", "Over training"),),
        comparisons=tuple(
            Comparison("avg_at_k", Group(hidden.label, (hidden.name,)), Group(arm.label, (arm.name,)))
            for arm in buckets
        ),
    )
    sampled = Question(
        title="One token against the distribution",
        claim="At equal tokens, forward KL over the distribution teaches more than its estimate from the written token.",
        arms=labels(FORWARD_LONG, estimated),
        columns=COLUMNS,
        figures=(over_steps("sampled", "Over training"),),
        comparisons=(
            Comparison("avg_at_k", Group("distribution", (FORWARD_LONG.name,)), Group("estimate", (estimated.name,))),
        ),
    )
    return study_of(
        "recall-top-k",
        "What a part of the teacher's distribution costs",
        "top_k",
        (full, *buckets, *others, hidden, FORWARD_LONG, estimated),
        (size, tail, exact, sampled),
        quick=(full.name, "top_2", "top_2_renormalised", "top_2_dropped", hidden.name),
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
            arms=labels(arm, *stale[arm.name]),
            columns=(*COLUMNS, "seconds"),
            figures=(over_steps(f"stale_{arm.name}", arm.label),),
            comparisons=tuple(
                Comparison(measure, Group("fresh", (arm.name,)), Group(one.label, (one.name,)))
                for one in stale[arm.name]
                for measure in ("avg_at_k", "seconds")
            ),
        )
        for arm in fresh
    )
    arms = tuple(one for arm in fresh for one in (arm, *stale[arm.name]))
    return study_of("recall-staleness", "Stale rollouts", "staleness", arms, questions)


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
        arms=labels(alone, *after),
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
    return study_of("recall-hand-off", "Distil, then reinforce", "hand_off", (*before, alone, *after), (question,))


def open_book() -> Study:
    """Self-distillation: a model that is wrong by heart under itself, which reads the facts from its prompt."""
    forward = Arm("book_w0", "own open book, w = 0", with_weight(self_distillation(), 0))
    reverse = Arm("book_w1", "own open book, w = 1", with_weight(self_distillation(), 1))
    elsewhere = Arm("book_elsewhere", "own book, open at another page, w = 0", with_another_page(forward.config))
    rival = Arm("book_by_heart", "teacher that knows by heart, w = 0", by_heart(forward.config))
    direct, back, other, taught = (Group(arm.label, (arm.name,)) for arm in (forward, reverse, elsewhere, rival))
    learns = Question(
        title="A model's own open book as its teacher",
        claim="What a model answers with the facts before it, it learns to answer without, under either direction of the KL, "
        "and by the facts: from a page of other ones it does not.",
        arms=labels(elsewhere, forward, reverse),
        columns=("gain_avg_at_k", *COLUMNS),
        figures=(over_steps("book", "Held-out accuracy, length and entropy over training"), divergences("book")),
        comparisons=(Comparison("avg_at_k", direct, other), Comparison("avg_at_k", back, other)),
    )
    direction = Question(
        title="Direction of the KL under the own open book",
        claim="Reverse KL is more accurate on the way, forward KL keeps more entropy.",
        arms=labels(forward, reverse),
        columns=COLUMNS,
        figures=(),
        comparisons=(Comparison("path_avg_at_k", back, direct), Comparison("entropy_nats", direct, back)),
    )
    larger = Question(
        title="Own open book against a teacher that knows by heart",
        claim="A larger teacher, which sees no more than the student but knows the facts, teaches faster. (Where the student "
        "has gone wrong it goes on from there; the book answers as if nothing had happened.)",
        arms=labels(forward, rival),
        columns=COLUMNS,
        figures=(),
        comparisons=(Comparison("path_avg_at_k", taught, direct),),
    )
    return study_of(
        "recall-open-book",
        "A model under itself with the book open",
        "open_book",
        (forward, reverse, elsewhere, rival),
        (learns, direction, larger),
        scope="A model of 0.06 million parameters that is wrong by heart about many facts, and right with them in its prompt, "
        "is its own teacher. One task, one such model; seeds vary the distillation.",
    )
