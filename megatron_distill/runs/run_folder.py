"""The run folder: everything a run leaves behind, and the only thing that evaluation, report and comparison read.

    runs/NAME/
      .megatron-distill.json  the mark: what is in here is ours to write (see ``marks``)
      config.json        the resolved config                   eval/step_000000.json   accuracies and responses
      env.json           versions, machine, command            checkpoints/            Megatron's, resumed from
      metrics.jsonl      one line a step (docs/metrics.md)     hf/                     the student, for transformers
      samples.jsonl      a few responses of each step          logs/                   one file a role
      curriculum.jsonl   every decision with its inputs        events*.jsonl           phases, for the console
      report.html        the page, with its plots              errors/                 a role's failure, if any
      hf_best/ best.json the best student on the way           hf_steps/               the student at each save
      timeline.jsonl     who worked when                       trackers/               how far each tracker was told
      finished.json      the last thing written                lock/                   who runs it (see ``lock``)

Every line is appended whole, so that a reader never sees half a record and a killed run loses nothing it wrote. A resumed run
first forgets what came after its checkpoint (``rewind``), so that every step has one record, however often it was resumed.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_distill.config.json_files import json_of, parsed, write_whole
from megatron_distill.errors import CheckpointError, DataError
from megatron_distill.runs import marks

HELDOUT = "heldout"
"""The set of problems that every run is measured on; its results are in ``eval/``, those of another set in ``eval/SET/``."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and reading and appending its records."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def curriculum(self) -> Path:
        return self.root / "curriculum.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    def events_of(self, role: str) -> Path:
        """Where a role's events go: a server's into a file of its own, as it may be on another node than the trainer, and a
        shared disk does not append atomically for several."""
        return self.root / f"events-{role.replace(' ', '-')}.jsonl" if " server " in role else self.events

    def event_files(self) -> list[Path]:
        """All roles' files of events."""
        return sorted(self.root.glob("events*.jsonl"))

    @property
    def stop_requested(self) -> Path:
        """A file by which the trainer is told to save a checkpoint after its step, and to end."""
        return self.root / "stop_requested"

    @property
    def timeline(self) -> Path:
        return self.root / "timeline.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def checkpoint_tracker(self) -> Path:
        """Megatron's record of the step of its latest whole checkpoint."""
        return self.checkpoints / "latest_checkpointed_iteration.txt"

    @property
    def hf(self) -> Path:
        return self.root / "hf"

    @property
    def hf_best(self) -> Path:
        return self.root / "hf_best"

    @property
    def best(self) -> Path:
        return self.root / "best.json"

    def hf_step(self, step: int) -> Path:
        """The student as it was saved with the checkpoint of ``step``."""
        return self.root / "hf_steps" / f"step_{step:06d}"

    @property
    def sync(self) -> Path:
        return self.root / "sync"

    @property
    def evaluating(self) -> Path:
        return self.root / "evaluating"

    def evaluated_weights(self, step: int) -> Path:
        """The student after ``step`` steps, for as long as an evaluation of it is under way beside training."""
        return self.evaluating / f"step_{step:06d}"

    def steps_evaluating(self) -> list[int]:
        """Steps whose evaluation beside training has not ended."""
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in self.evaluating.glob("*"))
        return sorted(int(number[1]) for number in found if number)

    @property
    def ahead(self) -> Path:
        return self.root / "ahead"

    @property
    def evals(self) -> Path:
        return self.root / "eval"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def trackers(self) -> Path:
        return self.root / "trackers"

    @property
    def errors(self) -> Path:
        return self.root / "errors"

    @property
    def finished(self) -> Path:
        return self.root / "finished.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def create(self) -> None:
        """Make the folder, mark it as ours, and make its sub-folders; existing ones are kept, for resuming.

        Raises:
            DistillError: the folder is somebody else's, or cannot be written.
        """
        marks.claim(self.root, "run", "run folder")
        for path in (self.evals, self.logs, self.errors):
            path.mkdir(exist_ok=True)

    def forget_last_start(self) -> None:
        """Remove what the start before this one left about its end: failures, weights under way, the mark of the end."""
        for path in self.errors.glob("*.json"):
            if _is_failure(path):
                path.unlink()
        self.finished.unlink(missing_ok=True)
        self.stop_requested.unlink(missing_ok=True)
        for path in (*self.sync.glob("v[0-9]*"), *self.sync.glob(".v[0-9]*.*")):
            shutil.rmtree(path, ignore_errors=True)

    def rewind(self, step: int) -> None:
        """Forget every record after ``step``, from which the run goes on, and a record that a kill cut short."""
        for path in (self.metrics, self.samples, self.curriculum):
            _keep_lines(path, lambda record: record.get("step", 0) <= step)
        for path in (*self.event_files(), self.timeline):
            _keep_lines(path, lambda record: True)
        if not step:  # a new run to whoever follows it
            self.best.unlink(missing_ok=True)
            for path in (*self.trackers.glob("*.json"), *self.trackers.glob("*.id")):
                path.unlink()
        waiting = {self.evaluated_weights(one) for one in self.steps_evaluating() if one <= step and step > 0}
        for path in set(self.evaluating.glob("*")) - waiting:
            shutil.rmtree(path, ignore_errors=True)
        for path in self.evals.rglob("step_*.json"):
            number = re.fullmatch(r"step_(\d+)\.json", path.name)
            if number and (int(number[1]) > step or not step):
                path.unlink()

    def event(self, role: str, text: str, **facts: Any) -> None:
        """Tell the console something: a phase began, a share of it is done."""
        append(self.events_of(role), {"time": time.time(), "role": role, "text": text, **facts})

    def fail(self, role: str, message: str) -> None:
        """Leave the cause of a role's failure where the launcher finds it, unless the disk takes no more."""
        with contextlib.suppress(OSError):  # which would take the place of what failed first
            self.errors.mkdir(parents=True, exist_ok=True)
            write_json(self.errors / f"{role}.json", {"time": time.time(), "role": role, "message": message})

    def first_failure(self) -> dict[str, Any] | None:
        """The earliest failure that a role left, since later ones are usually its consequence."""
        failures = [read_json(path) for path in sorted(self.errors.glob("*.json")) if _is_failure(path)]
        return min(failures, key=lambda failure: failure["time"], default=None)

    def steps(self) -> list[dict[str, float]]:
        """The metrics, one record a step. A resumed run may have repeated steps: the later record counts.

        Raises:
            DataError: naming file and line of a broken record.
        """
        by_step = {}
        for number, record in enumerate(read_lines(self.metrics), 1):
            step = record.get("step")
            if not (isinstance(step, int | float) and 0 <= step < 1 << 31):
                raise DataError(
                    f"{self.metrics}:{number}: step = {str(step)[:40]}: must be the number of a step. Delete the line, or "
                    "start a new run."
                )
            by_step[step] = record
        return [by_step[step] for step in sorted(by_step)]

    def evaluations(self, name: str = HELDOUT) -> list[dict[str, Any]]:
        """Summaries of every evaluation of the run on a set of problems, in step order."""
        folder = self.evals if name == HELDOUT else self.evals / name
        return [_summary_of(path) for path in sorted(folder.glob("step_*.json"))]

    def evaluated_sets(self) -> list[str]:
        """Names of the sets of problems that the run was evaluated on, the held-out one first."""
        others = sorted({path.parent.name for path in self.evals.glob("*/step_*.json")})
        return [HELDOUT, *others] if self.evaluations() else others

    def evaluation(self, name: str, step: int) -> Path:
        """Where the evaluation on a set of problems after ``step`` steps is."""
        return (self.evals if name == HELDOUT else self.evals / name) / f"step_{step:06d}.json"

    def has_finished(self, num_steps: int) -> bool:
        """Whether the run came to its end, and that end is at ``num_steps`` or later."""
        return self.finished.exists() and read_json(self.finished).get("step", 0) >= num_steps

    def latest_checkpoint_step(self) -> int:
        """The step that a resumed run continues from; 0 without a checkpoint.

        Raises:
            CheckpointError: Megatron's tracker file holds no step.
        """
        if not self.checkpoint_tracker.exists():
            return 0
        text = self.checkpoint_tracker.read_text(errors="replace").strip() if self.checkpoint_tracker.is_file() else ""
        if not (text.isascii() and text.isdigit()):
            present = sorted(path.name for path in self.checkpoints.glob("iter_*"))
            raise CheckpointError(
                f"{self.checkpoint_tracker} = {text[:40]!r}: must hold the number of a step. Without it nothing can be "
                "resumed. Write the number of the latest whole one into it "
                f"({', '.join(present) or 'there is none: delete the file'})."
            )
        return int(text)


