"""Keeps a server alive: starts it again when it dies or hangs, at most so often.

    start ──> serve ──┬── told to stop ──────────────────────────────> stopped
       ^              ├── died, or silent for too long ──┐
       └───────────── start it again, on the same port <─┴── too often ──> ServerError, its cause first

A server that was started again serves the weights it began with, under their version. Who sends requests names the version
that must answer them (``transport``), so what it serves is used only after it has been given the present weights.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import urllib3

from megatron_distill.errors import ServerError
from megatron_distill.sglang.server import SGLangServer, SlowStartError
from megatron_distill.sglang.server_log import first_cause, last_start, log_tail

_POLL_S = 0.5
_ASK_EVERY_S = 5.0
_HOUR_S = 3600.0
_DRAIN_S = 15.0


@dataclass(frozen=True)
class SupervisionLimits:
    """When a server counts as lost, and how often it is started again.

    Attributes:
        startup_timeout_s: longest wait for its health, at each start.
        hang_timeout_s: longest time without an answer before it counts as hung. It must be longer than a weight update, in
            which a server answers nobody.
        max_restarts_per_hour: further losses within an hour end the supervision.
    """

    startup_timeout_s: float
    hang_timeout_s: float
    max_restarts_per_hour: int


class Supervisor:
    """One server and its successors."""

    def __init__(self, make: Callable[[], SGLangServer], limits: SupervisionLimits, say: Callable[[str], None]) -> None:
        """Start nothing.

        Args:
            make: a server that is not started; each on the same address.
            limits: see there.
            say: receives a line about each start and each loss, with its cause.
        """
        self._make, self._limits, self._say = make, limits, say
        self._losses: deque[float] = deque()

    def run(self, stopping: threading.Event) -> None:
        """Serve until ``stopping`` is set.

        Raises:
            ServerError: the server did not start, or was lost too often.
        """
        self._say("starting")
        while not stopping.is_set():
            server = self._make()
            cause: str | None = "stopped"
            try:
                server.start()
                cause = self._serve(server, stopping)
            finally:
                server.stop(drain_s=0.0 if cause else _DRAIN_S)
            if cause is not None:
                self._count(cause, server)

    def _serve(self, server: SGLangServer, stopping: threading.Event) -> str | None:
        """Watch one server to its end; why it was lost, or None if it was told to stop."""
        try:
            server.wait_ready(self._limits.startup_timeout_s, stopping=stopping)
        except ServerError as error:
            if not self._losses:
                raise  # it never served: its cause would meet the next one as well
            # A slow one was killed for that: its exit code tells nothing.
            slow = f"no answer within servers.startup_timeout_s = {self._limits.startup_timeout_s:g} s"
            return f"did not start again: {slow if isinstance(error, SlowStartError) else cause_of(server)}"
        if stopping.is_set():
            return None
        self._say("ready")
        answers = _Answers(server)
        with answers:
            while not stopping.wait(_POLL_S):
                if not server.is_alive():
                    return f"died ({cause_of(server)})"
                if answers.silent_s() > self._limits.hang_timeout_s:
                    return f"hung (no answer for {answers.silent_s():.0f} s)"
        return None

    def _count(self, cause: str, server: SGLangServer) -> None:
        """Remember a loss, and give up after too many."""
        now = time.monotonic()
        while self._losses and now - self._losses[0] > _HOUR_S:
            self._losses.popleft()
        self._losses.append(now)
        number, most = len(self._losses), self._limits.max_restarts_per_hour
        if number > most:
            raise ServerError(
                f"{server.name} = {cause}, {number} times within an hour: servers.max_restarts_per_hour = {most} restarts "
                f"did not help. Mend the cause, then start the same command again to resume. Log: {server.log_file}\n"
                f"{log_tail(server.log_file)}"
            )
        self._say(f"{cause}: started again, {number} of at most {most} times an hour")


def cause_of(server: SGLangServer) -> str:
    """Why a server that has ended did so, in one line: the first error of its log, or the signal that ended it."""
    logged = first_cause(last_start(server.log_file))
    if logged is not None:
        return logged.strip()
    code = server.exit_code
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}, and no error in its log"


class _Answers:
    """Asks a server for its state again and again, in a thread: the answer passes through its scheduler.

    Not for its health: that draws a token, and waits while generation is paused.
    """

    def __init__(self, server: SGLangServer) -> None:
        self._url, self._headers = server.url, {"Authorization": f"Bearer {server.key}"}
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="supervisor", daemon=True)

    def silent_s(self) -> float:
        """Seconds since the last answer."""
        return time.monotonic() - self._last

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._ended.set()  # not joined: it may be waiting for an answer that never comes

    def _ask(self) -> None:
        with urllib3.PoolManager(retries=False, headers=self._headers) as http:
            while not self._ended.is_set():
                try:
                    timeout = urllib3.Timeout(total=None)  # whoever watches ends the server, and so this wait
                    if http.request("GET", f"{self._url}/server_info", timeout=timeout).status == 200:
                        self._last = time.monotonic()
                except urllib3.exceptions.HTTPError:
                    pass
                self._ended.wait(_ASK_EVERY_S)
