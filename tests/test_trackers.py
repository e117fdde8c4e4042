"""Trackers: told every record once, whoever resumes what; named once when they fail; real libraries, read back."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megatron_distill.recipes.tiny import quickstart
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig
from megatron_distill.errors import ConfigError, DistillError
from megatron_distill.launch import preflight
from megatron_distill.launch.launch import check_folder, opened
from megatron_distill.runs import trackers
from megatron_distill.runs.follower import Following, Lines, Tracker
from megatron_distill.runs.run_folder import RunFolder, append, kept_id, read_json
from megatron_distill.runs.trackers.process import track
from tests.support.waiting import HANG_S, wait_until

OWN = """
from megatron_distill.runs.follower import Tracker
from megatron_distill.runs.run_folder import append

class Mine(Tracker):
    def __init__(self, folder, config):
        self.file = folder.root / "mine.jsonl"
        append(self.file, {"kind": "open", "name": config.name})
    def step(self, record): append(self.file, {"kind": "step", **record})
    def evaluation(self, summary): append(self.file, {"kind": "evaluation", **summary})
    def sample(self, sample): append(self.file, {"kind": "sample", **sample})
    def event(self, event): append(self.file, {"kind": "event", **event})
    def close(self): append(self.file, {"kind": "close"})

class Bad(Mine):
    def step(self, record):
        if record["step"] == 2: raise RuntimeError("the disk is full")

def mine(folder, config): return Mine(folder, config)
def bad(folder, config): return Bad(folder, config)
def unable(folder, config): raise SystemExit("no such server")
def one_argument(folder): return None
"""

LAUNCHER = """
import os, signal, sys, time
from pathlib import Path
from megatron_distill import config
from megatron_distill.runs.run_folder import RunFolder, append
from megatron_distill.runs.trackers.process import track

folder = RunFolder(Path(sys.argv[1]))
with track(config.load(folder.config), folder):
    while not (folder.root / "mine.jsonl").exists():
        time.sleep(0.05)
    {deed}
"""


class Told(Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.all: list[tuple[str, float]] = []

    def step(self, record: Any) -> None:
        self.all.append(("step", record["step"]))

    def evaluation(self, summary: Any) -> None:
        self.all.append(("evaluation", summary["step"]))

    def sample(self, sample: Any) -> None:
        self.all.append(("sample", sample["step"]))


def evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "k": 4, "avg_at_k": 0.25 + step / 100, "stop_reasons": {"7": 1}}


def record_steps(folder: RunFolder, steps: range) -> None:
    """As a run does: metrics and two samples a step, an evaluation at every third."""
    for step in steps:
        append(folder.metrics, {"step": float(step), "loss": 1.0 / step, "step_s": 2.0})
        for who in ("student", "teacher"):
            sample = {"step": step, "id": f"p{step}", "written_by": who, "prompt": "1+1", "response": f"{who} {step}"}
            append(folder.samples, sample)
        if step % 3 == 0:
            folder.event("trainer", "evaluated", evaluation=evaluation(step))


def prepared(folder: RunFolder, *names: str) -> RunConfig:
    config = replace(quickstart(), trackers=names)
    config_module.save(config, folder.config)
    return config


def own(folder: RunFolder, *functions: str) -> list[str]:
    path = folder.root.parent / "own.py"
    path.write_text(OWN)
    return [f"{path}:{function}" for function in functions]


def test_lines_are_whole_when_they_are_read(tmp_path: Path) -> None:
    """A record that is still being written is read when it is complete, and only once."""
    path = tmp_path / "x.jsonl"
    lines = Lines(path)
    assert lines.new_records() == []
    with path.open("w") as file:
        file.write('{"a": 1}\n{"a":')
        file.flush()
        assert lines.new_records() == [{"a": 1}]
        file.write(" 2}\n")
        file.flush()
        assert lines.new_records() == [{"a": 2}]
    assert lines.new_records() == []


def test_steps_that_a_resumed_run_repeats_are_told_once(folder: RunFolder) -> None:
    """The run falls back to a checkpoint under the follower's eyes, or while nobody looks: the record has no step twice."""
    told, following = Told(), Following(folder, from_start=True, told={})
    record_steps(folder, range(1, 6))
    following.tell(told)
    record_steps(folder, range(3, 8))  # resumed at 2
    following.tell(told)
    record_steps(folder, range(7, 9))  # resumed at 6, while nobody follows
    Following(folder, from_start=True, told=following.told()).tell(told)
    assert [step for kind, step in told.all if kind == "step"] == list(range(1, 9))
    assert [step for kind, step in told.all if kind == "sample"] == [step for step in range(1, 9) for _ in range(2)]
    assert [step for kind, step in told.all if kind == "evaluation"] == [3, 6]


