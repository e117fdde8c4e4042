"""Waiting for what other processes and threads do. A limit here only ends a hang: no test passes or fails by the clock."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_distill.errors import CheckpointError
from megatron_distill.runs.run_folder import RunFolder

HANG_S = 300.0


def wait_until(holds: Callable[[], bool], what: str, limit_s: float = HANG_S) -> None:
    """Return once ``holds()`` is true; an ``AssertionError`` that names ``what`` if that never happens."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:.0f} s"
        threading.Event().wait(0.05)


def wait_until_gone(group: int) -> None:
    """Wait until no process of a process group is left."""

    def is_gone() -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(is_gone, f"the end of process group {group}")


def saved_step(folder: RunFolder) -> int:
    """The last checkpoint's step of a run that goes on; 0 while Megatron writes the number, which it does in place."""
    with contextlib.suppress(CheckpointError):
        return folder.latest_checkpoint_step()
    return 0


def processes_naming(text: str) -> list[str]:
    """Command lines of the running processes that contain ``text``, this one's and other test runners' aside."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if path.parent.name != str(os.getpid()) and text in line and "pytest" not in line:
            lines.append(line)
    return lines


def wait_until_none_names(text: str) -> None:
    """Wait until no process has ``text``, a run folder say, in its command line."""
    wait_until(lambda: not processes_naming(text), f"the end of the processes of {text}")
