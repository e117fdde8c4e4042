"""The questions of arXiv 2605.16826 at its own scale: Qwen3-0.6B-Base from Qwen3-4B or 8B, on DeepScaleR, 8 GPUs a run.

    megatron-distill study qwen3_studies.from_4b --dir runs/study-qwen3 --cluster example_h100    # or from_8b, or stop_tokens
    megatron-distill study qwen3_studies.from_4b --cluster example_h100 --quick                   # 20 steps an arm, one seed

In one folder from_4b and stop_tokens make the arms that they share once. All studies are validated by the tests and have not
been run: that takes GPUs. What they ask on two cores, and what came of it, is in docs/study. Held-out problems are those of
MATH-500 (200 of them) every 100 steps; ``megatron-distill eval RUN --set aime24`` measures a finished run elsewhere.
"""

from dataclasses import replace

from megatron_distill.recipes import qwen3

from megatron_distill.config import RunConfig, with_overrides
from megatron_distill.config.schedules import constant
from megatron_distill.study.design import Arm, Comparison, Group, Question, Study, StudyFigure

SEEDS = (1, 2, 3)
_COLUMNS = ("avg_at_k", "pass_at_k", "response_tokens", "entropy_nats", "truncated_frac", "horizon_tokens", "seconds")
_OVER_STEPS = ("avg_at_k", "response_tokens", "entropy_nats")
_QUICK = ("num_steps=20", "save_every_steps=0", "evaluation.num_problems=50", "evaluation.every_steps=10")


def from_4b() -> Study:
    """The three trade-offs and both remedies, teacher Qwen3-4B: 7 arms, 3 seeds."""
    return _trade_offs("4B", qwen3.b06_from_4b_1x8_128(), qwen3.b06_from_4b_1x8_4096(), qwen3.b06_from_4b_1x8_eglc())


def from_8b() -> Study:
    """The three trade-offs and both remedies, teacher Qwen3-8B: 7 arms, 3 seeds."""
    return _trade_offs("8B", qwen3.b06_from_8b_1x8_128(), qwen3.b06_from_8b_1x8_4096(), qwen3.b06_from_8b_1x8_eglc())


def stop_tokens() -> Study:
    """How much of length inflation comes from a base model's stop token that is not the chat teacher's: 4 arms, 3 seeds."""
    long = qwen3.b06_from_4b_1x8_4096()
    arms: list[Arm] = []
    questions: list[Question] = []
    for weight, direction in ((1.0, "reverse"), (0.0, "forward")):
        merged = Arm(f"4b_{direction}", f"{direction} KL, merged", _weighted(long, weight))
        own_stop = replace(merged.config.rollouts, stop_tokens=("<|endoftext|>",))
        unmerged = Arm(
            f"4b_{direction}_unmerged", f"{direction} KL, not merged", replace(merged.config, rollouts=own_stop)
        )
        arms += [merged, unmerged]
        questions.append(
            _question(
                f"Stop tokens: {direction} KL",
                "Two stop tokens that are not merged make responses longer, and less accurate.",
                (merged, unmerged),
                Comparison("response_tokens", Group.of(unmerged), Group.of(merged)),
                Comparison("avg_at_k", Group.of(merged), Group.of(unmerged)),
            )
        )
    return _study(
        "qwen3-stop-tokens", "Stop tokens and length, Qwen3-0.6B from 4B", "stop_tokens", arms, tuple(questions)
    )


