"""The processes of a run on this machine, found by descent and by a tag in their environment, and ended without remainder.

Command lines do not do: Megatron's checkpoint helper and multiprocessing's trackers carry none of the run's, and a launcher's
process group does not hold what opened a session of its own. A child inherits its environment, so that even a process whose
parents were all killed is found by the tag (as long as it has not written over its environment, as SGLang's schedulers do:
these are found by descent, and are on a leash besides).
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

TAG = "MEGATRON_DISTILL_TAG"
"""Environment variable of every process of a run; the value is one start's own."""

_POLL_S = 0.1


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that ended, but whose parent never asked how, does not: ``kill(pid, 0)`` says it does."""
    return _state(pid) not in ("", "Z", "X")


def descendants(root: int) -> list[int]:
    """Every living process below ``root``, parents before children."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents().items():
        children.setdefault(parent, []).append(pid)
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return [pid for pid in found if is_alive(pid)]


def tagged(value: str) -> list[int]:
    """Every living process whose environment holds ``TAG=value``, with what descends from them."""
    wanted = f"{TAG}={value}".encode()
    own = os.getpid()
    found: dict[int, None] = {}
    for pid in _parents():
        with contextlib.suppress(OSError):
            if pid != own and wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found |= dict.fromkeys([pid, *descendants(pid)])
    return [pid for pid in found if pid != own and is_alive(pid)]


def arguments_of(pid: int) -> list[str]:
    """The command line of a process; empty if it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end_tagged(value: str, grace_s: float, spare: int = 0) -> None:
    """End every process of a start: SIGTERM, and SIGKILL after ``grace_s`` seconds; a stopped one is killed all the same.

    Args:
        value: of the tag.
        grace_s: 0 kills at once.
        spare: a process to leave alone, e.g. the one that the orphans go to.
    """
    deadline = time.monotonic() + grace_s
    asked: set[int] = set()
    while pids := [pid for pid in tagged(value) if pid != spare]:
        if time.monotonic() >= deadline:
            send(pids, signal.SIGKILL)
        else:
            new = [pid for pid in pids if pid not in asked]
            send(new, signal.SIGTERM)
            asked |= set(new)
        time.sleep(_POLL_S)


def _parents() -> dict[int, int]:
    """{process: its parent} of everything that this user can see."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            found[int(path.parent.name)] = int(_fields(path)[1])
    return found


def _state(pid: int) -> str:
    try:
        return _fields(Path(f"/proc/{pid}/stat"))[0]
    except (OSError, IndexError):
        return ""


def _fields(stat: Path) -> list[str]:
    """The fields after the command's name, which may hold blanks and brackets: state, parent, group, ..."""
    return stat.read_text(errors="replace").rpartition(")")[2].split()
