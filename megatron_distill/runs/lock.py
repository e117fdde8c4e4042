"""One writer a run folder: a lock that the kernel releases however its holder ends, and that another machine sees.

    lock/launcher      flock, exclusive: the command that makes the run
    lock/roles         flock, shared: every process of the run, so that a new start waits until those of a killed launcher ended
    lock/holder.json   who holds it (host, process, command), with a count that the holder raises every few seconds

flock reaches other machines on NFS 4, Lustre (mounted with flock), GPFS and BeeGFS. Where a file system keeps locks to one
machine, or has none, the count tells: a holder whose count moves while we watch is alive. No clocks are compared, so
machines whose clocks differ, or jump, agree.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from megatron_distill.config.json_files import write_whole
from megatron_distill.errors import BusyError, DistillError

BEAT_S = 2.0
_WATCHED_BEATS = 3.0
_ROLES_END_S = 60.0
_POLL_S = 0.25
_kept: list[BinaryIO] = []  # locks of this process for the rest of its life


class RunLock:
    """The launcher's lock on a run folder, as a context manager."""

    def __init__(self, root: Path, roles_end_s: float = _ROLES_END_S) -> None:
        """Lock nothing yet.

        Args:
            root: the run folder; it exists and is ours.
            roles_end_s: how long to wait for the processes of an earlier start, whose launcher has gone.
        """
        self._root, self._directory, self._roles_end_s = root, root / "lock", roles_end_s
        self._file: BinaryIO | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            BusyError: naming who holds it.
            DistillError: its launcher has gone, but processes of it go on.
        """
        self._directory.mkdir(exist_ok=True)
        self._file = (self._directory / "launcher").open("ab")
        if not _try_lock(self._file, fcntl.LOCK_EX):
            self._file.close()
            raise self._refusal()
        try:
            if self._holder_is_alive():
                raise self._refusal()
            self._write(0)
            self._thread = threading.Thread(target=self._beat, daemon=True, name="run-lock")
            self._thread.start()
            self._wait_for_roles()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            with contextlib.suppress(OSError):
                self._holder.unlink()
        if self._file is not None:
            self._file.close()

    @property
    def _holder(self) -> Path:
        return self._directory / "holder.json"

    def _holder_is_alive(self) -> bool:
        """Whether someone holds the folder although the lock was free: for want of locks, or of locks between machines."""
        before = self._read()
        if not before or (
            before.get("host") == socket.gethostname() and not Path(f"/proc/{before.get('pid')}").exists()
        ):
            return False
        deadline = time.monotonic() + _WATCHED_BEATS * BEAT_S
        while time.monotonic() < deadline:
            time.sleep(_POLL_S)
            if self._read() != before:
                return True
        return False

    def _wait_for_roles(self) -> None:
        with (self._directory / "roles").open("ab") as roles:
            deadline = time.monotonic() + self._roles_end_s
            while not _try_lock(roles, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise DistillError(
                        f"run folder = {self._root}: processes of an earlier start still run, {self._roles_end_s:.0f} s after "
                        "its launcher ended. Two runs in one folder would mix. End them (a Slurm job: scancel), or choose "
                        "another --run-dir."
                    )
                time.sleep(_POLL_S)

    def _refusal(self) -> BusyError:
        holder = self._read()
        who = (
            f"process {holder.get('pid')} on {holder.get('host')} ({holder.get('command')})"
            if holder
            else "another process"
        )
        return BusyError(
            f"run folder = {self._root}: {who} is running in it. Two runs in one folder would mix. Wait for it, stop it, or "
            "choose another --run-dir or name=..."
        )

    def _read(self) -> dict[str, Any]:
        try:
            holder = json.loads(self._holder.read_text())
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def _write(self, beat: int) -> None:
        command = " ".join(sys.argv)[:200]
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "command": command, "beat": beat}
        write_whole(self._holder, (json.dumps(holder) + "\n").encode())

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT_S):
            beat += 1
            with contextlib.suppress(OSError):  # a full disk must not end a run that goes on without it
                self._write(beat)


def take_part(root: Path) -> None:
    """Let every later start of the run in ``root`` wait for this process's end."""
    (root / "lock").mkdir(exist_ok=True)
    file = (root / "lock" / "roles").open("ab")
    _try_lock(file, fcntl.LOCK_SH)
    _kept.append(file)


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold the lock of a file in an existing folder for as long as the block runs, after whoever holds it now. A file system
    without locks lets all through."""
    with path.open("ab") as file:
        while not _try_lock(file, fcntl.LOCK_EX):
            time.sleep(_POLL_S)
        yield


def _try_lock(file: BinaryIO, how: int) -> bool:
    """Lock a file without waiting; a file system without locks counts as free, and leaves the count to tell."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return True
