"""Sequences cut over ranks: in whole training jobs, nothing changes; and the cut itself, token by token."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_distill.models.context_parallel import places_of_rank, sequence_multiple
from tests.support.layouts import Outcome, assert_same, run_jobs, save_random_model
from tests.support.rank_forge import RankForge
from tests.support.samples import build_micro_batches, make_samples

SEQUENCE_PARALLEL_TP2 = {"student.parallel.tp": 2, "student.parallel.sequence_parallel": True}
CP2 = {"student.parallel.cp": 2}

BY_SEQUENCE = {"distill.normalisation": "sequence"}

LAYOUTS: dict[str, dict[str, object]] = {
    "cp1": {},
    "cp2": CP2 | {"student.distributed_optimizer": True},
    "by_sequence_cp1": BY_SEQUENCE,
    "by_sequence_cp2": BY_SEQUENCE | CP2,
}
PRODUCTS: dict[str, dict[str, object]] = {
    "cp1": {},
    "cp4": {"student.parallel.cp": 4, "micro_batch_rollouts": 1},
    "cp2_tp2": CP2 | {"student.parallel.tp": 2},
    "cp2_tp2_sequence_parallel": CP2 | SEQUENCE_PARALLEL_TP2,
    "cp2_pp2": CP2 | {"student.parallel.pp": 2},
    "cp2_dp2": CP2 | {"student.parallel.dp": 2, "student.distributed_optimizer": True},
    "cp1_in_process": {"teacher.transport": "in_process"},
    "cp2_in_process": CP2 | {"teacher.transport": "in_process", "student.recompute": "full"},
}


def test_sharing_each_sequence_changes_nothing(forge: RankForge, models: Path, tmp_path: Path) -> None:
    """Two ranks that share every sequence: losses, gradient norms and trained weights are those of one rank, also of a mean
    over responses, of which either rank sees a part."""
    outcomes = run_jobs(models, tmp_path, LAYOUTS, forge)
    for kind in ("", "by_sequence_"):
        assert_same(outcomes[f"{kind}cp2"], outcomes[f"{kind}cp1"])


@pytest.mark.heavy
def test_nor_do_products_with_the_other_axes(forge: RankForge, models: Path, tmp_path: Path) -> None:
    """The same with tp, sequence parallelism, a pipeline, replicas, recomputation and a teacher that is cut likewise; and with
    ranks that are left without a single response token."""
    outcomes: dict[str, Outcome] = run_jobs(models, tmp_path, PRODUCTS, forge)
    for layout in PRODUCTS:
        assert_same(outcomes[layout], outcomes["cp1_in_process" if "in_process" in layout else "cp1"])


@pytest.mark.heavy
def test_experts_may_lie_over_the_ranks_that_share_a_sequence(forge: RankForge, models: Path, tmp_path: Path) -> None:
    """ep 2 over cp 2: the student of four experts learns what it learns on one rank."""
    save_random_model(models / "experts", seed=1, num_experts=4)
    student = {"student.path": str(models / "experts")}
    layouts = {"one": student, "shared": student | CP2 | {"student.parallel.ep": 2}}
    outcomes = run_jobs(models, tmp_path, layouts, forge)
    assert_same(outcomes["shared"], outcomes["one"])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_share_every_sequence_evenly_in_tokens_and_in_attention(size: int) -> None:
    """Each token is one rank's; every rank has as many of each sequence, and as many pairs of query and key to within one
    chunk's diagonal."""
    multiple = sequence_multiple(size)
    starts = torch.tensor([0, 3, 4, 9]) * multiple
    owned = [places_of_rank(starts, rank, size) for rank in range(size)]
    assert torch.cat(owned).sort().values.equal(torch.arange(int(starts[-1])))
    for start, end in pairwise(starts.tolist()):
        inside = [places[(places >= start) & (places < end)] - start for places in owned]
        assert {len(places) for places in inside} == {(end - start) // size}
        assert len({int((places + 1).sum()) for places in inside}) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_a_batch_cut_over_ranks_is_the_batch(size: int) -> None:
    """Every response token, with all that belongs to it, is at one rank, behind the token that predicts it."""
    samples = make_samples(3, 8, 12)
    multiple = sequence_multiple(size)
    (whole,) = build_micro_batches(
        samples, len(samples), step=3, needs_mask=False, sequence_multiple=multiple, pad_multiple=multiple
    )
    assert (whole.sequence_starts % multiple == 0).all()
    cut = [whole.of_context_rank(rank, size) for rank in range(size)]
    assert {batch.tokens_RL.numel() for batch in cut} == {whole.tokens_RL.numel() // size}

    def facts(batch: Any) -> list[tuple[Any, ...]]:
        signal = batch.signal
        columns = [batch.target_ids_T, batch.is_scored_T, batch.is_student_T, batch.response_quarter_T]
        columns += [signal.token_logprobs_T, signal.ids_TK[:, 0], signal.stop_logprobs_TS[:, 0]]
        predictors = [
            batch.tokens_RL.flatten()[batch.logits_index_T],
            batch.position_ids_RL.flatten()[batch.logits_index_T],
        ]
        return sorted(zip(*(column.tolist() for column in columns + predictors), strict=True))

    assert sorted(fact for batch in cut for fact in facts(batch)) == facts(whole)
