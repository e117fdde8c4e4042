"""Follow a run folder while the run goes on: every record once, in order, to whoever wants to know.

In: the JSON lines that the run's processes append. Out: calls on a ``Tracker``. Nothing here talks to a process of the run, so
that whatever follows it cannot hurt it, and can start late, end early, or begin again.
"""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from megatron_distill.config.json_files import parsed
from megatron_distill.runs.metrics import BY_NAME
from megatron_distill.runs.run_folder import HELDOUT, RunFolder


class Tracker:
    """Is told what a run records. Derive from it, and write the methods that you have a use for; the others do nothing."""

    def step(self, record: Mapping[str, float]) -> None:
        """A step's metrics, its timings among them: ``docs/metrics.md`` says what each name means; ``step`` is the number."""

    def evaluation(self, summary: Mapping[str, Any]) -> None:
        """The summary of an evaluation: ``set`` names the problems, ``step`` the number of steps behind the weights."""

    def sample(self, sample: Mapping[str, Any]) -> None:
        """One of the few responses that are kept of each step: ``step``, ``prompt``, ``response``, who wrote it, its reward."""

    def event(self, event: Mapping[str, Any]) -> None:
        """What a process says that it begins or has done: ``time`` (Unix), ``role``, ``text``."""

    def close(self) -> None:
        """The run has ended, well or not; nothing is told any more."""


class Lines:
    """The complete lines that were appended to a file since the last look."""

    def __init__(self, path: Path, from_start: bool = False) -> None:
        """Begin at the file's present end, or at its start."""
        self._path = path
        self._position = 0 if from_start or not path.exists() else path.stat().st_size
        self._rest = b""

    def new_records(self) -> list[dict[str, Any]]:
        """Records appended since the last call."""
        if not self._path.exists():
            return []
        if self._path.stat().st_size < self._position:  # a requeued job forgot what came after its checkpoint
            self._position, self._rest = self._path.stat().st_size, b""
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = self._rest + file.read()
            self._position = file.tell()
        *lines, self._rest = data.split(b"\n")
        return [record for line in lines if line and (record := record_of(line)) is not None]


def record_of(line: bytes) -> dict[str, Any] | None:
    """A line's record; None for one that a crash or a shared disk has garbled."""
    try:
        value = parsed(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class EventLines:
    """The events of all roles, each in a file of its own, which may appear at any time."""

    def __init__(self, folder: RunFolder, from_start: bool) -> None:
        """Begin at the files' present ends, or at their starts."""
        self._folder = folder
        self._by_file = {path: Lines(path, from_start) for path in folder.event_files()}

    def new_records(self) -> list[dict[str, Any]]:
        """Events recorded since the last call, in the order of their times."""
        for path in self._folder.event_files():
            self._by_file.setdefault(path, Lines(path, from_start=True))
        found = [record for lines in self._by_file.values() for record in lines.new_records()]
        return sorted(found, key=lambda record: record["time"])


class Once:
    """Lets every record pass once, although a resumed run writes the steps since its checkpoint again."""

    def __init__(self, told: float = -1.0) -> None:
        """Everything up to and including step ``told`` has passed before."""
        self.told = self._before = told
        self._keys: set[Hashable] = set()

    def passes(self, step: float, key: Hashable = None) -> bool:
        """Whether a record is new: of a later step than any before, or another ``key`` of the latest step."""
        if step < self.told or step <= self._before or (step == self.told and key in self._keys):
            return False
        if step > self.told:
            self.told, self._keys = step, set()
        self._keys.add(key)
        return True


class Following:
    """Reads a run folder for one tracker."""

    def __init__(self, folder: RunFolder, from_start: bool, told: Mapping[str, float] | None = None) -> None:
        """Read nothing yet.

        Args:
            folder: where the run is recorded.
            from_start: of what was recorded; without, only what is appended from now on.
            told: as ``told`` returned it for an earlier ``Following`` of the same tracker: that much is not told again. None
                tells every line, however often a step was made.
        """
        self._events = EventLines(folder, from_start)
        self._metrics = Lines(folder.metrics, from_start)
        self._samples = Lines(folder.samples, from_start)
        self._repeats = told is None
        self._once = {kind: Once((told or {}).get(kind, -1.0)) for kind in ("event", "evaluation", "step", "sample")}

    def told(self) -> dict[str, float]:
        """How far each kind of record has been told: a step, or for events a time."""
        return {kind: once.told for kind, once in self._once.items()}

    def tell(self, tracker: Tracker) -> bool:
        """Tell what is new; whether there was anything."""
        told = False
        for record in self._metrics.new_records():
            if self._is_new("step", record["step"]):
                tracker.step(record)
                told = True
        for event in self._events.new_records():
            if "evaluation" in event:
                summary = event["evaluation"] | {"set": event.get("set", HELDOUT)}
                if self._is_new("evaluation", summary["step"], summary["set"]):
                    tracker.evaluation(summary)
                    told = True
            elif self._is_new("event", event["time"], (event["role"], event["text"])):
                tracker.event(event)
                told = True
        for sample in self._samples.new_records():
            if self._is_new("sample", sample["step"], (sample.get("id"), sample.get("response"))):
                tracker.sample(sample)
                told = True
        return told

    def _is_new(self, kind: str, step: float, key: Hashable = None) -> bool:
        return self._repeats or self._once[kind].passes(step, key)


def tracked_step(record: Mapping[str, float]) -> dict[str, float]:
    """A step's metrics as trackers file them: ``group/name``, e.g. ``loss/reverse_kl_nats``, ``reward/format``."""
    return {
        f"{BY_NAME[name].group.lower()}/{name}" if name in BY_NAME else name.replace(".", "/", 1): value
        for name, value in record.items()
        if name != "step"
    }


def tracked_evaluation(summary: Mapping[str, Any]) -> dict[str, float]:
    """An evaluation's numbers as trackers file them: ``SET/name``, e.g. ``heldout/avg_at_k``."""
    return {
        f"{summary['set']}/{name}": float(value)
        for name, value in summary.items()
        if name != "step" and isinstance(value, int | float) and value is not True and value is not False
    }