@pytest.mark.slow
def test_a_run_is_followed_and_resumed_by_tensorboard_and_a_function_of_ones_own(folder: RunFolder) -> None:
    """Two launches of one run, the second repeating a step: TensorBoard's real files and a user's tracker have each once."""
    names = own(folder, "mine")
    config = prepared(folder, "tensorboard", *names)
    with track(config, folder):
        record_steps(folder, range(1, 4))
    with track(config, folder):
        record_steps(folder, range(3, 6))
    events = EventAccumulator(str(folder.root / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 5)) for e in events.Scalars("loss/loss")] == [
        (step, round(1 / step, 5)) for step in range(1, 6)
    ]
    assert [(e.step, round(e.value, 5)) for e in events.Scalars("heldout/avg_at_k")] == [(3, 0.28)]
    assert "heldout/stop_reasons" not in events.Tags()["scalars"]
    assert [e.step for e in events.Tensors("samples/student/text_summary")] == list(range(1, 6))
    kept = [json.loads(line) for line in (folder.root / "mine.jsonl").read_text().splitlines()]
    assert [one["step"] for one in kept if one["kind"] == "step"] == list(range(1, 6))
    assert [one["kind"] for one in kept].count("close") == 2
    assert not list(folder.errors.iterdir())


def test_a_tracker_that_fails_is_named_once_and_hurts_nobody(folder: RunFolder) -> None:
    """One that cannot start and one that breaks at step 2 are reported on the console; the third is told everything."""
    config = prepared(folder, *own(folder, "unable", "bad", "mine"))
    with track(config, folder):
        record_steps(folder, range(1, 5))
    told = [json.loads(line)["text"] for line in folder.events.read_text().splitlines()]
    failures = [text for text in told if "failed, and the run goes on without it" in text]
    assert len(failures) == 2
    assert any("own.py:unable" in text and "no such server" in text for text in failures)
    assert any("own.py:bad" in text and "RuntimeError: the disk is full" in text for text in failures)
    assert "Traceback" in (folder.logs / "trackers.log").read_text()
    kept = [json.loads(line) for line in (folder.root / "mine.jsonl").read_text().splitlines()]
    assert [one["step"] for one in kept if one["kind"] == "step"] == [1, 2, 3, 4]


def launch(folder: RunFolder, deed: str) -> "subprocess.CompletedProcess[bytes]":
    """A launcher at its own terminal, so to speak: it starts the trackers, and once they have begun it does a deed."""
    prepared(folder, *own(folder, "mine"))
    command = [sys.executable, "-c", LAUNCHER.format(deed=deed), str(folder.root)]
    return subprocess.run(command, start_new_session=True, check=False, timeout=HANG_S)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_what_the_terminal_sends_leaves_the_trackers_to_the_launcher(folder: RunFolder, name: str) -> None:
    """It is closed, or Ctrl-C typed, and the launcher goes on to save: the trackers are told what comes after."""
    survives = f"signal.signal(signal.{name}, lambda *_: None); os.killpg(0, signal.{name})"
    assert launch(folder, f"{survives}; append(folder.metrics, {{'step': 1.0}})").returncode == 0
    kept = [json.loads(line) for line in (folder.root / "mine.jsonl").read_text().splitlines()]
    assert [one["kind"] for one in kept] == ["open", "step", "close"]
    assert not folder.events.exists()


