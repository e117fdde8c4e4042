"""What a run keeps on the way, by whole training jobs (``tests.support.train_job``): real sessions, Megatron's own saves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_distill.convert.damage import damage_of
from megatron_distill.convert.offline import megatron_to_hf
from megatron_distill.runs.checkpoints import directory_of, steps_on_disk
from megatron_distill.runs.run_folder import RunFolder, read_json
from tests.support.layouts import run_job
from tests.support.rank_forge import RankForge

OVERLAPPED = ["--overlap-grad-reduce", "--overlap-param-gather"]


@pytest.mark.parametrize(
    "layout",
    [
        {"student.parallel.tp": 2},
        {"student.parallel.dp": 2, "student.distributed_optimizer": True, "student.megatron_args": OVERLAPPED},
    ],
    ids=["tp2", "dp2_overlapped"],
)
def test_a_run_keeps_what_it_was_asked_to_and_resumes(
    layout: dict[str, object], forge: RankForge, models: Path, tmp_path: Path
) -> None:
    """Of five checkpoints the last two and the best one's are left, whole; the best student and the exports are the students of
    their steps, where parameters are gathered during the next forward pass too; and the run goes on from what is left, to the
    weights of one that kept everything."""
    settings = layout | {
        "save_every_steps": 1,
        "evaluation.every_steps": 1,
        "checkpoints.keep_last": 2,
        "checkpoints.keep_best": "avg_at_k",
        "checkpoints.export_hf": True,
    }
    folder = RunFolder(tmp_path / "run")
    run_job(models, folder.root, settings | {"num_steps": 5}, forge=forge)
    assert steps_on_disk(folder) == [2, 4, 5]
    assert sorted(path.name for path in folder.hf_step(1).parent.iterdir()) == [f"step_{n:06d}" for n in (1, 2, 3, 4)]
    assert read_json(folder.best) == {"step": 2, "metric": "avg_at_k", "value": 1.0}
    for step, exported in ((2, folder.hf_best), (2, folder.hf_step(2)), (4, folder.hf_step(4)), (5, folder.hf)):
        assert damage_of(directory_of(folder, step)) == ""
        converted = tmp_path / f"converted_{exported.name}"
        megatron_to_hf(directory_of(folder, step), converted, hf_dir=models / "student")
        weights = load_file(exported / "model.safetensors")
        for name, tensor in load_file(converted / "model.safetensors").items():
            assert torch.equal(weights[name], tensor), (step, name)
    resumed = run_job(models, folder.root, settings | {"num_steps": 6}, forge=forge)
    assert steps_on_disk(folder) == [2, 5, 6]
    plain = layout | {"num_steps": 6, "save_every_steps": 1}
    unbroken = run_job(models, tmp_path / "unbroken", plain, forge=forge)
    assert steps_on_disk(RunFolder(tmp_path / "unbroken")) == [1, 2, 3, 4, 5, 6]
    for name, weight in unbroken.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
