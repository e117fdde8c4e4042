"""Starting and stopping server processes, with a stand-in for SGLang that starts in no time."""

import inspect
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_distill.errors import ConfigError, ServerError
from megatron_distill.sglang import server as server_module
from megatron_distill.sglang.server import ServerCommand, ServerSpec, SGLangServer, command, running
from megatron_distill.sglang.server_log import START_MARK, first_cause, log_tail
from tests.support.waiting import HANG_S, wait_until_gone

ROOT = Path(__file__).parents[2]
SPEC = ServerSpec(Path("/models/student"), role="student", device="cpu", port=21000)


def fake_command(spec: ServerSpec) -> ServerCommand:
    """The stand-in; the role says how it behaves."""
    argv = [sys.executable, "-m", "tests.support.fake_launch", spec.role, str(spec.port)]
    return ServerCommand(argv, {"PYTHONPATH": str(ROOT)})


@pytest.fixture
def fake_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "command", fake_command)


def fake_server(role: str, tmp_path: Path) -> SGLangServer:
    return SGLangServer(replace(SPEC, role=role, port=0), tmp_path / f"{role}.log")


def test_command_says_all_that_the_spec_says() -> None:
    """The command line carries the spec, ends with the extra arguments, and is the same each time."""
    spec = replace(
        SPEC, context_length=512, dtype="float32", weight_version="3", extra_args=("--max-total-tokens", "99")
    )
    argv = command(spec, python="python").argv
    assert argv[:3] == ["python", "-m", "sglang.launch_server"]
    for pair in (
        ("--model-path", "/models/student"),
        ("--port", "21000"),
        ("--context-length", "512"),
        ("--dtype", "float32"),
        ("--weight-version", "3"),
        ("--device", "cpu"),
    ):
        assert argv[argv.index(pair[0]) + 1] == pair[1]
    assert "--sleep-on-idle" in argv
    assert argv[-2:] == ["--max-total-tokens", "99"]
    assert command(spec, python="python") == command(spec, python="python")


def test_gpu_command_has_nothing_of_the_cpu() -> None:
    """On a GPU SGLang keeps its own kernels, cache size and start-up."""
    on_gpu = command(replace(SPEC, device="cuda"))
    assert on_gpu.env == {}
    assert not {"torch_native", "--max-total-tokens", "--disable-overlap-schedule"} & set(on_gpu.argv)


def test_cpu_server_leaves_room_for_its_neighbours() -> None:
    """A CPU server's cache is sized in tokens, and its start survives neighbours that take half the machine's memory."""
    argv = command(SPEC).argv
    assert "--max-total-tokens" in argv
    assert float(argv[argv.index("--mem-fraction-static") + 1]) > 0.5


def test_seeds_are_an_option() -> None:
    """Seeds are honoured by default, since rollouts must be repeatable; they can be given up for speed."""
    assert "--enable-deterministic-inference" in command(SPEC).argv
    assert "--enable-deterministic-inference" not in command(replace(SPEC, deterministic=False)).argv


@pytest.mark.parametrize("spec", [replace(SPEC, device="auto"), replace(SPEC, port=0)])
def test_command_of_an_open_spec_is_refused(spec: ServerSpec) -> None:
    """A command for another machine cannot guess that machine's device or free ports."""
    with pytest.raises(ConfigError, match="must be settled"):
        command(spec)


