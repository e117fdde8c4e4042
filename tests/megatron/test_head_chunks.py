"""Logits made so many tokens at a time, in whole training jobs: nothing changes, on any layout."""

from pathlib import Path

import pytest

from tests.support.layouts import assert_same, run_jobs, save_random_model
from tests.support.rank_forge import RankForge

THREE = {"head_chunk_tokens": 3}
TP2 = THREE | {"student.parallel.tp": 2}
IN_PROCESS = {"teacher.transport": "in_process"}
RL = {"rl.weight": 1.0, "rl.reference_kl_coef": 0.1, "rollouts.rollouts_per_prompt": 2, "rollouts.prompts_per_step": 10}
PRODUCTS: dict[str, dict[str, object]] = {
    "whole": {},
    "tp2_sequence_parallel_dp2": TP2 | {"student.parallel.sequence_parallel": True, "student.parallel.dp": 2},
    "tp4": THREE | {"student.parallel.tp": 4},
    "pp2_tp2": TP2 | {"student.parallel.pp": 2},
    "pp2_vpp2": THREE | {"student.parallel.pp": 2, "student.parallel.vpp": 2},
    "cp2_tp2": TP2 | {"student.parallel.cp": 2},
    "overlapped_dp2": THREE
    | {"student.parallel.dp": 2, "student.distributed_optimizer": True}
    | {"student.megatron_args": ["--overlap-grad-reduce", "--overlap-param-gather"]},
    "rl_whole": RL,
    "rl_tp2_pp2": RL | TP2 | {"student.parallel.pp": 2},
    "in_process_whole": IN_PROCESS,
    "in_process_tp2_cp2": IN_PROCESS | TP2 | {"student.parallel.cp": 2},
    "in_process_tp2_sequence_parallel": IN_PROCESS | TP2 | {"student.parallel.sequence_parallel": True},
    "in_process_pp2_tp2": IN_PROCESS | TP2 | {"student.parallel.pp": 2, "student.recompute": "full"},
    "in_process_pp2_vpp2": IN_PROCESS | THREE | {"student.parallel.pp": 2, "student.parallel.vpp": 2},
}


def models(root: Path, *, num_layers: int = 2, tied: bool = False) -> Path:
    """A folder with a student and a wider teacher."""
    save_random_model(root / "student", seed=1, num_layers=num_layers, tied=tied)
    save_random_model(root / "teacher", seed=2, hidden_size=48, num_layers=3)
    return root


def test_chunks_over_two_ranks_change_nothing(forge: RankForge, tmp_path: Path) -> None:
    """Three tokens at a time on two ranks, and all at once on one: losses, gradient norms, metrics and weights agree."""
    outcomes = run_jobs(models(tmp_path, tied=True), tmp_path, {"whole": {}, "chunks": TP2}, forge)
    assert_same(outcomes["chunks"], outcomes["whole"])
    for ours, theirs in zip(outcomes["chunks"].steps, outcomes["whole"].steps, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("topk_overlap_frac", "student_stop_mass", "sampler_gap_nats", "kl_last_quarter_nats"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3), name


@pytest.mark.heavy
@pytest.mark.parametrize("tied", [False, True])
def test_nor_do_they_on_any_layout(tied: bool, forge: RankForge, tmp_path: Path) -> None:
    """With sequence parallelism, replicas whose communication is overlapped, pipelines, a shared sequence, RL's reference and a
    wider teacher in the trainer, in a pipeline too; with a head of its own, and with the embedding's."""
    outcomes = run_jobs(models(tmp_path, num_layers=4, tied=tied), tmp_path, PRODUCTS, forge)
    for layout in PRODUCTS:
        kind = next((one for one in ("in_process_", "rl_") if layout.startswith(one)), "")
        assert_same(outcomes[layout], outcomes[f"{kind}whole"])
    learnt = outcomes["rl_tp2_pp2"].steps[-1]
    assert learnt["reference_kl_nats"] > 0 and learnt["loss"] != pytest.approx(
        outcomes["whole"].steps[-1]["loss"], rel=1e-3
    )
