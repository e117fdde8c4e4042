"""Servers that die, hang or cannot be kept: what their supervisor makes of it, with a stand-in that starts in no time."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from megatron_distill.recipes import tiny

from megatron_distill import config
from megatron_distill.errors import ServerError
from megatron_distill.launch import endpoints
from megatron_distill.runs.run_folder import RunFolder, read_json, read_lines
from megatron_distill.sglang import server as server_module
from megatron_distill.sglang import supervisor as supervisor_module
from megatron_distill.sglang.server import SGLangServer
from megatron_distill.sglang.supervisor import SupervisionLimits, Supervisor
from tests.sglang.test_sglang_server import ROOT, SPEC, fake_command
from tests.support.waiting import HANG_S, wait_until, wait_until_gone

pytestmark = pytest.mark.slow

LIMITS = SupervisionLimits(startup_timeout_s=HANG_S, hang_timeout_s=HANG_S, max_restarts_per_hour=2)


class Watched:
    """A supervisor in a thread, with the servers it made and what it said."""

    def __init__(self, log: Path, limits: SupervisionLimits, behaviours: list[str]) -> None:
        self.said: list[str] = []
        self.servers: list[SGLangServer] = []
        self.failure: ServerError | None = None
        self.stopping = threading.Event()
        self._log, self._behaviours = log, behaviours
        self._port = SGLangServer(replace(SPEC, port=0), log).spec.port
        self._supervisor = Supervisor(self._make, limits, self.said.append)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _make(self) -> SGLangServer:
        behaviour = self._behaviours.pop(0) if self._behaviours else "healthy"
        self.servers.append(SGLangServer(replace(SPEC, role=behaviour, port=self._port), self._log))
        return self.servers[-1]

    def _run(self) -> None:
        try:
            self._supervisor.run(self.stopping)
        except ServerError as error:
            self.failure = error

    def wait_ready(self, times: int) -> int:
        """Wait until a server is ready for the n-th time; its process group."""
        wait_until(lambda: self.said.count("ready") >= times or self.failure is not None, f"start {times}")
        group = self.servers[-1].process_group
        assert group is not None, self.failure
        return group

    def limit_start(self, timeout_s: float) -> None:
        """From the next start on."""
        self._supervisor._limits = replace(LIMITS, startup_timeout_s=timeout_s)

    def end(self) -> None:
        self.stopping.set()
        self._thread.join()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "command", fake_command)
    monkeypatch.setattr(supervisor_module, "_POLL_S", 0.02)
    monkeypatch.setattr(supervisor_module, "_ASK_EVERY_S", 0.02)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    one = Watched(tmp_path / "log", LIMITS, [])
    yield one
    one.end()


def test_a_server_that_dies_is_started_again_on_its_port_until_it_died_too_often(watched: Watched) -> None:
    """Each loss is told with its cause. The last one is the failure: its cause first, the log's tail after it."""
    groups = [watched.wait_ready(1)]
    for times in (2, 3):
        os.killpg(groups[-1], signal.SIGKILL)
        groups.append(watched.wait_ready(times))
    assert "died (killed by SIGKILL): started again, 1 of at most 2 times an hour" in watched.said
    assert len({server.url for server in watched.servers}) == 1
    os.killpg(groups[-1], signal.SIGKILL)
    wait_until(lambda: watched.failure is not None, "the failure")
    first, *tail = str(watched.failure).splitlines()
    assert "died (killed by SIGKILL), 3 times within an hour: servers.max_restarts_per_hour = 2" in first
    assert tail[0] == "--- end of the log ---"
    for group in groups:
        wait_until_gone(group)


def test_a_stop_ends_the_server_and_is_no_loss(watched: Watched) -> None:
    """None of its processes stays, and nothing is started again."""
    group = watched.wait_ready(1)
    watched.end()
    wait_until_gone(group)
    assert watched.said == ["starting", "ready"]
    assert watched.failure is None


