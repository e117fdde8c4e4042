"""Runs on a laptop's CPU: a tiny teacher and student on chained arithmetic, the same code path as a cluster's.

megatron-distill train tiny.quickstart
megatron-distill train tiny.quickstart distill.reverse_kl_weight=1 rollouts.student_prefix_frac=0
"""

from pathlib import Path

from megatron_distill.config import (
    CurriculumConfig,
    DataConfig,
    DistillConfig,
    EvalConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from megatron_distill.schedules import constant

MODELS = Path(__file__).parent / "tiny_models"


def quickstart() -> RunConfig:
    """On-policy distillation with mostly forward KL, two trainer ranks, minutes on two cores."""
    return RunConfig(
        name="quickstart",
        num_steps=40,
        micro_batch_rollouts=16,
        student=StudentConfig(path=str(MODELS / "student"), tp=2),
        teacher=TeacherConfig(path=str(MODELS / "teacher"), top_k=64),
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
        curriculum=CurriculumConfig(horizon_tokens=constant(160)),
        distill=DistillConfig(reverse_kl_weight=constant(0.2)),
        optimizer=OptimizerConfig(lr=2e-3, warmup_frac=0.1),
        evaluation=EvalConfig(
            num_problems=100,
            samples_per_problem=4,
            temperature=1.0,
            top_p=1.0,
            top_k=-1,
            max_response_tokens=192,
        ),
    )
