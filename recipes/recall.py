"""Runs on the recall task, where distillation can go wrong: a teacher that hesitates, a student that is wrong about facts.

    megatron-distill train recall.distil                                    # mostly forward KL, which is well behaved
    megatron-distill train recall.distil distill.reverse_kl_weight=1        # reverse KL over the long horizon, which runs away
    megatron-distill train recall.self_distillation                         # a model under itself, which has the book open

The studies over these runs are in ``recall_studies``; the task, and how its models were made, in ``recall_task``.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_distill.recipes.recall_task import OpenBookProblem, OtherPageProblem

from megatron_distill.config import (
    DataConfig,
    DistillConfig,
    EntropyGated,
    EvalConfig,
    FixedHorizon,
    Ladder,
    OptimizerConfig,
    Progressive,
    RlConfig,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from megatron_distill.config.schedules import constant
from megatron_distill.rollouts.prompts import encode_prompt
from megatron_distill.types import Problem

MODELS = Path(__file__).parent / "recall_models"
SHORT_TOKENS, MIDDLE_TOKENS, LONG_TOKENS = 24, 64, 160  # about 1, 2.5 and 6 times a natural response
NUM_STEPS = 200
LR = 1e-3
TEACHER_ENTROPY_NATS = 0.25  # of the teacher on its own responses: what a healthy student comes near to

LADDER = Ladder(ladder_tokens=(SHORT_TOKENS, MIDDLE_TOKENS, LONG_TOKENS), stage_steps=60)
GATED = EntropyGated(
    ladder_tokens=LADDER.ladder_tokens, stage_steps=LADDER.stage_steps, min_entropy_nats=TEACHER_ENTROPY_NATS / 2
)
HASTY_LADDER = Ladder(ladder_tokens=LADDER.ladder_tokens, stage_steps=20)
HASTY_GATED = replace(GATED, stage_steps=HASTY_LADDER.stage_steps)
PROGRESSIVE = Progressive(start_tokens=SHORT_TOKENS, growth_tokens=17, end_tokens=LONG_TOKENS, stage_steps=20)


def distil() -> RunConfig:
    """Distillation at the student's prefixes, w = 0.2, 160 tokens; full vocabulary, one trainer rank."""
    return RunConfig(
        name="recall",
        num_steps=NUM_STEPS,
        micro_batch_rollouts=32,
        save_every_steps=50,
        student=StudentConfig(path=str(MODELS / "student")),
        teacher=TeacherConfig(path=str(MODELS / "teacher"), transport="in_process"),
        data=DataConfig(
            train_path=str(MODELS / "train.jsonl"), heldout_path=str(MODELS / "heldout.jsonl"), max_prompt_tokens=16
        ),
        rollouts=RolloutConfig(prompts_per_step=32, stop_tokens=("<|endoftext|>", "<|im_end|>")),
        curriculum=FixedHorizon(horizon_tokens=constant(LONG_TOKENS)),
        distill=DistillConfig(reverse_kl_weight=constant(0.2)),
        optimizer=OptimizerConfig(lr=LR, warmup_frac=0.1),
        evaluation=EvalConfig(
            num_problems=500,
            samples_per_problem=1,
            temperature=1.0,
            top_p=1.0,
            top_k=-1,
            max_response_tokens=LONG_TOKENS,  # for every arm, whatever it trains with
            every_steps=50,
        ),
    )


def with_weight(config: RunConfig, reverse_kl_weight: float) -> RunConfig:
    """The same run with another weight of reverse KL."""
    return replace(config, distill=replace(config.distill, reverse_kl_weight=constant(reverse_kl_weight)))


def with_horizon(config: RunConfig, horizon_tokens: int) -> RunConfig:
    """The same run with another fixed horizon."""
    return replace(config, curriculum=FixedHorizon(horizon_tokens=constant(horizon_tokens)))


def with_teacher_prefixes(config: RunConfig) -> RunConfig:
    """The same run at what the teacher writes."""
    return replace(config, rollouts=replace(config.rollouts, student_prefix_frac=constant(0)))


