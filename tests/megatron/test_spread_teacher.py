"""A teacher in the trainer over the ranks of several replicas, in whole training jobs: it says what it says on one rank."""

from pathlib import Path

import pytest

from tests.support.layouts import assert_same, run_job, run_jobs, save_random_model
from tests.support.rank_forge import RankForge

IN_PROCESS = {"teacher.transport": "in_process"}
SPREAD = IN_PROCESS | {"student.parallel.dp": 2, "teacher.in_process_tp": 2}
PRODUCTS: dict[str, dict[str, object]] = {
    "tp2": SPREAD | {"student.parallel.tp": 2, "student.parallel.sequence_parallel": True, "teacher.in_process_tp": 4},
    "two_groups": SPREAD | {"student.parallel.dp": 4},
    "pp2": SPREAD | {"student.parallel.pp": 2},
    "cp2": SPREAD | {"student.parallel.cp": 2},
    "by_tokens": SPREAD | {"micro_batch_tokens": 60},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a student, and a teacher of four key-value heads whose output layer is its embedding."""
    root = tmp_path_factory.mktemp("models")
    save_random_model(root / "student", seed=1)
    save_random_model(root / "teacher", seed=2, num_key_value_heads=4, tied=True)
    return root


def test_two_replicas_share_a_teacher(forge: RankForge, models: Path, tmp_path: Path) -> None:
    """Each layer on both ranks, the head on each as the student's: losses, gradients and weights are those of one rank."""
    whole = run_job(models, tmp_path / "whole", IN_PROCESS, forge=forge)
    assert_same(run_job(models, tmp_path / "spread", SPREAD, forge=forge), whole)


@pytest.mark.heavy
def test_products_with_the_other_axes(forge: RankForge, models: Path, tmp_path: Path) -> None:
    """Under tp with sequence parallelism, in two groups side by side, in a pipeline, under cp, and by tokens."""
    outcomes = run_jobs(models, tmp_path, PRODUCTS | {"whole": IN_PROCESS}, forge)
    for layout in PRODUCTS:
        assert_same(outcomes[layout], outcomes["whole"])
