"""Studies on the recall task of what the paper leaves open: what an implementation decides, and a model that teaches itself.

    megatron-distill study recall_open_questions.top_k --dir runs/study-recall           # or any other name below
    megatron-distill study recall_open_questions.top_k --dir runs/study-recall --quick   # minutes, one seed: a look

They share the folder with ``recall_studies``, which says how they were made. `stop_tokens` asks how much length comes from two
stop tokens that are not one action; `top_k` what a top k costs; `staleness` what stale rollouts cost under each direction;
`open_book` what a model learns from itself if it may look things up.
"""

from dataclasses import replace

from megatron_distill.recipes.recall import (
    by_heart,
    distil,
    self_distillation,
    with_another_page,
    with_hidden_states,
    with_own_stop_only,
    with_staleness,
    with_top_k,
    with_weight,
)
from megatron_distill.recipes.recall_arms import (
    COLUMNS,
    FORWARD_LONG,
    FORWARD_LONG_TEACHER,
    MIXED_LONG,
    REVERSE_LONG,
    REVERSE_LONG_TEACHER,
    REVERSE_SHORT,
    divergences,
    healthier,
    labels,
    over_steps,
    study_of,
)

from megatron_distill.study.design import Arm, Comparison, Group, Question, Study, StudyFigure


def stop_tokens() -> Study:
    """How much of length inflation comes from two stop tokens that are not one action: over w, prefix source and horizon."""
    merged = (REVERSE_LONG, MIXED_LONG, FORWARD_LONG, REVERSE_SHORT, REVERSE_LONG_TEACHER, FORWARD_LONG_TEACHER)
    unmerged = {
        arm.name: Arm(f"{arm.name}_unmerged", f"{arm.label}, not merged", with_own_stop_only(arm.config))
        for arm in merged
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
                    "response_tokens", Group.of(unmerged[arm.name], label="not merged"), Group.of(arm, label="merged")
                ),
                Comparison("avg_at_k", Group.of(arm, label="merged"), Group.of(unmerged[arm.name], label="not merged")),
            ),
        )
        for arm in merged
    )
    return study_of(
        "recall-stop-tokens",
        "Stop tokens and length",
        "recall_open_questions.stop_tokens",
        (*merged, *unmerged.values()),
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
    everything = Group.of(full, label="all 64")
    two = Group.of(buckets[1], label="bucket")
    size = Question(
        title="Size of the top k",
        claim="The whole distribution teaches more than a top k with its tail in a bucket.",
        arms=labels(full, *buckets),
        columns=COLUMNS,
        figures=(
            over_steps("top_k", "Over training"),
            StudyFigure("top_k_dose", "Against k", "dose", ("avg_at_k", "entropy_nats"), "teacher.num_logprobs"),
        ),
        comparisons=tuple(Comparison("avg_at_k", everything, Group.of(arm)) for arm in buckets),
    )
    tail = Question(
        title="The tail of a top 2",
        claim="A bucket for the tail teaches more than conditioning on the top k, or dropping the tail.",
        arms=labels(full, buckets[1], *others),
        columns=COLUMNS,
        figures=(over_steps("tail", "Over training"),),
        comparisons=tuple(Comparison("avg_at_k", two, Group.of(arm)) for arm in others),
    )
    exact = Question(
        title="Hidden states against a top k",
        claim="Hidden states, from which the trainer makes the exact distribution, teach more than a top k with its tail in a "
        "bucket. (All 64 tokens are the same distribution, told otherwise.)",
        arms=labels(hidden, full, *buckets),
        columns=(*COLUMNS, "seconds"),
        figures=(over_steps("hidden", "Over training"),),
        comparisons=tuple(Comparison("avg_at_k", Group.of(hidden), Group.of(arm)) for arm in buckets),
    )
    sampled = Question(
        title="One token against the distribution",
        claim="At equal tokens, forward KL over the distribution teaches more than its estimate from the written token.",
        arms=labels(FORWARD_LONG, estimated),
        columns=COLUMNS,
        figures=(over_steps("sampled", "Over training"),),
        comparisons=(
            Comparison("avg_at_k", Group.of(FORWARD_LONG, label="distribution"), Group.of(estimated, label="estimate")),
        ),
    )
    return study_of(
        "recall-top-k",
        "What a part of the teacher's distribution costs",
        "recall_open_questions.top_k",
        (full, *buckets, *others, hidden, FORWARD_LONG, estimated),
        (size, tail, exact, sampled),
        quick=(full.name, "top_2", "top_2_renormalised", "top_2_dropped", hidden.name),
    )


def staleness() -> Study:
    """Rollouts by weights that are 0, 1, up to 2 or up to 4 steps old, under each direction of the KL.

    The run that runs away was added when two seeds of the others had been looked at. What stale rollouts save is not asked
    here, where runs share a machine and with it their time; ``benchmarks/overlap.py`` asks.
    """
    fresh = (REVERSE_SHORT, FORWARD_LONG)
    stale = {arm.name: tuple(_stale(arm, steps) for steps in (1, 2, 4)) for arm in fresh}
    questions = tuple(
        Question(
            title=f"Staleness: {arm.label}",
            claim="Fresh rollouts teach more than stale ones.",
            arms=labels(arm, *stale[arm.name]),
            columns=COLUMNS,
            figures=(over_steps(f"stale_{arm.name}", arm.label),),
            comparisons=tuple(
                Comparison("avg_at_k", Group.of(arm, label="fresh"), Group.of(one)) for one in stale[arm.name]
            ),
        )
        for arm in fresh
    )
    running_away = _stale(REVERSE_LONG, 4)
    further = Question(
        title=f"Staleness: {REVERSE_LONG.label}, which runs away",
        claim="Under stale rollouts it runs further away: longer responses, less entropy, less accurate on the way.",
        arms=labels(REVERSE_LONG, running_away),
        columns=COLUMNS,
        figures=(over_steps("stale_w1_long", REVERSE_LONG.label), divergences("stale_w1_long")),
        comparisons=healthier(Group.of(REVERSE_LONG, label="fresh"), Group.of(running_away)),
    )
    arms = (*(one for arm in fresh for one in (arm, *stale[arm.name])), REVERSE_LONG, running_away)
    return study_of(
        "recall-staleness", "Stale rollouts", "recall_open_questions.staleness", arms, (*questions, further)
    )


def _stale(arm: Arm, steps: int) -> Arm:
    return Arm(f"{arm.name}_stale_{steps}", f"{arm.label}, staleness {steps}", with_staleness(arm.config, steps))


def open_book() -> Study:
    """Self-distillation: a model that is wrong by heart under itself, which reads the facts from its prompt."""
    forward = Arm("book_w0", "own open book, w = 0", with_weight(self_distillation(), 0))
    reverse = Arm("book_w1", "own open book, w = 1", with_weight(self_distillation(), 1))
    elsewhere = Arm("book_elsewhere", "own book, open at another page, w = 0", with_another_page(forward.config))
    rival = Arm("book_by_heart", "teacher that knows by heart, w = 0", by_heart(forward.config))
    direct, back, other, taught = (Group.of(arm) for arm in (forward, reverse, elsewhere, rival))
    learns = Question(
        title="A model's own open book as its teacher",
        claim="What a model answers with the facts before it, it learns to answer without, under either direction of the KL, "
        "and more from its facts than from a page of other ones.",
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
        "recall_open_questions.open_book",
        (forward, reverse, elsewhere, rival),
        (learns, direction, larger),
        scope="A model of 0.06 million parameters that is wrong by heart about many facts, and right with them in its prompt, "
        "is its own teacher. One task, one such model; seeds vary the distillation.",
    )