def _trade_offs(size: str, short: RunConfig, long: RunConfig, gated: RunConfig) -> Study:
    tag = size.lower()
    reverse = Arm(f"{tag}_reverse", "student prefix, reverse KL", long)
    forward = Arm(f"{tag}_forward", "student prefix, forward KL", _weighted(long, 0.0))
    mixed = Arm(f"{tag}_w20", "student prefix, w = 0.2", _weighted(long, 0.2))
    off_reverse = Arm(f"{tag}_teacher_reverse", "teacher prefix, reverse KL", _teacher_written(long, 1.0))
    off_forward = Arm(f"{tag}_teacher_forward", "teacher prefix, forward KL", _teacher_written(long, 0.0))
    brief = Arm(f"{tag}_reverse_128", "student prefix, reverse KL, 128 tokens", short)
    curriculum = Arm(
        f"{tag}_reverse_gated",
        "student prefix, reverse KL, curriculum",
        gated,
        quick_overrides=("curriculum.stage_steps=5",),
    )
    arms = [reverse, forward, mixed, off_reverse, off_forward, brief, curriculum]
    grid = (off_forward, off_reverse, forward, reverse)
    directions = Group.of(reverse, off_reverse, label="reverse KL"), Group.of(forward, off_forward, label="forward KL")
    sources = (
        Group.of(forward, reverse, label="student prefixes"),
        Group.of(off_forward, off_reverse, label="teacher prefixes"),
    )
    questions = (
        _question(
            "KL direction and prefix source",
            "Reverse KL is more accurate, forward KL keeps more entropy; student prefixes are more accurate, and cost more.",
            grid,
            Comparison("avg_at_k", *directions),
            Comparison("entropy_nats", *reversed(directions)),
            Comparison("avg_at_k", *sources),
            Comparison("seconds", *sources),
        ),
        _question(
            "Training length",
            "A long horizon is more accurate, but its entropy collapses and its responses grow.",
            (brief, reverse),
            Comparison("avg_at_k", Group.of(reverse), Group.of(brief)),
            Comparison("entropy_nats", Group.of(brief), Group.of(reverse)),
            Comparison("response_tokens", Group.of(reverse), Group.of(brief)),
        ),
        _question(
            "Remedy: KL mixing",
            "Mostly forward KL (w = 0.2) is more accurate than either end, with shorter responses than reverse KL.",
            (reverse, mixed, forward),
            Comparison("avg_at_k", Group.of(mixed), Group.of(reverse)),
            Comparison("avg_at_k", Group.of(mixed), Group.of(forward)),
            Comparison("response_tokens", Group.of(reverse), Group.of(mixed)),
        ),
        _question(
            "Remedy: entropy-gated length curriculum",
            "The curriculum is more accurate than 4096 tokens throughout, with shorter responses.",
            (reverse, curriculum),
            Comparison("avg_at_k", Group.of(curriculum), Group.of(reverse)),
            Comparison("pass_at_k", Group.of(curriculum), Group.of(reverse)),
            Comparison("response_tokens", Group.of(reverse), Group.of(curriculum)),
        ),
    )
    return _study(f"qwen3-{tag}", f"Trade-offs of distillation, Qwen3-0.6B from {size}", f"from_{tag}", arms, questions)


def _study(name: str, title: str, function: str, arms: list[Arm], questions: tuple[Question, ...]) -> Study:
    return Study(
        name=name,
        title=title,
        scope="Qwen3-0.6B-Base learns mathematics from a larger Qwen3, with the settings of arXiv 2605.16826.",
        command=f"megatron-distill study qwen3_studies.{function} --dir runs/study-qwen3 --cluster PROFILE",
        arms=tuple(arms),
        seeds=SEEDS,
        questions=questions,
        quick_arms=tuple(arm.name for arm in arms),
        quick_overrides=_QUICK,
    )


def _question(title: str, claim: str, arms: tuple[Arm, ...], *comparisons: Comparison) -> Question:
    name = title.split(":")[-1].strip().lower().replace(" ", "_").replace("-", "_")
    return Question(
        title=title,
        claim=claim,
        arms={arm.name: arm.label for arm in arms},
        columns=_COLUMNS,
        figures=(StudyFigure(name, "Over training", "path", _OVER_STEPS),),
        comparisons=comparisons,
    )


def _weighted(config: RunConfig, reverse_kl_weight: float) -> RunConfig:
    return replace(config, distill=replace(config.distill, reverse_kl_weight=constant(reverse_kl_weight)))


def _teacher_written(config: RunConfig, reverse_kl_weight: float) -> RunConfig:
    """A cell of the sweep, with which the servers change too."""
    return with_overrides(config, qwen3.SWEEP[f"teacher_prefix_w{reverse_kl_weight}"])
