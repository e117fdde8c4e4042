"""Who worked when: spans of time in the run folder's ``timeline.jsonl``, for the report and for ``watch``.

In: the phases of rank 0, and the requests that its leader has in flight. Out: one line a span:
``{"who": "trainer", "what": "train", "began": ..., "ended": ...}``, Unix seconds. ``read_spans`` reads them.

    trainer    train | sync (gathers weights, or waits until they arrived) | wait (for the step's samples) | evaluate | decide
    student    busy: at least one request to the student's servers is in flight | load (weights)
    teacher    busy: likewise the teacher's
    evaluation busy: likewise the evaluations' own, where there are such

On clusters of several replicas this is replica 0's view; the others do the same at the same time.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_distill.runs.run_folder import append, read_lines

_SAME_S = 0.2
"""Requests that follow each other so closely are one span: a source that streams makes hundreds a step."""


@dataclass(frozen=True)
class Span:
    """Somebody's time.

    Attributes:
        who: trainer, student, teacher or evaluation.
        what: it did.
        began: Unix seconds.
        ended: Unix seconds.
    """

    who: str
    what: str
    began: float
    ended: float


class Timeline:
    """Writes spans. Thread-safe; calls that overlap count as one."""

    def __init__(self, path: Path, is_kept: bool = True) -> None:
        """Write nothing yet.

        Args:
            path: of the file.
            is_kept: False on ranks whose time is not recorded.
        """
        self._path, self.is_kept = path, is_kept
        self._lock = threading.Lock()
        self._in_flight: dict[str, int] = {}
        self._open: dict[str, tuple[float, float]] = {}

    def add(self, who: str, what: str, seconds: float) -> None:
        """A span that ends now."""
        now = time.time()
        self._write(who, what, now - seconds, now)

    @contextlib.contextmanager
    def span(self, who: str, what: str) -> Iterator[None]:
        """The time of a block."""
        began = time.time()
        try:
            yield
        finally:
            self._write(who, what, began, time.time())

    @contextlib.contextmanager
    def busy(self, who: str) -> Iterator[None]:
        """A request: as long as any of ``who``'s is in flight, or was just now, it is one span. ``flush`` writes it."""
        with self._lock:
            now = time.time()
            began, ended = self._open.get(who, (now, now))
            if not self._in_flight.get(who) and now - ended > _SAME_S:
                self._write(who, "busy", began, ended)
                began = now
            self._open[who] = (began, now)
            self._in_flight[who] = self._in_flight.get(who, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight[who] -= 1
                self._open[who] = (self._open[who][0], time.time())

    def flush(self) -> None:
        """Write who was busy until now; what is in flight goes on as a span of its own."""
        with self._lock:
            now = time.time()
            for who, (began, ended) in list(self._open.items()):
                in_flight = bool(self._in_flight.get(who))
                self._write(who, "busy", began, now if in_flight else ended)
                if in_flight:
                    self._open[who] = (now, now)
                else:
                    del self._open[who]

    def _write(self, who: str, what: str, began: float, ended: float) -> None:
        if self.is_kept and ended > began:
            append(self._path, {"who": who, "what": what, "began": round(began, 4), "ended": round(ended, 4)})


def read_spans(path: Path) -> list[Span]:
    """All spans of a run, in the order of their beginnings; none if the run recorded none."""
    return sorted((Span(**record) for record in read_lines(path)), key=lambda span: span.began)


def steps_of(spans: list[Span]) -> list[tuple[float, float]]:
    """(began, ended) of every step: from the end of the one before, or from its wait for samples, to its training's end."""
    steps: list[tuple[float, float]] = []
    began: float | None = None
    for span in (one for one in spans if one.who == "trainer"):
        if span.what == "wait" and began is None:
            began = span.began
        if span.what == "train":
            steps.append((span.began if began is None else began, span.ended))
            began = span.ended
        if span.what in ("evaluate", "decide"):
            began = None  # between two steps, and part of neither
    return steps


def busy_shares(spans: list[Span], steps: list[tuple[float, float]]) -> dict[tuple[str, str], float]:
    """{(who, what): share of the steps' time}."""
    whole = sum(ended - began for began, ended in steps)
    if not whole:
        return {}
    shares: dict[tuple[str, str], float] = {}
    for span in spans:
        inside = sum(max(0.0, min(span.ended, end) - max(span.began, begin)) for begin, end in steps)
        if inside:
            shares[span.who, span.what] = shares.get((span.who, span.what), 0.0) + inside / whole
    return shares