@pytest.mark.slow
def test_a_launcher_that_is_killed_takes_its_trackers_along(folder: RunFolder) -> None:
    """Their input ends with it, however it ends: they tell what is new, close and are gone."""
    assert launch(folder, "os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
    wait_until(lambda: '"close"' in (folder.root / "mine.jsonl").read_text(), "the trackers' end")


def test_what_cannot_be_built_is_refused_before_anything_starts(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt name, a function of other arguments and a missing package are all named at once, with what to type."""
    names = ("tensorbord", *own(folder, "one_argument"), "mlflow")
    monkeypatch.setattr(trackers, "find_spec", lambda module: None)
    with pytest.raises(ConfigError) as refused:
        preflight.check(replace(quickstart(), trackers=names))
    for part in (
        "Did you mean tensorboard?",
        "one_argument",
        "(folder, config)",
        "pip install 'megatron-distill[mlflow]'",
    ):
        assert part in str(refused.value)


def test_a_fresh_start_in_the_same_folder_is_another_run(folder: RunFolder) -> None:
    """Records that never reached a checkpoint are dropped, and with them what trackers remember of them."""
    config = prepared(folder)
    before = kept_id(folder, "wandb")
    assert kept_id(folder, "wandb") == before
    with opened(config, folder) as step:
        assert step == 0
    assert kept_id(folder, "wandb") != before


def test_trackers_may_change_when_a_run_is_resumed(folder: RunFolder) -> None:
    """Where a run is followed cannot change its result, so it is no other run."""
    prepared(folder)
    folder.checkpoints.mkdir()
    (folder.checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    check_folder(replace(quickstart(), trackers=("tensorboard",)), folder)
    with pytest.raises(DistillError, match="another config"):
        check_folder(replace(quickstart(), seed=7), folder)


def _has_told(folder: RunFolder, name: str, step: int) -> bool:
    kept = folder.trackers / f"{name}.json"
    return kept.exists() and read_json(kept)["step"] == step


@pytest.mark.heavy
def test_wandb_mlflow_and_trackio_keep_one_run_for_a_resumed_run(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real libraries, offline: two launches, one of each one's runs, every step once."""
    home = folder.root.parent
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    places = {"HOME": home, "TRACKIO_DIR": home / "trackio", "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db"}
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(home)  # MLflow keeps samples below the working directory
    config = prepared(folder, "wandb", "mlflow", "trackio")
    for steps in (range(1, 4), range(3, 6)):
        with track(config, folder):
            record_steps(folder, steps)
            while not all(_has_told(folder, name, steps[-1]) for name in config.trackers):
                assert "failed" not in folder.events.read_text(), (folder.logs / "trackers.log").read_text()
                time.sleep(0.1)

    offline = sorted((folder.root / "wandb").glob("offline-run-*"))
    assert len(offline) == 2
    assert {path.name.rsplit("-", 1)[1] for path in offline} == {kept_id(folder, "wandb")}
    assert all(list(path.glob("*.wandb")) for path in offline)

    def rows(path: Path, question: str) -> list[Any]:
        return sqlite3.connect(path).execute(question).fetchall()

    assert rows(home / "mlflow.db", "select count(*), min(status) from runs") == [(1, "FINISHED")]
    losses = rows(home / "mlflow.db", "select step, value from metrics where key = 'loss/loss' order by step")
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert len(list(home.glob("mlruns/*/*/artifacts/samples/*.txt"))) == 10

    rows_of_trackio = rows(home / "trackio" / "megatron-distill.db", "select run_name, step, metrics from metrics")
    logged = [(run, step, json.loads(told)) for run, step, told in rows_of_trackio]
    losses = sorted((step, told["loss/loss"]) for _, step, told in logged if "loss/loss" in told)
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert len({run for run, _, _ in logged}) == 1
