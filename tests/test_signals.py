"""Ctrl-C, a closed terminal, and impatience, in a real terminal around a real run: said at once, saved, nothing left behind."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import uuid
from pathlib import Path

import pytest

from megatron_distill.launch import processes
from megatron_distill.runs.run_folder import RunFolder
from tests.support.waiting import HANG_S, wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

SMALL = (
    "num_steps=4000",
    "student.parallel.tp=1",
    "rollouts.prompts_per_step=8",
    "micro_batch_rollouts=8",
    "curriculum.horizon_tokens=24",
    "evaluation.num_problems=4",
    "evaluation.samples_per_problem=1",
    "evaluation.max_response_tokens=32",
    "evaluation.entropy_problems=2",
)


class Terminal:
    """A command in a pseudo-terminal of its own, as a shell would start it."""

    def __init__(self, arguments: list[str]) -> None:
        self.mark = uuid.uuid4().hex
        self._master, slave = pty.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's own; tests in the background may ignore them
                signal.signal(number, signal.SIG_DFL)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_distill.cli.main", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"MEGATRON_DISTILL_TEST": self.mark},
            preexec_fn=take_terminal,  # noqa: PLW1509  no other thread runs yet
        )
        os.close(slave)
        self.shown = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 4096):
                self.shown += data.decode(errors="replace")

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def close(self) -> None:
        os.close(self._master)

    def left(self) -> list[list[str]]:
        """Command lines of the processes that the command started, however deep, and that still run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in path.read_bytes() and processes.is_alive(int(path.parent.name)):
                    found.append(processes.arguments_of(int(path.parent.name)))
        return found


@pytest.fixture
def terminal(tmp_path: Path):
    started = Terminal(["train", "tiny.quickstart", "--run-dir", str(tmp_path / "run"), *SMALL])
    folder = RunFolder(tmp_path / "run")
    wait_until(lambda: len(folder.steps()) >= 3 or started.process.poll() is not None, "three steps", 900)
    assert started.process.poll() is None, started.shown
    yield started
    started.process.kill()


def test_one_ctrl_c_says_so_saves_and_ends_everything(terminal: Terminal, tmp_path: Path) -> None:
    """One Ctrl-C of a run whose only checkpoint would be its last: it tells what it does, the step is saved, code 130."""
    folder = RunFolder(tmp_path / "run")
    terminal.type(b"\x03")
    wait_until(
        lambda: "SIGINT: stopping. A checkpoint is saved if this step ends within" in terminal.shown, "an answer"
    )
    assert terminal.process.wait(HANG_S) == 130, terminal.shown
    saved = folder.latest_checkpoint_step()
    assert saved >= 3
    wait_until(lambda: f"the same command goes on from step {saved}" in terminal.shown, "what was kept")
    assert [int(step["step"]) for step in folder.steps()][-1] in (saved, saved + 1)
    assert terminal.left() == []


def test_a_second_ctrl_c_ends_everything_at_once(terminal: Terminal) -> None:
    """Nothing is waited for, code 130, nothing left."""
    terminal.type(b"\x03")
    wait_until(lambda: "stopping" in terminal.shown, "an answer")
    terminal.type(b"\x03")
    assert terminal.process.wait(HANG_S) == 130, terminal.shown
    assert terminal.left() == []


def test_a_closed_terminal_saves_and_ends_everything(terminal: Terminal, tmp_path: Path) -> None:
    """SIGHUP, with nobody left to read: the step is saved, code 143, nothing left."""
    terminal.close()
    assert terminal.process.wait(HANG_S) == 143
    assert RunFolder(tmp_path / "run").latest_checkpoint_step() >= 3
    assert terminal.left() == []