def test_a_frozen_server_is_killed_and_started_again(tmp_path: Path) -> None:
    """It answers nobody, neither requests nor SIGTERM; its processes are gone afterwards."""
    watched = Watched(tmp_path / "log", replace(LIMITS, hang_timeout_s=2.0, max_restarts_per_hour=1000), [])
    group = watched.wait_ready(1)
    os.killpg(group, signal.SIGSTOP)
    watched.wait_ready(2)
    assert any(text.startswith("hung (no answer for") for text in watched.said)
    wait_until_gone(group)
    watched.end()


def test_a_server_that_never_started_is_not_tried_again(tmp_path: Path) -> None:
    """Its cause would meet the next one as well."""
    watched = Watched(tmp_path / "log", LIMITS, ["fail"])
    wait_until(lambda: watched.failure is not None, "the failure")
    assert "MemoryError: the model is too large" in str(watched.failure)
    assert len(watched.servers) == 1
    watched.end()


def test_a_restart_that_fails_counts_as_a_loss(tmp_path: Path) -> None:
    """Its cause is told, and the next restart is tried."""
    watched = Watched(tmp_path / "log", LIMITS, ["healthy", "fail", "healthy"])
    os.killpg(watched.wait_ready(1), signal.SIGKILL)
    watched.wait_ready(2)
    assert (
        "did not start again: MemoryError: the model is too large: started again, 2 of at most 2 times an hour"
        in watched.said
    )
    watched.end()


def test_a_restart_that_takes_too_long_is_told_by_the_limit(tmp_path: Path) -> None:
    """Not by the signal that the supervisor itself ended it with."""
    watched = Watched(tmp_path / "log", LIMITS, ["healthy", "silent"])
    group = watched.wait_ready(1)
    watched.limit_start(0.2)
    os.killpg(group, signal.SIGKILL)
    wait_until(lambda: len(watched.said) >= 4, "the loss")
    watched.end()
    assert watched.said[3].startswith(
        "did not start again: no answer within servers.startup_timeout_s = 0.2 s: started"
    )


def test_the_role_of_a_server_announces_it_keeps_it_alive_and_ends_with_it(tmp_path: Path) -> None:
    """The process that a launcher starts, with the stand-in: on the loopback, with the run's key, on one port for ever."""
    folder = RunFolder(tmp_path)
    folder.create()
    endpoints.forget(folder)
    assert endpoints.key_file(folder).stat().st_mode & 0o777 == 0o600
    config.save(tiny.quickstart(), folder.config)
    code = f"""
from dataclasses import replace
from tests.sglang import test_sglang_server as t
t.server_module.command = lambda spec: t.fake_command(replace(spec, role="healthy"))
from megatron_distill.launch.roles import main
main(["student-server", {str(tmp_path)!r}, "--index", "1", "--device", "cpu"])
"""
    events = folder.events_of("student server 1")

    def said() -> list[str]:
        return [event["text"] for event in read_lines(events)]

    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}) as role:
        wait_until(lambda: "ready" in said() or role.poll() is not None, "the server")
        assert said() == ["starting", "ready"]
        url = read_json(folder.root / "endpoints" / "student-1.json")["url"]
        assert url.startswith("http://127.0.0.1:")
        server = served_by(role)
        assert endpoints.key_of(folder) not in " ".join(server.cmdline())
        assert endpoints.key_of(folder) in server.environ().values()
        server.kill()
        wait_until(lambda: said().count("ready") == 2 or role.poll() is not None, "the restart")
        assert said()[2] == "died (killed by SIGKILL): started again, 1 of at most 5 times an hour"
        groups = [server.pid, served_by(role).pid]  # each leads its own
        role.terminate()
        assert role.wait(timeout=HANG_S) == 0
    for group in groups:
        wait_until_gone(group)


def served_by(role: subprocess.Popen[bytes]) -> psutil.Process:
    """The server's process below a role's."""
    [server] = [one for one in psutil.Process(role.pid).children() if "leash" in " ".join(one.cmdline())]
    return server
