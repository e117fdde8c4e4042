"""Runs on a laptop's CPU: a tiny teacher and student on chained arithmetic, the same code path as a cluster's.

megatron-distill train tiny.quickstart
megatron-distill train tiny.quickstart distill.reverse_kl_weight=1 rollouts.student_prefix_frac=0
megatron-distill study tiny.study                   # about 75 minutes; --quick about 10 minutes
megatron-distill study tiny.study_rl --dir runs/study-tiny   # about 40 minutes more
megatron-distill study tiny_staleness.study --dir runs/study-tiny
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_distill.config import (
    DataConfig,
    DistillConfig,
    EntropyGated,
    EvalConfig,
    FixedHorizon,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from megatron_distill.config.schedules import constant
from megatron_distill.study.design import Arm, Comparison, Group, Question, Study, StudyFigure

MODELS = Path(__file__).parent / "tiny_models"
SHORT_TOKENS, LONG_TOKENS = 40, 160  # of solutions of 25 to 140 tokens, cut most, or none
STUDY_SEEDS = (1, 2, 3)
SCOPE = (
    "A student of 0.13 million parameters learns chained arithmetic from a teacher of 0.7 million; solutions take 25 to 140 "
    "tokens. The claims are those of arXiv 2605.16826, which trained language models of 0.6 billion on up to 4096 tokens: what "
    "is or is not shown here need not be so there."
)
QUICK = (
    "num_steps=20",
    "save_every_steps=0",
    "evaluation.every_steps=10",
    "evaluation.num_problems=50",
    "evaluation.samples_per_problem=2",
)
MIXED_WEIGHTS = {0.8: "student_w80", 0.5: "student_w50", 0.2: "student_w20"}


def quickstart() -> RunConfig:
    """On-policy distillation with mostly forward KL, two trainer ranks, minutes on two cores."""
    return RunConfig(
        name="quickstart",
        num_steps=40,
        micro_batch_rollouts=16,
        student=StudentConfig(path=str(MODELS / "student"), parallel=ParallelConfig(tp=2)),
        teacher=TeacherConfig(path=str(MODELS / "teacher"), num_logprobs=64),
        data=DataConfig(
            train_path=str(MODELS / "train.jsonl"),
            heldout_path=str(MODELS / "heldout.jsonl"),
            max_prompt_tokens=128,
        ),
        rollouts=RolloutConfig(
            student_prefix_frac=constant(1.0),
            prompts_per_step=64,
            stop_tokens=("<|endoftext|>", "<|im_end|>"),
        ),
        curriculum=FixedHorizon(horizon_tokens=constant(160)),
        distill=DistillConfig(reverse_kl_weight=constant(0.2)),
        optimizer=OptimizerConfig(lr=1e-3, warmup_frac=0.1),
        evaluation=EvalConfig(
            num_problems=100,
            samples_per_problem=4,
            temperature=1.0,
            top_p=1.0,
            top_k=-1,
            max_response_tokens=192,
        ),
    )


# --- the studies ------------------------------------------------------------------------------------------------------


def study() -> Study:
    """The three trade-offs and two remedies of arXiv 2605.16826: 9 arms, 3 seeds, 27 runs of about 2.5 minutes."""
    mixed = tuple(
        Arm(name, f"student prefix, w = {w}", study_run(reverse_kl_weight=w)) for w, name in MIXED_WEIGHTS.items()
    )
    reverse = study_run(reverse_kl_weight=1.0)
    gated = EntropyGated(
        ladder_tokens=(SHORT_TOKENS, 80, LONG_TOKENS),  # a third of the steps each
        stage_steps=13,
        min_entropy_nats=0.06,  # half of what the teacher has on this task
    )
    horizons = (
        Arm(
            "student_reverse_short",
            f"student prefix, reverse KL, fixed {SHORT_TOKENS} tokens",
            study_run(1.0, horizon_tokens=SHORT_TOKENS),
        ),
        Arm(
            "student_reverse_curriculum",
            "student prefix, reverse KL, curriculum",
            replace(reverse, curriculum=gated),
            quick_overrides=("curriculum.stage_steps=5",),
        ),
    )
    return Study(
        name="tiny",
        title="Trade-offs of distillation, on chained arithmetic",
        scope=SCOPE,
        command="megatron-distill study tiny.study",
        arms=(*_grid(), *mixed, *horizons),
        seeds=STUDY_SEEDS,
        questions=(
            _kl_direction(),
            _prefix_source(),
            _training_length(),
            _kl_mixing(),
            _curriculum(),
        ),
        quick_arms=(*(arm.name for arm in _grid()), MIXED_WEIGHTS[0.2], *(arm.name for arm in horizons)),
        quick_overrides=QUICK,
    )


def study_rl() -> Study:
    """The hand-off to RL: GRPO from the student of each of the four objectives, and from the untrained one."""
    from megatron_distill.recipes.tiny_rl import grpo  # which builds on this module

    base = grpo()
    rl = replace(
        base,
        save_every_steps=20,
        student=replace(base.student, parallel=ParallelConfig()),
        rollouts=replace(base.rollouts, prompts_per_step=8),
    )
    reinforced = tuple(Arm(f"rl_from_{arm.name}", f"RL after {arm.label}", rl, after=arm.name) for arm in _grid())
    start = Arm("rl_from_untrained", "RL alone", rl)
    question = Question(
        title="Hand-off to RL",
        claim="RL gains more from a student that forward KL on its own prefixes left than from one of reverse KL, and ends "
        "higher than without distillation.",
        arms={arm.name: arm.label for arm in (start, *reinforced)},
        columns=("avg_at_k", "gain_avg_at_k", "pass_at_k", "entropy_nats", "response_tokens", "seconds"),
        figures=(
            StudyFigure("hand_off", "Before and after RL", "hand_off", ("avg_at_k", "entropy_nats")),
            StudyFigure("hand_off_steps", "During RL", "curves", ("reward", "student_entropy_nats", "response_tokens")),
        ),
        comparisons=(
            Comparison(
                "gain_avg_at_k",
                Group("after student-prefix forward KL", ("rl_from_student_forward",)),
                Group("after student-prefix reverse KL", ("rl_from_student_reverse",)),
            ),
            Comparison(
                "avg_at_k",
                Group("after student-prefix forward KL", ("rl_from_student_forward",)),
                Group.of(start, label="RL alone"),
            ),
        ),
    )
    return Study(
        name="tiny-rl",
        title="Distil, then reinforce, on chained arithmetic",
        scope=SCOPE,
        command="megatron-distill study tiny.study_rl --dir runs/study-tiny",
        arms=(*_grid(), start, *reinforced),
        seeds=STUDY_SEEDS,
        questions=(question,),
        quick_arms=(
            "student_forward",
            "student_reverse",
            start.name,
            "rl_from_student_forward",
            "rl_from_student_reverse",
        ),
        quick_overrides=(
            "num_steps=15",
            "save_every_steps=0",
            "evaluation.every_steps=0",
            "evaluation.num_problems=50",
            "evaluation.samples_per_problem=2",
        ),
    )


def study_run(
    reverse_kl_weight: float, student_prefix_frac: float = 1.0, horizon_tokens: int = LONG_TOKENS
) -> RunConfig:
    """A run of the study: the quickstart on one trainer rank, learning twice as fast, measured half-way too."""
    base = quickstart()
    return replace(
        base,
        save_every_steps=20,
        student=replace(base.student, parallel=ParallelConfig()),
        rollouts=replace(base.rollouts, student_prefix_frac=constant(student_prefix_frac)),
        curriculum=FixedHorizon(horizon_tokens=constant(horizon_tokens)),
        distill=DistillConfig(reverse_kl_weight=constant(reverse_kl_weight)),
        optimizer=replace(base.optimizer, lr=2e-3),
        evaluation=replace(base.evaluation, every_steps=20),
    )


def _grid() -> tuple[Arm, ...]:
    """The four objectives: who writes the prefix, times the direction of the KL."""
    return tuple(
        Arm(f"{source}_{direction}", f"{source} prefix, {direction} KL", study_run(weight, share))
        for source, share in (("teacher", 0.0), ("student", 1.0))
        for direction, weight in (("forward", 0.0), ("reverse", 1.0))
    )


def _kl_direction() -> Question:
    forward = Group("forward KL", ("teacher_forward", "student_forward"))
    reverse = Group("reverse KL", ("teacher_reverse", "student_reverse"))
    return Question(
        title="KL direction: accuracy against entropy",
        claim="Reverse KL is more accurate, forward KL keeps more entropy.",
        arms={arm.name: arm.label for arm in _grid()},
        columns=("avg_at_k", "pass_at_k", "entropy_nats", "response_tokens"),
        figures=(
            StudyFigure(
                "kl_direction", "Accuracy against entropy, at the end", "scatter", ("avg_at_k",), "entropy_nats"
            ),
            StudyFigure(
                "kl_direction_steps",
                "Both divergences and the entropy in training",
                "curves",
                ("forward_kl_nats", "reverse_kl_nats", "student_entropy_nats"),
            ),
        ),
        comparisons=(Comparison("avg_at_k", reverse, forward), Comparison("entropy_nats", forward, reverse)),
    )


def _prefix_source() -> Question:
    student = Group("student prefixes", ("student_forward", "student_reverse"))
    teacher = Group("teacher prefixes", ("teacher_forward", "teacher_reverse"))
    return Question(
        title="Prefix source: quality against compute",
        claim="Student prefixes are more accurate, and cost more compute.",
        arms={arm.name: arm.label for arm in _grid()},
        columns=("avg_at_k", "student_tokens", "teacher_tokens", "seconds", "reuse_seconds"),
        figures=tuple(
            StudyFigure(f"prefix_source_{x}", title, "path", ("avg_at_k",), x)
            for x, title in (
                ("sampled_tokens", "Accuracy against sampled tokens"),
                ("seconds", "Accuracy against time in steps"),
                ("reuse_seconds", "Accuracy against time in steps, if the teacher's responses are kept"),
            )
        ),
        comparisons=(
            Comparison("avg_at_k", student, teacher),
            Comparison("seconds", student, teacher),
            Comparison("reuse_seconds", student, teacher),
        ),
    )


_HORIZONS: dict[str, Any] = {
    "arms": {
        "student_reverse_short": f"fixed {SHORT_TOKENS} tokens",
        "student_reverse": f"fixed {LONG_TOKENS} tokens",
        "student_reverse_curriculum": "entropy-gated curriculum",
    },
    "columns": ("avg_at_k", "pass_at_k", "response_tokens", "entropy_nats", "truncated_frac", "horizon_tokens"),
}


def _training_length() -> Question:
    short = Group(f"{SHORT_TOKENS} tokens", ("student_reverse_short",))
    long = Group(f"{LONG_TOKENS} tokens", ("student_reverse",))
    return Question(
        title="Training length: accuracy against stability",
        claim="A long horizon is more accurate, but its entropy collapses and its responses grow.",
        **_HORIZONS,
        figures=(
            StudyFigure(
                "training_length",
                "Held-out accuracy, length and entropy over training",
                "path",
                ("avg_at_k", "response_tokens", "entropy_nats"),
            ),
        ),
        comparisons=(
            Comparison("avg_at_k", long, short),
            Comparison("entropy_nats", short, long),
            Comparison("response_tokens", long, short),
        ),
    )


def _kl_mixing() -> Question:
    mix = Group("w = 0.2", ("student_w20",))
    reverse, forward = Group("w = 1", ("student_reverse",)), Group("w = 0", ("student_forward",))
    return Question(
        title="Remedy: KL mixing",
        claim="Mostly forward KL (w = 0.2) is more accurate than either end, and has more entropy and shorter responses than "
        "reverse KL.",
        arms={
            "student_reverse": "w = 1, reverse KL",
            **{name: f"w = {w}" for w, name in MIXED_WEIGHTS.items()},
            "student_forward": "w = 0, forward KL",
        },
        columns=("avg_at_k", "pass_at_k", "response_tokens", "entropy_nats", "truncated_frac"),
        figures=(
            StudyFigure(
                "kl_mixing",
                "Against the weight of reverse KL",
                "dose",
                ("avg_at_k", "response_tokens", "entropy_nats"),
                "distill.reverse_kl_weight",
            ),
        ),
        comparisons=(
            Comparison("avg_at_k", mix, reverse),
            Comparison("avg_at_k", mix, forward),
            Comparison("entropy_nats", mix, reverse),
            Comparison("response_tokens", reverse, mix),
        ),
    )


def _curriculum() -> Question:
    gated = Group("the curriculum", ("student_reverse_curriculum",))
    fixed = Group(f"fixed {LONG_TOKENS} tokens", ("student_reverse",))
    return Question(
        title="Remedy: entropy-gated length curriculum",
        claim="The curriculum has higher Avg@k and Pass@k than the fixed long horizon, and shorter responses.",
        **_HORIZONS,
        figures=(
            StudyFigure(
                "curriculum_steps",
                "Horizon, length and entropy of the rollouts",
                "curves",
                ("horizon_tokens", "response_tokens", "student_entropy_nats"),
            ),
        ),
        comparisons=(
            Comparison("avg_at_k", gated, fixed),
            Comparison("pass_at_k", gated, fixed),
            Comparison("response_tokens", fixed, gated),
        ),
    )
