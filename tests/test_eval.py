"""``eval``: what it measures, where it keeps what was drawn, and that an interrupted one draws only the rest."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_distill.recipes.tiny import MODELS, quickstart

from megatron_distill import config as config_module
from megatron_distill.errors import CheckpointError, ConfigError, ServerError
from megatron_distill.evaluate import command
from megatron_distill.evaluate.command import Resumable
from megatron_distill.runs.run_folder import RunFolder
from megatron_distill.types import Generation, SamplingParams


class Model:
    """Writes its seed; its connection is lost at the ``fails_at``-th prompt."""

    vocab_size = 1000

    def __init__(self, fails_at: int) -> None:
        self.asked, self.fails_at = 0, fails_at

    def generate(self, prompts: Sequence[Any], /, *, sampling: SamplingParams, seeds: Sequence[int], **_: Any) -> Any:
        made = []
        for seed in seeds:
            if self.asked == self.fails_at:
                raise ServerError("lost")
            self.asked += 1
            made.append(Generation([seed], np.zeros(1, np.float32), "stop", 1, "0"))
        return made

    def score(self, sequences: Any, /, **_: Any) -> Any:
        return [None for _ in sequences]


def test_an_interrupted_evaluation_draws_only_the_rest(tmp_path: Path) -> None:
    """Responses before the interruption come from disk, in their places; other weights share none of them."""
    prompts, seeds = [[1, 2]] * 1000, list(range(1000))
    sampling = SamplingParams(4)
    told: list[str] = []
    broken = Resumable(Model(600), tmp_path, "weights", told.append)
    with pytest.raises(ServerError):
        broken.generate(prompts, sampling=sampling, seeds=seeds)
    broken.close()
    model = Model(-1)
    resumed = Resumable(model, tmp_path, "weights", told.append)
    drawn = resumed.generate(prompts, sampling=sampling, seeds=seeds)
    assert [one.response_ids for one in drawn] == [[seed] for seed in seeds]
    assert model.asked == 1000 - 512
    assert told[-1] == "  1,000 of 1,000 responses, 512 of them from before"
    resumed.close()
    other = Model(-1)
    Resumable(other, tmp_path, "other weights", told.append).generate(prompts[:3], sampling=sampling, seeds=seeds[:3])
    assert other.asked == 3


def run_folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    path.mkdir()
    config_module.save(replace(quickstart(), num_steps=9), folder.config)
    return folder


def test_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's end, a checkpoint of it, the student as it began; a model; a set by name; what cannot be, told."""
    folder, task = run_folder(tmp_path / "run"), command._task
    with pytest.raises(ConfigError, match="or a checkpoint of this one with --step"):
        task(str(folder.root), "", None, (), None, "")
    folder.hf.mkdir()
    end = task(str(folder.root), "", None, (), None, "")
    assert (end.directory, end.step, end.out) == (folder.hf, 9, folder.evals / "heldout.json")
    with pytest.raises(CheckpointError, match=r"--step = 4: .* holds no checkpoint of it \(there: none\)"):
        task(str(folder.root), "", None, (), 4, "")
    (folder.checkpoints / "iter_0000004").mkdir(parents=True)
    middle = task(str(folder.root), "", None, (), 4, "")
    assert (middle.checkpoint, middle.step) == (folder.checkpoints / "iter_0000004", 4)
    assert middle.directory == middle.partial / "hf" and middle.out.name == "heldout-step_4.json"
    assert task(str(folder.root), "", None, (), 0, "").directory == MODELS / "student"
    (tmp_path / "sets.py").write_text(
        "from dataclasses import replace\nfrom megatron_distill.evaluate.sets import EvaluationSet\n"
        "def few(config):\n"
        "    settings = replace(config.evaluation, samples_per_problem=7)\n"
        "    return EvaluationSet('few', config.data.heldout_path + '[:5]', config.data, settings)\n"
    )
    few = task(str(folder.root), "", None, ("servers.student_tp=2",), None, f"{tmp_path}/sets.py:few")
    assert (few.settings.samples_per_problem, few.problems[-4:], few.out.name) == (7, "[:5]", "few.json")
    assert few.config.servers.student_tp == 2
    monkeypatch.chdir(tmp_path)
    bare = task(str(MODELS / "teacher"), "problems.jsonl[:3]", None, (), None, "")
    assert (bare.out, bare.dtype, bare.step) == (Path("teacher-problems.json"), "auto", 0)
    flag = 'servers.student_args=["--quantization=fp8"]'
    quantised = task(str(MODELS / "teacher"), "problems.jsonl[:3]", None, (flag,), None, "")
    assert command._identity(quantised) != command._identity(bare)  # no response of one is kept for the other
    with pytest.raises(ConfigError, match="has no checkpoints"):
        task(str(MODELS / "teacher"), "problems.jsonl", None, (), 3, "")
    with pytest.raises(ConfigError, match="evaluation, data, rollouts and servers"):
        task(str(folder.root), "", None, ("num_steps=1",), None, "")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """What is kept meanwhile is removed at the end: never in a folder that holds other things."""
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"thesis.tex, which is no part"):
        command._check_partial(tmp_path / "a.partial")
