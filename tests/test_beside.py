"""Evaluations beside training: servers that lose their weights, a stop in the middle, a failure. Real data, faults made up."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_distill.recipes.tiny import quickstart

from megatron_distill.errors import ServerError, StaleWeightsError, StopRequested
from megatron_distill.evaluate.heldout import HeldOut, MeasuredSet
from megatron_distill.models.vocabulary import load_vocabulary
from megatron_distill.rewards.base import Answered
from megatron_distill.rollouts.prompts import load_prompt_set
from megatron_distill.runs.run_folder import RunFolder, read_json
from megatron_distill.training.beside import MAX_ATTEMPTS, EvaluationBeside
from megatron_distill.types import Generation
from tests.support.waiting import HANG_S


class Servers:
    """Servers that hold whatever was loaded last, and lose it at chosen requests."""

    vocab_size = 1000

    def __init__(self, loses_at: Sequence[int] = ()) -> None:
        self.version, self.loaded, self.asked, self.loses_at = "", list[Path](), 0, loses_at
        self.may_answer = threading.Event()
        self.may_answer.set()

    def wait_reachable(self) -> None:
        pass

    def update_weights_from_disk(self, path: Path, version: str) -> None:
        assert path.is_dir()
        self.loaded.append(path)
        self.version = version

    def generate(self, prompts: Sequence[Any], /, *, seeds: Sequence[int], weight_version: str, **_: Any) -> Any:
        assert self.may_answer.wait(HANG_S)
        self.asked += 1
        if self.asked in self.loses_at:
            self.version = ""
        if weight_version != self.version:
            raise StaleWeightsError("started again")
        return [Generation([seed % 7], np.zeros(1, np.float32), "length", None, self.version) for seed in seeds]

    def score(self, sequences: Any, /, **_: Any) -> Any:
        return [None for _ in sequences]

    def close(self) -> None:
        pass


def half(answered: Sequence[Answered], /) -> list[float]:
    return [float(index % 2) for index in range(len(answered))]


def make(folder: RunFolder, servers: Any, stops: threading.Event) -> EvaluationBeside:
    """Two sets of three problems; the weights of step 4 lie in the folder."""
    config = quickstart()
    vocabulary = load_vocabulary(config.student.path, config.teacher.path, config.rollouts.stop_tokens)
    problems = load_prompt_set(config.data.heldout_path, config.data, vocabulary.tokenizer)
    settings = replace(config.evaluation, num_problems=3, samples_per_problem=2)
    sets = {name: MeasuredSet(problems, settings, half) for name in ("heldout", "hard")}
    heldout = HeldOut(config, folder, sets, servers, stop_token_ids=vocabulary.stop_token_ids, decode=vocabulary.decode)
    folder.create()
    folder.evaluated_weights(4).mkdir(parents=True)
    return EvaluationBeside(folder, heldout, servers, stops.is_set)


def test_servers_that_lose_their_weights_get_them_again(tmp_path: Path) -> None:
    """What was recorded before is not drawn again; once every set is, the weights are gone from the folder."""
    folder, servers = RunFolder(tmp_path / "run"), Servers(loses_at=[2])
    beside = make(folder, servers, threading.Event())
    beside.begin(4, ["heldout", "hard"])
    summaries = beside.wait()
    assert list(summaries) == ["heldout", "hard"]
    assert (len(servers.loaded), servers.asked) == (2, 3)
    for name, summary in summaries.items():
        assert (summary.step, summary.avg_at_k) == (4, 0.5)
        assert read_json(folder.evaluation(name, 4))["summary"]["step"] == 4
    assert folder.steps_evaluating() == []


def test_a_stop_does_not_wait_and_a_resumed_run_finds_what_it_left(tmp_path: Path) -> None:
    """The weights stay for a run that resumes at that step or a later one; one that goes back before it forgets them."""
    folder, servers, stops = RunFolder(tmp_path / "run"), Servers(), threading.Event()
    beside = make(folder, servers, stops)
    servers.may_answer.clear()
    beside.begin(4, ["heldout"])
    stops.set()
    with pytest.raises(StopRequested):
        beside.wait()
    folder.rewind(5)
    assert folder.steps_evaluating() == [4]
    folder.rewind(3)
    assert folder.steps_evaluating() == []
    servers.may_answer.set()


def test_servers_that_stay_away_are_a_failure_of_the_run(tmp_path: Path) -> None:
    """After so many attempts whoever waits is told why; the weights stay."""
    folder, servers = RunFolder(tmp_path / "run"), Servers(loses_at=range(1, 100))
    beside = make(folder, servers, threading.Event())
    beside.begin(4, ["heldout"])
    with pytest.raises(ServerError, match="started again"):
        beside.wait()
    assert servers.asked == MAX_ATTEMPTS
    assert folder.steps_evaluating() == [4]
