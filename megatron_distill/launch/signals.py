"""What Ctrl-C, SIGTERM and SIGHUP mean to a command: the first asks to stop, the second stops at once.

with as_interrupts():          any command: the signal is raised as ``Interrupted``, so that everything is closed
    with counted() as stop:    the launcher: counted instead, so that it can save before it ends
        while running: ... if stop.count: ...
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

_AGAIN_S = 0.05

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A command was asked to stop.

    Attributes:
        number: the signal.
        told: what to print of it; empty prints the usual line.
    """

    def __init__(self, number: signal.Signals, told: str = "") -> None:
        super().__init__(number.name)
        self.number, self.told = number, told

    @property
    def code(self) -> int:
        """Exit code: 130 for Ctrl-C, 143 for a request to terminate, which a closed terminal is."""
        return 130 if self.number == signal.SIGINT else 143


@dataclass
class Stop:
    """Signals received so far: how many, and the first one."""

    count: int = 0
    first: signal.Signals = signal.SIGINT


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """Raise the signals as ``Interrupted`` in the main thread.

    Python drops what is raised while it calls back from a weak reference or a destructor, as it does all the time during an
    import: there the signal is sent once more.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number))

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if isinstance(what.exc_value, Interrupted):
            threading.Timer(_AGAIN_S, os.kill, (os.getpid(), what.exc_value.number)).start()
        else:
            before(what)

    before, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        with _handled_by(stop):
            yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def counted() -> Iterator[Stop]:
    """Count the signals; the caller looks at the count."""
    state = Stop()

    def count(number: int, _: FrameType | None) -> None:
        if not state.count:
            state.first = signal.Signals(number)
        state.count += 1

    with _handled_by(count):
        yield state


@contextlib.contextmanager
def _handled_by(handler: object) -> Iterator[None]:
    """Set the handlers, in the main thread only: Python allows no other. A signal that was ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
