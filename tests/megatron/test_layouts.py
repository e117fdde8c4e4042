"""The same run under every layout: what must not change a loss, a gradient, a weight, and does not.

Each case is a whole training job (``tests.support.train_job``) on ranks of its own: the real session, Megatron's own
``pretrain``, and samples that are a function of the step.
"""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_distill.runs.run_folder import RunFolder
from tests.support.layouts import NUM_STEPS, Outcome, assert_same, run_job, run_jobs
from tests.support.rank_forge import RankForge

LAYOUTS = {
    "tp1": {},
    "tp2": {"student.parallel.tp": 2},
    "dp2": {"student.parallel.dp": 2},
    "tp2_dp2": {"student.parallel.tp": 2, "student.parallel.dp": 2},
    "dp2_distributed_optimizer": {"student.parallel.dp": 2, "student.distributed_optimizer": True},
    "pp2": {"student.parallel.pp": 2},
    "dp2_by_tokens": {"student.parallel.dp": 2, "micro_batch_tokens": 60},
    "tp2_one_micro_batch": {"student.parallel.tp": 2, "micro_batch_rollouts": 20},
    "by_sequence_tp1": {"distill.normalisation": "sequence"},
    "by_sequence_tp2_dp2": {
        "distill.normalisation": "sequence",
        "student.parallel.tp": 2,
        "student.parallel.dp": 2,
        "micro_batch_rollouts": 2,
    },
    "in_process_tp1": {"teacher.transport": "in_process"},
    "in_process_tp2": {"teacher.transport": "in_process", "student.parallel.tp": 2},
    "in_process_pp2": {"teacher.transport": "in_process", "student.parallel.pp": 2},
}


@pytest.fixture(scope="module")
def outcomes(forge: RankForge, models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every layout's outcome."""
    return run_jobs(models, tmp_path_factory.mktemp("runs"), LAYOUTS, forge)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.endswith("tp1")])
def test_layout_changes_neither_loss_nor_gradient_nor_weights(layout: str, outcomes: dict[str, Outcome]) -> None:
    """tp, dp, pp, the distributed optimizer and how micro-batches are filled change losses, gradient norms and trained weights
    by rounding only, also of a mean over responses; a fifth of the rollouts has no teacher score."""
    kind = next(kind for kind in ("in_process_", "by_sequence_", "") if layout.startswith(kind))
    reference = outcomes[f"{kind}tp1"]
    assert len(reference.steps) == NUM_STEPS
    assert_same(outcomes[layout], reference)


def test_in_process_teacher_equal_to_the_student_costs_nothing(forge: RankForge, models: Path, tmp_path: Path) -> None:
    """With teacher = student every KL is 0 and so is the gradient: the two forward passes and the loss agree."""
    outcome = run_job(
        models,
        tmp_path / "self",
        {
            "teacher.transport": "in_process",
            "teacher.path": str(models / "student"),
            "student.parallel.tp": 2,
            "num_steps": 1,
        },
        forge=forge,
    )
    step = outcome.steps[0]
    assert abs(step["forward_kl_nats"]) < 1e-6
    assert abs(step["reverse_kl_nats"]) < 1e-6
    assert step["grad_norm"] < 1e-4


@pytest.mark.parametrize(
    "layout",
    [{"student.parallel.tp": 2}, {"student.parallel.dp": 2, "student.distributed_optimizer": True}],
    ids=["tp2", "dp2_distributed_optimizer"],
)
def test_resumed_run_equals_an_unbroken_one(
    layout: dict[str, object], forge: RankForge, models: Path, tmp_path: Path
) -> None:
    """Losses and weights after save and resume are bit for bit those of a run that was never stopped."""
    layout = layout | {"num_steps": 4}
    unbroken = run_job(models, tmp_path / "unbroken", layout, forge=forge)
    run_job(models, tmp_path / "resumed", layout | {"num_steps": 2}, forge=forge)
    resumed = run_job(models, tmp_path / "resumed", layout, forge=forge)
    assert [s["step"] for s in resumed.steps] == [1, 2, 3, 4]
    for ours, theirs in zip(resumed.steps, unbroken.steps, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    for name, weight in unbroken.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


@pytest.mark.parametrize(
    ("layout", "fault", "seen"),
    [
        ({"student.parallel.tp": 2}, "killed", AssertionError),  # the codes of the ranks
        ({"student.parallel.pp": 2}, "fails", FileNotFoundError),  # ended by themselves, and no student was exported
    ],
    ids=["tp2 killed", "pp2 fails"],
)
def test_a_run_that_ends_in_an_evaluation_goes_on_from_the_step_it_was_evaluating(
    layout: dict[str, object], fault: str, seen: type[Exception], forge: RankForge, models: Path, tmp_path: Path
) -> None:
    """The checkpoint of a step is there before its evaluation begins, the last one too; neither Megatron's clock nor autograd
    runs meanwhile. What ended there goes on from there, and leaves the bits, the records and the evaluations of an unbroken
    run."""
    settings = layout | {"num_steps": 5, "save_every_steps": 2, "evaluation.every_steps": 1}
    unbroken, broken = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "broken")
    reference = run_job(models, unbroken.root, settings, forge=forge)
    summaries = unbroken.evaluations()
    assert [(one["step"], one["checkpoint"]) for one in summaries] == [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (5, 5)]
    assert not any(one["has_grad"] for one in summaries[1:])  # the first is made before training begins
    assert not any(one["is_timed"] for one in summaries[:-1])  # no step follows the last one

    broken.create()
    (broken.root / "in_evaluation").write_text(f"4 {fault}")
    with pytest.raises(seen):
        run_job(models, broken.root, settings, forge=forge)
    assert broken.latest_checkpoint_step() == 4 and [step["step"] for step in broken.steps()] == [1, 2, 3, 4]
    assert (broken.first_failure() or {}).get("message") == ("told to fail" if fault == "fails" else None)
    resumed = run_job(models, broken.root, settings, forge=forge)
    assert [step["step"] for step in resumed.steps] == [1, 2, 3, 4, 5]
    assert [one["step"] for one in broken.evaluations()] == [0, 1, 2, 3, 4, 5]
    for ours, theirs in zip(resumed.steps, reference.steps, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    for name, weight in reference.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


@pytest.mark.parametrize(
    "layout",
    [
        {"student.parallel.tp": 2},
        {"student.dtype": "bf16"},
        {"student.parallel.dp": 2, "student.distributed_optimizer": True},
    ],
    ids=["fp32", "bf16", "dp2_distributed_optimizer"],
)
def test_a_checkpoint_goes_on_under_other_settings_of_the_optimizer(
    layout: dict[str, object], forge: RankForge, models: Path, tmp_path: Path
) -> None:
    """As a fork does: the state is the checkpoint's, learning rate and betas are the config's. Megatron alone refuses another
    rate, and keeps the old betas."""
    run_job(models, tmp_path / "run", layout | {"num_steps": 2}, forge=forge)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    changed = layout | {"num_steps": 4, "optimizer.lr": 3e-4, "optimizer.lr_decay": "linear"}
    forked = run_job(models, tmp_path / "run", changed, forge=forge)
    assert [one["lr"] for one in forked.steps[2:]] == pytest.approx([1e-4, 0.0])
    other = run_job(models, tmp_path / "other", changed | {"optimizer.adam_beta2": 0.5}, forge=forge)
    assert [one["loss"] for one in other.steps[:3]] == [one["loss"] for one in forked.steps[:3]]
    assert any(not torch.equal(other.weights[name], weight) for name, weight in forked.weights.items())
