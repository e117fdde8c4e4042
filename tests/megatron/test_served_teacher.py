"""Whole training jobs under a teacher that sends hidden states: those of one in the trainer, on any layout.

The states are transformers' own here; a real server's are in ``tests/sglang`` and in ``test_run.py``.
"""

from pathlib import Path

import pytest

from tests.support.layouts import VOCAB_SIZE, Outcome, assert_same, run_jobs, save_random_model
from tests.support.rank_forge import RankForge
from tests.support.tiny_models import build_hf_model

HIDDEN = {"teacher.transport": "sglang_hidden"}
CP2 = {"student.parallel.cp": 2, "micro_batch_rollouts": 4}
PRODUCTS: dict[str, dict[str, object]] = {
    "one": HIDDEN,
    "tp2_sequence_parallel": HIDDEN | {"student.parallel.tp": 2, "student.parallel.sequence_parallel": True},
    "pp2_by_tokens": HIDDEN | {"student.parallel.pp": 2, "micro_batch_tokens": 60},
    "cp2": HIDDEN | CP2,
    "dp2": HIDDEN | {"student.parallel.dp": 2, "student.distributed_optimizer": True},
    "jsd": HIDDEN | {"distill.divergence": "jsd", "distill.temperature": 2.0},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and a teacher of another width and depth whose output layer is its embedding."""
    root = tmp_path_factory.mktemp("models")
    save_random_model(root / "student", seed=1)
    teacher = build_hf_model("qwen3-tied", 2, vocab_size=VOCAB_SIZE, num_hidden_layers=3, max_position_embeddings=128)
    teacher.save_pretrained(root / "teacher")
    return root


def assert_as_in_the_trainer(outcome: Outcome, reference: Outcome) -> None:
    """Steps, weights and every metric agree; what server and layer say of the same tokens is a metric more."""
    assert_same(outcome, reference)
    for ours, theirs in zip(outcome.steps, reference.steps, strict=True):
        only_ours = {"teacher_gap_nats", "missing_teacher_frac"}
        assert {name for name in ours.keys() ^ theirs.keys() if not name.endswith("_s")} == only_ours
        assert ours["missing_teacher_frac"] == 0
        assert ours["teacher_gap_nats"] < 1e-4
        for name in ("teacher_entropy_nats", "kl_first_quarter_nats", "kl_last_quarter_nats"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4), name


def test_hidden_states_teach_what_the_teacher_in_the_trainer_does(
    forge: RankForge, models: Path, tmp_path: Path
) -> None:
    """With the output layer over two ranks, three steps equal those of the whole model beside the student."""
    layouts = {"in_process": {"teacher.transport": "in_process"}, "tp2": HIDDEN | {"student.parallel.tp": 2}}
    outcomes = run_jobs(models, tmp_path, layouts, forge)
    assert_as_in_the_trainer(outcomes["tp2"], outcomes["in_process"])


@pytest.mark.heavy
def test_on_every_axis(forge: RankForge, models: Path, tmp_path: Path) -> None:
    """The same with sequence parallelism, a pipeline, shared sequences, replicas, and another divergence at another
    temperature."""
    full = {"teacher.transport": "in_process"}
    references = {"in_process": full, "in_process_jsd": PRODUCTS["jsd"] | full}
    outcomes = run_jobs(models, tmp_path, PRODUCTS | references, forge)
    for layout in PRODUCTS:
        assert_as_in_the_trainer(outcomes[layout], outcomes["in_process_jsd" if layout == "jsd" else "in_process"])