@pytest.mark.slow
@pytest.mark.usefixtures("fake_sglang")
def test_start_returns_at_once_and_stop_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """start() does not wait; stop() ends the server and its workers; the trainer's rank is not handed down."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    server = fake_server("healthy", tmp_path)
    lines: list[str] = []
    with fake_server("silent", tmp_path) as silent:
        assert silent.is_alive()  # although it never answers: start() has not waited for that
    server.start()
    with pytest.raises(ServerError, match="already started"):
        server.start()
    server.wait_ready(HANG_S, lines.append)
    group = server.process_group
    assert group is not None
    assert server.is_alive()
    assert lines[-1] == f"sglang.healthy ({server.url}): ready"
    server.stop()
    wait_until_gone(group)
    assert not server.is_alive()
    assert "RANK = None TORCHELASTIC_RUN_ID = None" in server.log_file.read_text()
    server.stop()  # again does nothing


@pytest.mark.slow
@pytest.mark.usefixtures("fake_sglang")
def test_stubborn_server_is_killed(tmp_path: Path) -> None:
    """A server that ignores SIGTERM is killed when its time to drain has passed."""
    server = fake_server("stubborn", tmp_path)
    with server:
        server.wait_ready(HANG_S)
        group = server.process_group
        assert group is not None
        server.stop(drain_s=0.3)
        assert not server.is_alive()
    wait_until_gone(group)


@pytest.mark.slow
@pytest.mark.usefixtures("fake_sglang")
def test_failed_start_ends_with_the_first_cause(tmp_path: Path) -> None:
    """A server that dies while starting is reported at once, and the last line is the error to mend."""
    with fake_server("fail", tmp_path) as server, pytest.raises(ServerError) as caught:
        server.wait_ready(HANG_S)
    message = str(caught.value)
    assert "ended while starting (exit code 1)" in message
    assert str(server.log_file) in message
    assert message.endswith("MemoryError: the model is too large")


@pytest.mark.slow
@pytest.mark.usefixtures("fake_sglang")
def test_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never answers is killed after the time given, and other servers with it."""
    monkeypatch.setattr(server_module, "_PROGRESS_EVERY_S", 0)
    silent, healthy = fake_server("silent", tmp_path), fake_server("healthy", tmp_path)
    groups: set[int] = set()

    def remember(line: str) -> None:
        groups.update(server.process_group or 0 for server in (healthy, silent))

    with (
        pytest.raises(ServerError, match=r"sglang\.silent .*did not answer within"),
        running([silent, healthy], 5, remember),
    ):
        pytest.fail("running() returned although a server is silent")
    assert len(groups) == 2
    for group in groups:
        wait_until_gone(group)


@pytest.mark.usefixtures("fake_sglang")
def test_taken_port_is_refused(tmp_path: Path) -> None:
    """With another server on its port, a server is not started: the other would answer in its place."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"port = {port}: Address already in use"):
            SGLangServer(replace(SPEC, port=port), tmp_path / "log").start()


def test_chosen_port_is_kept_until_the_server_binds_it(tmp_path: Path) -> None:
    """A server loads for minutes before it binds: until then nobody who looks for a free port is given its own."""
    host, port = SPEC.host, fake_server("student", tmp_path).spec.port
    with socket.socket() as other, pytest.raises(OSError, match="already in use"):
        other.bind((host, port))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn, SGLang's HTTP server, does
        server.bind((host, port))
        server.listen()
        with socket.create_connection((host, port), timeout=HANG_S):
            server.accept()[0].close()


@pytest.mark.slow
def test_no_port_is_chosen_where_sglang_looks_for_its_own() -> None:
    """SGLang finds ports for its processes without keeping them: a server's own port must lie elsewhere."""
    from sglang.srt.utils.network import get_free_port_below_ephemeral

    sglang = inspect.signature(get_free_port_below_ephemeral).parameters
    ours = server_module._SERVER_PORTS
    assert sglang["high"].default < ours[0] or ours[-1] < sglang["low"].default


@pytest.mark.slow
def test_killed_owner_takes_its_server_along(tmp_path: Path) -> None:
    """When the owner is killed with SIGKILL, the server and its workers end too."""
    owner_code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.sglang import test_sglang_server as t
from pathlib import Path
t.server_module.command = t.fake_command
server = t.fake_server("healthy", Path({str(tmp_path)!r}))
server.start()
server.wait_ready({HANG_S})
print(server.process_group, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", owner_code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        group = int(owner.stdout.readline())
        os.killpg(group, 0)
        owner.send_signal(signal.SIGKILL)
    wait_until_gone(group)


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("all is well\nFailed to find an optional thing\n", None),
        (
            "[12:00] ERROR:    [Errno 98] bind\nTraceback (most recent call last):\nE: later\n",
            "[12:00] ERROR:    [Errno 98] bind",
        ),
        (
            "Traceback (most recent call last):\n  File 'x'\n    raise\na.b.SomeError: why\nOther: 1\n",
            "a.b.SomeError: why",
        ),
        (
            "launch_server.py: error: unrecognized arguments: --x\n",
            "launch_server.py: error: unrecognized arguments: --x",
        ),
    ],
)
def test_first_cause(log: str, cause: str | None) -> None:
    """Of a log's errors the first one is found, be it a message or the last line of a traceback."""
    assert first_cause(log) == cause


def test_log_tail_is_of_the_last_start(tmp_path: Path) -> None:
    """Errors of earlier starts in the same log are not blamed."""
    log = tmp_path / "log"
    log.write_text(f"ERROR: old\n{START_MARK}python\nERROR: new\n")
    assert log_tail(log).endswith("ERROR: new")
    assert "old" not in log_tail(log)
    assert "no log" in log_tail(tmp_path / "missing")
