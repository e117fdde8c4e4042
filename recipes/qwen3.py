"""Qwen3 on GPUs, with the settings of "Decoupling KL and Trajectories" (arXiv 2605.16826). Names say student, teacher, nodes x
GPUs, horizon. These recipes are validated and planned by the tests; they have not been run: that takes GPUs.

    megatron-distill plan   qwen3.b06_from_4b_1x8_4096
    megatron-distill train  qwen3.b06_from_4b_1x8_4096                            # on the node itself
    megatron-distill launch qwen3.b06_from_4b_1x8_4096 --cluster ours.py:ours     # as a Slurm job
    cell=$(python -m megatron_distill.recipes.qwen3 teacher_prefix_w1.0) &&       # one cell of the sweep
        megatron-distill launch qwen3.b06_from_4b_1x8_4096 --cluster ours.py:ours name=offline_rl $cell

Models and data are named by their hub ids: `megatron-distill fetch qwen3.b06_from_4b_1x8_4096` brings them; paths do as well
(student.path=DIR data.train_path=FILE). One step trains on 32 responses, with the teacher's whole distribution where it fits
the trainer.
"""

import sys
from dataclasses import replace

from megatron_distill.config import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EntropyGated,
    EvalConfig,
    FixedHorizon,
    OptimizerConfig,
    ParallelConfig,
    RlConfig,
    RolloutConfig,
    RunConfig,
    ServersConfig,
    StudentConfig,
    TeacherConfig,
)
from megatron_distill.config.schedules import constant

LADDER_TOKENS = (128, 256, 512, 1024, 2048, 4096)

SWEEP = {
    f"{prefix}_prefix_w{weight}": (f"distill.reverse_kl_weight={weight}", *overrides)
    for prefix, overrides in {
        "student": ("rollouts.student_prefix_frac=1",),
        # The teacher writes every response, so it gets the servers; the student's remaining one is for evaluation.
        "teacher": (
            "rollouts.student_prefix_frac=0",
            "servers.student_replicas=1",
            "servers.teacher_replicas=3",
        ),
    }.items()
    for weight in (0.0, 0.2, 0.5, 0.8, 1.0)
}
"""The design space as overrides of a one-node recipe: who writes the prefix, and the weight of reverse KL. ``w1.0`` with the
student's prefixes is on-policy distillation, ``w0.0`` with the teacher's is off-policy SFT with soft targets."""


def _paper(name: str, teacher: str | None, horizon_tokens: int) -> RunConfig:
    """The paper's common settings, and a layout for one node of 8: 4 ranks with the teacher inside, 4 student servers."""
    return RunConfig(
        name=name,
        num_steps=1000,
        micro_batch_rollouts=8 if horizon_tokens <= 128 else 1,  # about the same number of tokens
        save_every_steps=100,
        checkpoints=CheckpointConfig(keep_last=2, keep_best="avg_at_k"),
        student=StudentConfig(
            path="Qwen/Qwen3-0.6B-Base", parallel=ParallelConfig(dp=4), dtype="bf16", distributed_optimizer=True
        ),
        teacher=TeacherConfig(path=f"Qwen/{teacher}", transport="in_process") if teacher else TeacherConfig(),
        data=DataConfig(
            train_path="agentica-org/DeepScaleR-Preview-Dataset:train",
            heldout_path="HuggingFaceH4/MATH-500:test",
            prompt_key="problem",
            answer_key="answer",
            instruction="Please reason step by step, and put your final answer within \\boxed{}.",
            template_options={"enable_thinking": False},  # a thinking teacher would fill any horizon
            on_bad_rows="drop",  # the few without an answer or longer than this; counted in the run's events
            max_prompt_tokens=1024,
        ),
        rollouts=RolloutConfig(
            prompts_per_step=32,
            temperature=1.0,
            top_p=0.95,
            top_k=20,
            # The base student ends with the one, the teacher with the other: one action, or lengths inflate.
            stop_tokens=("<|endoftext|>", "<|im_end|>"),
        ),
        curriculum=FixedHorizon(horizon_tokens=constant(horizon_tokens)),
        distill=DistillConfig(reverse_kl_weight=constant(1.0)),
        optimizer=OptimizerConfig(lr=5e-7, warmup_frac=0.05),
        evaluation=EvalConfig(
            num_problems=200,
            samples_per_problem=3,
            temperature=0.6,
            top_p=0.95,
            top_k=20,
            max_response_tokens=8192,
            every_steps=100,
        ),
        servers=ServersConfig(
            student_replicas=4, weight_sync="broadcast", startup_timeout_s=1800.0, requests_per_replica=256
        ),
    )


def b06_from_4b_1x8_128() -> RunConfig:
    """Qwen3-0.6B-Base from Qwen3-4B, 8 GPUs, responses of 128 tokens, reverse KL at the student's prefixes."""
    return _paper("b06_from_4b_1x8_128", "Qwen3-4B", 128)


def b06_from_4b_1x8_4096() -> RunConfig:
    """Qwen3-0.6B-Base from Qwen3-4B, 8 GPUs, responses of 4096 tokens, reverse KL at the student's prefixes."""
    return _paper("b06_from_4b_1x8_4096", "Qwen3-4B", 4096)


