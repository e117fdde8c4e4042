"""A checkpoint belongs to no layout: what one saves, every other resumes from.

Not every pair is run, and none needs to be. A relay trains each step of one run under another layout, from the checkpoint that
the layout before it left, and is held step by step against a run on one rank that is never stopped. Since each layout's
checkpoint holds the very tensors of that run's, by the same names and with the same values to rounding, whoever resumes from
one of them resumes from any.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_distill.runs.checkpoints import directory_of
from megatron_distill.runs.run_folder import RunFolder
from tests.support.layouts import VOCAB_SIZE, run_job, save_random_model
from tests.support.rank_forge import RankForge

pytestmark = pytest.mark.heavy


@dataclass(frozen=True)
class Near:
    """How far apart two layouts may be: losses and gradient norms relatively, weights absolutely, Adam's moments in parts of a
    tensor's largest. In bf16 gradients differ by their rounding; a moment that is lost, or another parameter's, by more."""

    loss: float
    weight: float
    moment: float


FP32, BF16 = Near(1e-4, 1e-5, 1e-4), Near(2e-2, 2e-2, 0.3)


def layout(sequence_parallel: bool = False, **sizes: int) -> dict[str, object]:
    """Overrides of ``student.parallel``."""
    parallel: dict[str, object] = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1, "ep": 1, "etp": None}
    parallel |= {"sequence_parallel": sequence_parallel, **sizes}
    return {f"student.parallel.{name}": value for name, value in parallel.items()}


EXPERTS = [
    layout(dp=2, ep=2),
    layout(tp=2, sequence_parallel=True),
    layout(pp=2, vpp=2),
    layout(cp=2),
    layout(tp=2, ep=2, etp=1, sequence_parallel=True),
    layout(dp=2),
    layout(pp=2, dp=2, ep=2),
    layout(dp=2, etp=2),
    layout(),
    layout(tp=2, dp=2, ep=2, sequence_parallel=True),
    layout(cp=2, ep=2),
    layout(tp=2, dp=2, ep=4, etp=1, sequence_parallel=True),
    layout(pp=2, tp=2, sequence_parallel=True),
]
DENSE = [
    layout(tp=2),
    layout(pp=2, cp=2),
    layout(tp=2, dp=2, sequence_parallel=True),
    layout(pp=2, vpp=2),
    layout(dp=2),
]


@pytest.mark.parametrize(
    ("num_experts", "distributed_optimizer", "dtype"),
    [
        pytest.param(4, True, "fp32", id="experts_distributed_optimizer"),
        pytest.param(0, True, "bf16", id="dense_bf16"),
        pytest.param(4, False, "fp32", id="experts", marks=pytest.mark.long),
        pytest.param(0, False, "fp32", id="dense", marks=pytest.mark.long),
        pytest.param(0, True, "fp32", id="dense_distributed_optimizer", marks=pytest.mark.long),
    ],
)
def test_every_step_of_a_run_may_have_another_layout(
    num_experts: int, distributed_optimizer: bool, dtype: str, forge: RankForge, tmp_path: Path
) -> None:
    """Losses, gradient norms, exported students and every tensor of every checkpoint, optimizer's states included, are those of
    one rank. The dense student's output layer is its embedding, which a pipeline holds twice."""
    save_random_model(tmp_path / "student", seed=1, num_layers=4, num_experts=num_experts, tied=not num_experts)
    save_random_model(tmp_path / "teacher", seed=2)
    relay, unbroken = RunFolder(tmp_path / "relay"), RunFolder(tmp_path / "unbroken")
    layouts, near = EXPERTS if num_experts else DENSE, FP32 if dtype == "fp32" else BF16
    settings: dict[str, object] = {
        "student.dtype": dtype,
        "student.distributed_optimizer": distributed_optimizer,
        "optimizer.lr": 1e-3,
        "optimizer.warmup_frac": 0.0,
        "save_every_steps": 1,
    }
    whole = run_job(
        tmp_path, unbroken.root, settings | {"num_steps": len(layouts), "checkpoints.export_hf": True}, forge=forge
    )
    for step, one in enumerate(layouts, 1):
        leg = run_job(tmp_path, relay.root, settings | one | {"num_steps": step}, forge=forge)
        for name in ("loss", "grad_norm"):
            assert leg.steps[-1][name] == pytest.approx(whole.steps[step - 1][name], rel=near.loss), (step, name)
        exported = load_file(unbroken.hf_step(step) / "model.safetensors") if step < len(layouts) else whole.weights
        _assert_near(leg.weights, exported, near, step)
        _assert_near(_tensors(directory_of(relay, step)), _tensors(directory_of(unbroken, step)), near, step)


def _assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], near: Near, step: int) -> None:
    """The same names and values."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        off = near.moment * float(tensor.abs().max()) if ".exp_avg" in name else near.weight
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=off, msg=lambda text, n=name: f"{step} {n}: {text}")


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint's, whole, without the rows that pad its vocabulary, which tp decides."""
    reader = FileSystemReader(checkpoint)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    padded = ("word_embeddings.weight", "output_layer.weight")
    return {name: tensor[:VOCAB_SIZE] if name.endswith(padded) else tensor for name, tensor in tensors.items()}