def with_staleness(config: RunConfig, max_staleness_steps: int) -> RunConfig:
    """The same run at what earlier weights write, of up to so many steps before."""
    return replace(config, rollouts=replace(config.rollouts, max_staleness_steps=max_staleness_steps))


def with_flat_teacher(config: RunConfig) -> RunConfig:
    """The same run under the teacher that hesitates with the same chance each time."""
    return replace(config, teacher=replace(config.teacher, path=str(MODELS / "teacher_flat")))


def with_own_stop_only(config: RunConfig) -> RunConfig:
    """The same run with stop tokens left as base and chat models have them: the student's own ends a response, and the
    teacher's, another one, is neither waited for nor the same action."""
    return replace(config, rollouts=replace(config.rollouts, stop_tokens=("<|endoftext|>",)))


def with_top_k(config: RunConfig, num_logprobs: int, tail: str = "bucket") -> RunConfig:
    """The same run under a served teacher that tells its likeliest tokens only; 64 are all of them."""
    return replace(
        config,
        teacher=replace(config.teacher, transport="sglang_topk", num_logprobs=num_logprobs, tail=tail),  # type: ignore[arg-type]
    )


def with_hidden_states(config: RunConfig) -> RunConfig:
    """The same run under a served teacher that tells its hidden states, which hold all of its distribution."""
    return replace(config, teacher=replace(config.teacher, transport="sglang_hidden"))


def by_sequence(config: RunConfig) -> RunConfig:
    """The same run with the mean over responses of their means: a long response weighs no more than a short one."""
    return replace(config, distill=replace(config.distill, normalisation="sequence"))


def self_distillation() -> RunConfig:
    """The reader learns by heart what it can read: its teacher is itself, as it began, with the facts before it (64 scores are
    its whole distribution)."""
    config = with_top_k(distil(), 64)
    reader = str(MODELS / "reader")
    return replace(
        config,
        name="recall-self-distillation",
        student=replace(config.student, path=reader),
        teacher=replace(config.teacher, path=reader, prompt_builder=f"{__file__}:open_book", max_prompt_tokens=36),
    )


def open_book(tokenizer: Any, problem: Problem) -> list[int]:
    """What the teacher sees of a problem: the facts that it needs, then the question."""
    return _shown(tokenizer, problem, OpenBookProblem)


def another_page(tokenizer: Any, problem: Problem) -> list[int]:
    """As many other facts, then the question: the control."""
    return _shown(tokenizer, problem, OtherPageProblem)


def _shown(tokenizer: Any, problem: Problem, kind: type[OpenBookProblem]) -> list[int]:
    last = problem.messages[-1]
    start, *tables = last.content.split()
    told = replace(last, content=kind(int(start), "".join(tables)).prompt())
    return encode_prompt(tokenizer, replace(problem, messages=(*problem.messages[:-1], told)))


def with_another_page(config: RunConfig) -> RunConfig:
    """The same run under a teacher whose book is open at another page."""
    return replace(config, teacher=replace(config.teacher, prompt_builder=f"{__file__}:another_page"))


def by_heart(config: RunConfig) -> RunConfig:
    """The same run under the larger teacher, which sees what the student does."""
    teacher = replace(config.teacher, path=distil().teacher.path, prompt_builder="same", max_prompt_tokens=None)
    return replace(config, teacher=teacher)


def grpo() -> RunConfig:
    """Group-relative policy optimisation from the student as it is: 16 prompts of 8 responses a step, 64 tokens at most."""
    config = with_horizon(distil(), MIDDLE_TOKENS)
    return replace(
        config,
        name="recall-grpo",
        num_steps=150,
        micro_batch_rollouts=64,
        rollouts=replace(config.rollouts, prompts_per_step=16, rollouts_per_prompt=8),
        distill=DistillConfig(weight=0.0),
        rl=RlConfig(weight=1.0),
        optimizer=replace(config.optimizer, lr=5e-4),
    )