def b06_from_4b_1x8_4096_mixed() -> RunConfig:
    """As before with mostly forward KL (w = 0.2), which the paper found best at this length."""
    config = b06_from_4b_1x8_4096()
    return replace(config, name="b06_from_4b_1x8_4096_mixed", distill=DistillConfig(reverse_kl_weight=constant(0.2)))


def b06_from_4b_1x8_eglc() -> RunConfig:
    """Qwen3-0.6B-Base from Qwen3-4B, 8 GPUs, entropy-gated length curriculum from 128 to 4096 tokens, reverse KL."""
    return _with_curriculum(_paper("b06_from_4b_1x8_eglc", "Qwen3-4B", 4096))


def b06_from_8b_1x8_128() -> RunConfig:
    """Qwen3-0.6B-Base from Qwen3-8B, 8 GPUs, responses of 128 tokens, reverse KL at the student's prefixes."""
    return _paper("b06_from_8b_1x8_128", "Qwen3-8B", 128)


def b06_from_8b_1x8_4096() -> RunConfig:
    """Qwen3-0.6B-Base from Qwen3-8B, 8 GPUs, responses of 4096 tokens, reverse KL at the student's prefixes."""
    return _paper("b06_from_8b_1x8_4096", "Qwen3-8B", 4096)


def b06_from_8b_1x8_eglc() -> RunConfig:
    """Qwen3-0.6B-Base from Qwen3-8B, 8 GPUs, entropy-gated length curriculum from 128 to 4096 tokens, reverse KL."""
    return _with_curriculum(_paper("b06_from_8b_1x8_eglc", "Qwen3-8B", 4096))


def b06_grpo_1x8_4096() -> RunConfig:
    """GRPO on accuracy, 8 GPUs, responses of 4096 tokens: 4 groups of 8 (the paper says 32 a batch, and no group size).

    After a distillation, name its result: student.path=runs/b06_from_4b_1x8_4096_mixed/hf.
    """
    config = _paper("b06_grpo_1x8_4096", None, 4096)
    return replace(
        config,
        rollouts=replace(config.rollouts, prompts_per_step=4, rollouts_per_prompt=8, top_p=1.0, top_k=-1),
        distill=DistillConfig(weight=0.0),
        rl=RlConfig(weight=1.0),
        optimizer=OptimizerConfig(lr=1e-6, warmup_frac=0.05),
    )


def b8_from_32b_4x8_4096() -> RunConfig:
    """Qwen3-8B-Base from Qwen3-32B, four nodes of 8: two train (tp 4 x dp 4), one samples, one scores its top 64."""
    config = _paper("b8_from_32b_4x8_4096", "Qwen3-32B", 4096)
    return replace(
        config,
        student=StudentConfig(
            path="Qwen/Qwen3-8B-Base",
            parallel=ParallelConfig(tp=4, dp=4, sequence_parallel=True),
            dtype="bf16",
            distributed_optimizer=True,
        ),
        teacher=TeacherConfig(path="Qwen/Qwen3-32B", transport="sglang_topk", num_logprobs=64),
        distill=DistillConfig(reverse_kl_weight=constant(0.2)),
        servers=replace(config.servers, student_replicas=8, teacher_replicas=4, teacher_tp=2),
    )


def moe30b_from_32b_4x8_2048() -> RunConfig:
    """Qwen3-30B-A3B-Base (128 experts, 8 a token) from Qwen3-32B, four nodes of 8: two train (tp 2 x dp 8, ep 8)."""
    config = _paper("moe30b_from_32b_4x8_2048", "Qwen3-32B", 2048)
    return replace(
        config,
        student=StudentConfig(
            path="Qwen/Qwen3-30B-A3B-Base",
            # The experts lie over the 8 GPUs of a node, whole: their tokens never leave it.
            parallel=ParallelConfig(tp=2, dp=8, ep=8, etp=1, sequence_parallel=True),
            dtype="bf16",
            distributed_optimizer=True,
            recompute="full",
        ),
        teacher=TeacherConfig(path="Qwen/Qwen3-32B", transport="sglang_topk", num_logprobs=64),
        distill=DistillConfig(reverse_kl_weight=constant(0.2)),
        servers=replace(config.servers, student_replicas=4, student_tp=2, teacher_replicas=4, teacher_tp=2),
    )


def _with_curriculum(config: RunConfig) -> RunConfig:
    """The same run, climbing the ladder: one rung every 150 steps while the held-out entropy allows it."""
    curriculum = EntropyGated(ladder_tokens=LADDER_TOKENS, stage_steps=150)
    return replace(config, curriculum=curriculum)


if __name__ == "__main__":
    cell = sys.argv[1] if len(sys.argv) > 1 else ""
    if cell not in SWEEP:
        sys.exit(f"usage: python -m megatron_distill.recipes.qwen3 CELL, with CELL one of: {', '.join(SWEEP)}")
    print(" ".join(SWEEP[cell]))
