"""What only a GPU run chooses, run on CPU with stand-ins for the kernels: packed rows, sequence parallelism, bf16, overlap.

The stand-ins (``models/local_layers``) take the place of Transformer Engine's attention and norm; everything around them,
Megatron's packed rotary embeddings, reductions, optimizer and gathers and this project's batches, is what a GPU runs.
"""

import pytest
import torch

from megatron_distill.megatron.backend import MegatronBackend
from tests.support.layouts import NUM_STEPS, Outcome, assert_same, run_jobs, save_random_model
from tests.support.rank_forge import RankForge

pytestmark = pytest.mark.heavy

PACKED = MegatronBackend(use_transformer_engine=False, packed_kernels=True, needs_mask=False)
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]

IN_PROCESS: dict[str, object] = {"teacher.transport": "in_process"}
TP2: dict[str, object] = {"student.parallel.tp": 2, "student.parallel.sequence_parallel": True}
DP2: dict[str, object] = {
    "student.parallel.dp": 2,
    "student.distributed_optimizer": True,
    "student.megatron_args": OVERLAP,
}
BY_MASK: dict[str, dict[str, object]] = {
    "mask_tp1": {},
    "mask_in_process_tp1": IN_PROCESS,
    "mask_tp2_sequence_parallel": TP2,
}
BY_PACKING: dict[str, dict[str, object]] = {
    "packed_tp1": {},
    "packed_tp2_sequence_parallel": TP2,
    "packed_in_process_tp2_sequence_parallel": IN_PROCESS | TP2,
    "packed_pp2_recompute": {"student.parallel.pp": 2, "student.recompute": "full"},
    "packed_dp2_overlap": DP2,
    "packed_dp2_overlap_bf16": DP2 | {"student.dtype": "bf16"},
}


@pytest.fixture(scope="module")
def outcomes(forge: RankForge, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every layout's outcome."""
    models, root = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("runs")
    save_random_model(models / "student", seed=1)
    save_random_model(models / "teacher", seed=2)
    return run_jobs(models, root, BY_MASK, forge) | run_jobs(models, root, BY_PACKING, forge, PACKED)


@pytest.mark.parametrize("layout", ["mask_tp2_sequence_parallel", *BY_PACKING])
def test_layout_equals_the_mask_path_on_one_rank(layout: str, outcomes: dict[str, Outcome]) -> None:
    """Losses, entropies, gradient norms and trained weights agree to the rounding of the dtype."""
    outcome = outcomes[layout]
    assert len(outcome.steps) == NUM_STEPS
    is_bf16 = "bf16" in layout
    assert {weight.dtype for weight in outcome.weights.values()} == {torch.bfloat16 if is_bf16 else torch.float32}
    reference = outcomes["mask_in_process_tp1" if "in_process" in layout else "mask_tp1"]
    assert_same(outcome, reference, **({"rel": 3e-2, "atol": 3e-2} if is_bf16 else {}))
