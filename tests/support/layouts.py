"""Whole training jobs without servers, on any layout: what they are asked, and what they leave.

Each is ``tests.support.train_job`` on ranks of its own: the real session, Megatron's own ``pretrain``, and samples that are a
function of the step.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_distill import config as config_module
from megatron_distill.megatron.backend import MegatronBackend
from megatron_distill.runs.run_folder import RunFolder
from tests.support.rank_forge import RankForge
from tests.support.tiny_models import build_hf_model

VOCAB_SIZE = 100
NUM_STEPS = 3


@dataclass(frozen=True)
class Outcome:
    """What a job left behind."""

    steps: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


def save_random_model(
    path: Path,
    seed: int,
    *,
    num_layers: int = 2,
    num_experts: int = 0,
    hidden_size: int = 32,
    num_key_value_heads: int = 2,
    tied: bool = False,
) -> Path:
    """A tiny random Qwen3 of ``VOCAB_SIZE`` tokens; with experts, every second of which works on a token."""
    experts = {"num_experts": num_experts, "num_experts_per_tok": num_experts // 2} if num_experts else {}
    build_hf_model(
        "qwen3-moe" if num_experts else "qwen3",
        seed,
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        num_key_value_heads=num_key_value_heads,
        tie_word_embeddings=tied,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        head_dim=8,
        max_position_embeddings=128,
        **experts,
    ).save_pretrained(path)
    return path


def run_jobs(
    models: Path,
    root: Path,
    layouts: Mapping[str, dict[str, object]],
    forge: RankForge,
    backend: MegatronBackend | None = None,
) -> dict[str, Outcome]:
    """The outcome of every layout's job, by its name; two jobs at a time."""
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            name: pool.submit(run_job, models, root / name, overrides, backend, forge=forge)
            for name, overrides in layouts.items()
        }
        return {name: job.result() for name, job in jobs.items()}


def assert_same(outcome: Outcome, reference: Outcome, *, rel: float = 2e-4, atol: float = 2e-3) -> None:
    """Losses, entropies, gradient norms and trained weights agree to rounding.

    Args:
        outcome: of one layout.
        reference: of another.
        rel: of a metric.
        atol: of a weight; Adam makes as much of a small gradient as of a large one, the rounding of a zero included.
    """
    assert len(outcome.steps) == len(reference.steps) > 0
    for ours, theirs in zip(outcome.steps, reference.steps, strict=True):
        for name in ("loss", "forward_kl_nats", "reverse_kl_nats", "student_entropy_nats", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=rel), name
        assert ours["scored_tokens"] == theirs["scored_tokens"]
    assert outcome.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        trained = outcome.weights[name].to(weight.dtype)
        torch.testing.assert_close(trained, weight, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def run_job(
    models: Path,
    run_dir: Path,
    overrides: dict[str, object],
    backend: MegatronBackend | None = None,
    *,
    forge: RankForge,
) -> Outcome:
    """Write the config, run the job to its end on ranks of a forge, and read what it left."""
    base = {
        "num_steps": NUM_STEPS,
        "micro_batch_rollouts": 5,
        "student.path": str(models / "student"),
        "teacher.path": str(models / "teacher"),
        "data.train_path": "unused",
        "data.heldout_path": "unused",
        "data.max_prompt_tokens": 16,
        "evaluation.max_response_tokens": 32,
        "curriculum.horizon_tokens": 32,
        "rollouts.prompts_per_step": 20,
        "optimizer.lr": 0.01,
    }
    lines = [f"{key}={json.dumps(value)}" for key, value in (base | overrides).items()]
    config = config_module.with_overrides(config_module.RunConfig(), lines)
    folder = RunFolder(run_dir)
    folder.create()
    config_module.save(config, folder.config)
    arguments = [str(run_dir), *([json.dumps(asdict(backend))] if backend else [])]
    forge.run("tests.support.train_job", config.num_ranks, arguments, run_dir / "ranks")
    return Outcome(folder.steps(), load_file(folder.hf / "model.safetensors"))