def _summary_of(evaluation: Path) -> dict[str, Any]:
    summary = read_json(evaluation).get("summary")
    if not isinstance(summary, dict):
        raise DataError(f"{evaluation}: holds no summary, so it is no evaluation. Move it away.")
    return summary


def kept_id(folder: RunFolder, name: str) -> str:
    """What another program knows this run by: made at the first call, the same for as long as the run is resumed."""
    path = folder.trackers / f"{name}.id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line in a single write, whole or not at all.

    Raises:
        OSError: the disk is full; the part that fitted is taken back.
    """
    line = (json.dumps(record) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            written = file.write(line)
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise
        if written != len(line):
            os.ftruncate(file.fileno(), before)
            raise OSError(errno.ENOSPC, f"{path}: the disk is full. Free some space")


def _keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSONL file with the wanted records, in place of the old one at once; broken lines are dropped."""
    if not has_records(path):
        return
    before = path.read_bytes()
    kept = b"".join(line for line in before.splitlines(keepends=True) if _holds(line, wanted))
    if kept != before:
        write_whole(path, kept)


def _holds(line: bytes, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        record = parsed(line) if line.endswith(b"\n") else None
    except ValueError:
        return False
    return isinstance(record, dict) and wanted(record)


def has_records(path: Path) -> bool:
    """Whether there is a file of records.

    Raises:
        DataError: there is something else, which a reader may wait for in vain.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no regular file. Move it away.")
    return path.exists()


def _is_failure(path: Path) -> bool:
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return False
    return {"time", "role", "message"} <= record.keys()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file; none if there is no file. A last line still being written is left out.

    Raises:
        DataError: naming file and line of a broken record.
    """
    if not has_records(path):
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = parsed(line)
            except ValueError as error:  # broken JSON, or no UTF-8
                raise DataError(f"{path}:{number}: not JSON ({error}). Delete the line, or start a new run.") from error
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: no JSON object. Delete the line, or start a new run.")
            yield record


def write_json(path: Path, value: Any) -> None:
    """Write one file of ours, whole; see ``write_whole``."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read one file of ours, which holds one object.

    Raises:
        FileNotFoundError: there is none.
        DataError: it cannot be read, or holds something else.
    """
    try:
        value = json_of(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Put it back from a copy, or start a new run.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds no object. Put it back from a copy, or start a new run.")
    return value


def finite_or_none(value: Any) -> Any:
    """Plain values with None for every number that is not finite: JSON knows neither nan nor infinity."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
