"""Starts and stops SGLang servers as child processes.

In: a ``ServerSpec`` (which model, where, on which device) and a log file. Out: a URL that ``SGLangClient`` takes.

    student = SGLangServer(ServerSpec(model_dir, role="student"), log_file)
    teacher = SGLangServer(ServerSpec(other_dir, role="teacher"), other_log)
    with running([student, teacher], timeout_s=300):       # both load at the same time
        client = SGLangClient([student.url], key=student.key, ...)

``command`` alone is pure: a cluster launcher puts the same argument list into a job script.

A server never outlives its owner: it leads a process group of its own, which ``stop`` ends, and it runs on a leash
(``leash.py``), so that it also ends if the owner is killed. It binds to the loopback address unless told otherwise, and asks
for its key on every route but its health: whoever may write to it may change the student, and whoever shares a machine shares
its loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

import urllib3

from megatron_distill.config.flags import SGLANG, not_parsed
from megatron_distill.errors import ConfigError, ServerError
from megatron_distill.sglang.cpu_plugin import CPU_SERVER_ENV
from megatron_distill.sglang.hidden_states import HIDDEN_STATES_ENV
from megatron_distill.sglang.leash import KEY_VARIABLE
from megatron_distill.sglang.server_log import START_MARK, log_tail

Progress = Callable[[str], None]
"""Receives one line of text about a slow phase."""

NCCL_ENV = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""What SGLang 0.5.23 sets in its processes unless it is set: a process that shares a group with a server needs the same."""

_SERVER_PORTS = range(30000, 32768)
"""Where servers that name no port are put: above the range in which SGLang 0.5.23 looks for its processes' ports, which it also
binds only after loading (22000 to 29999), and below what Linux gives to outgoing connections (from 32768)."""

_port_holders: list[socket.socket] = []

_POLL_S = 0.25
_HEALTH_TIMEOUT_S = 25.0  # SGLang's own limit on a health check is 20 s
_PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True)
class ServerSpec:
    """What one server is.

    Attributes:
        model_dir: Hugging Face directory with config and safetensors.
        role: "student", "teacher", ...: names the server in messages.
        host: address to bind to, under which clients reach it.
        port: TCP port; 0 picks a free one when an ``SGLangServer`` is made.
        device: "auto" takes CUDA if there is any, when an ``SGLangServer`` is made.
        dtype: weights and activations, as SGLang spells it; "auto" follows the model's config.
        context_length: longest sequence served, in tokens; None takes the model's own limit. SGLang scores at most
            ``context_length - 7`` of them.
        deterministic: honour ``sampling_seed``. Without it SGLang ignores seeds. On a GPU it selects batch-invariant kernels,
            which are slower; on a CPU it costs nothing.
        weight_version: label of the weights in ``model_dir``; every reply carries it.
        tp: tensor-parallel size of this one server.
        returns_hidden_states: whether ``SGLangClient.hidden_states`` may be asked; see ``sglang.hidden_states``.
        cpu_threads: OpenMP threads of a CPU server. More than one helps only large models on idle cores: threads that wait for
            each other on busy cores made a tiny model many times slower.
        extra_args: further ``sglang.launch_server`` arguments; they come last, so they win.
    """

    model_dir: Path
    role: str
    host: str = "127.0.0.1"
    port: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: str = "auto"
    context_length: int | None = None
    deterministic: bool = True
    weight_version: str = "0"
    tp: int = 1
    returns_hidden_states: bool = False
    cpu_threads: int = 1
    extra_args: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True)
class ServerCommand:
    """How to run a server: the arguments, and the environment variables to add to the caller's."""

    argv: list[str]
    env: dict[str, str]


def command(spec: ServerSpec, python: str = sys.executable) -> ServerCommand:
    """The command line of a server. Pure: reads no file, no environment and no hardware.

    Args:
        spec: device and port must be settled (neither "auto" nor 0): whoever writes a job script on a login node knows
            the compute node's device, this machine does not.
        python: the interpreter to start.

    Raises:
        ConfigError: device or port is still open.
    """
    if spec.device == "auto" or spec.port == 0:
        raise ConfigError(
            f"ServerSpec({spec.role}) = device {spec.device!r}, port {spec.port}: both must be settled to write a command. "
            "It may run on another machine. Set device to 'cpu' or 'cuda' and port to a number."
        )
    argv = [python, "-m", "sglang.launch_server", "--model-path", str(spec.model_dir), "--host", spec.host]
    argv += ["--port", str(spec.port), "--device", spec.device, "--dtype", spec.dtype, "--tp-size", str(spec.tp)]
    argv += ["--weight-version", spec.weight_version]
    argv += ["--skip-tokenizer-init"]  # token ids in, token ids out
    argv += ["--skip-server-warmup"]  # the health check generates a token; that is enough
    argv += ["--log-level-http", "warning"]  # a line for each request says nothing
    argv += ["--sleep-on-idle"]  # otherwise an idle scheduler spins on a whole core
    if spec.context_length is not None:
        argv += ["--context-length", str(spec.context_length)]
    if spec.deterministic:
        argv += ["--enable-deterministic-inference"]
    env: dict[str, str] = {}
    if spec.returns_hidden_states:
        argv += ["--enable-return-hidden-states"]
        env |= HIDDEN_STATES_ENV
    if spec.device == "cpu":
        argv += ["--attention-backend", "torch_native", "--disable-overlap-schedule"]
        # The token cap sizes the cache. The fraction only bounds it, by the *machine's* free memory: a low one ends the start
        # as soon as other processes take that share while the model loads (0.1 did so beside a loading trainer).
        argv += ["--mem-fraction-static", "0.8", "--max-total-tokens", "32768"]
        env |= CPU_SERVER_ENV | {"OMP_NUM_THREADS": str(spec.cpu_threads)}
        if spec.tp > 1:  # one core a rank; SGLang otherwise asks for as many NUMA nodes as ranks
            env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(spec.tp))
    elif spec.dtype == "float32":  # SGLang's choice for seeds, FlashAttention 3, takes half precision only
        argv += ["--attention-backend", "triton"]
    return ServerCommand(argv + list(spec.extra_args), env)


def flag_problems(arguments: Sequence[str]) -> list[str]:
    """A sentence for each of a user's flags that SGLang's own parser refuses."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return not_parsed(parser, arguments, SGLANG, "SGLang")


class SlowStartError(ServerError):
    """A server was alive, and did not answer in the time it was given."""


class SGLangServer:
    """One server process: start, wait until it answers, stop."""

    def __init__(self, spec: ServerSpec, log_file: Path, key: str | None = None) -> None:
        """Settle device, port and key. Starts nothing.

        Args:
            spec: what to serve.
            log_file: receives the server's output; appended to.
            key: what clients must show; a random one by default.
        """
        device = _detect_device() if spec.device == "auto" else spec.device
        model_dir = Path(spec.model_dir).absolute()  # a relative one, if missing, would be looked up on a model hub
        self.spec = replace(spec, model_dir=model_dir, device=device, port=spec.port or _reserve_port(spec.host))
        self.log_file = Path(log_file)
        self.key = key or secrets.token_hex(32)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: BinaryIO | None = None

    @property
    def url(self) -> str:
        """Where clients find it."""
        return self.spec.url

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"sglang.{self.spec.role} ({self.url})"

    @property
    def process_group(self) -> int | None:
        """Id of the group of all its processes, or None if it is not started."""
        return self._process.pid if self._process else None

    def is_alive(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and return at once.

        Raises:
            ServerError: already started, or its port is taken (another server would answer in its place).
        """
        if self._process is not None:
            raise ServerError(f"{self.name}: already started. One object is one process. Call stop() first.")
        _require_free_port(self.spec)
        to_run = command(self.spec)
        module, arguments = to_run.argv[2], to_run.argv[3:]
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self._log = self.log_file.open("ab")
        self._log.write(f"{START_MARK}{' '.join(to_run.argv)}\n".encode())
        self._log.flush()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_distill.sglang.leash", module, *arguments],
            stdin=subprocess.PIPE,  # the leash
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=_without_rank_variables(os.environ) | to_run.env | {KEY_VARIABLE: self.key},
            start_new_session=True,  # a process group to kill, which Ctrl-C in the terminal does not reach
        )

    def wait_ready(
        self, timeout_s: float, progress: Progress | None = None, stopping: threading.Event | None = None
    ) -> None:
        """Wait until the server answers.

        Polls the process as well as the port, so that a server that dies is reported when it dies. On failure the
        process group is killed first.

        Args:
            timeout_s: seconds from now.
            progress: called every few seconds with a line of text.
            stopping: ends the wait when it is set.

        Raises:
            ServerError: the process ended, or (``SlowStartError``) did not answer in time. The message ends with the first
                cause in its log.
        """
        started = time.monotonic()
        next_report = started + _PROGRESS_EVERY_S
        while not answers(self.url):
            if stopping is not None and stopping.is_set():
                return
            now = time.monotonic()
            if not self.is_alive():
                code = self._process.returncode if self._process else None
                raise ServerError(self._start_failure(f"ended while starting (exit code {code})"))
            if now - started > timeout_s:
                told = f"did not answer within {timeout_s:.0f} s. Give it longer if its log still moves"
                raise SlowStartError(self._start_failure(told))
            if progress and now >= next_report:
                next_report = now + _PROGRESS_EVERY_S
                progress(f"{self.name}: starting, {now - started:.0f} s of at most {timeout_s:.0f} s")
            time.sleep(_POLL_S)
        if progress:
            progress(f"{self.name}: ready")

    @property
    def exit_code(self) -> int | None:
        """Of a process that has ended: negative for a signal."""
        return self._process.poll() if self._process else None

    def ask_to_end(self) -> None:
        """Send SIGTERM and return at once; ``stop`` must follow."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self, drain_s: float = 15.0) -> None:
        """End the server and every process it started. Does nothing if it was not started.

        Args:
            drain_s: how long after SIGTERM, in which SGLang finishes running requests, the group is killed.
        """
        if self._process is None or self._log is None:
            return
        self.ask_to_end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=drain_s)
        self._kill_group()
        self._process, self._log = None, None

    def log_tail(self) -> str:
        """The end of what this process wrote, and the first cause of a failure on the last line."""
        return log_tail(self.log_file)

    def __enter__(self) -> Self:
        """Start; use ``wait_ready`` or ``running`` to wait."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start_failure(self, what: str) -> str:
        """End it; the message."""
        self._kill_group()
        return f"{self.name} = {self.spec.model_dir}: {what}. Log: {self.log_file}\n{self.log_tail()}"

    def _kill_group(self) -> None:
        if self._process is None or self._log is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        self._log.close()


def answers(url: str) -> bool:
    """Whether the server at ``url`` is up and can generate: SGLang's /health draws one token."""
    try:  # urllib3: unlike requests, it never sends a loopback call to a configured proxy
        with urllib3.PoolManager() as http:
            status: int = http.request("GET", f"{url}/health", timeout=_HEALTH_TIMEOUT_S, retries=False).status
    except urllib3.exceptions.HTTPError:
        return False
    return status == 200


@contextlib.contextmanager
def running(
    servers: Sequence[SGLangServer], timeout_s: float, progress: Progress | None = None
) -> Iterator[Sequence[SGLangServer]]:
    """Start all servers at once, wait for all, and stop all at the end or at the first failure.

    Raises:
        ServerError: one of them did not start.
    """
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
        for server in servers:
            stack.callback(server.ask_to_end)  # called first, so that all end at the same time
        for server in servers:
            server.start()
        deadline = time.monotonic() + timeout_s
        for server in servers:
            server.wait_ready(max(1.0, deadline - time.monotonic()), progress)
        yield servers


def _detect_device() -> Literal["cpu", "cuda"]:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _reserve_port(host: str) -> int:
    """A port that nobody holds, and that nobody is given before the server binds it, minutes of loading later.

    It stays bound here, for as long as this process lives: no search for a free port finds it, while the server, which asks to
    reuse addresses, may listen on it.
    """
    for port in random.SystemRandom().sample(_SERVER_PORTS, 100):
        holder = socket.socket()
        try:
            holder.bind((host, port))
        except OSError:
            holder.close()
            continue
        # Only now: two processes that hold a port must not be given the same one.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _port_holders.append(holder)
        return port
    raise ServerError(
        f"ServerSpec.port = 0 on {host}: no free port found in 100 tries. Is the host right? Name a port."
    )


def _require_free_port(spec: ServerSpec) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free, as it is for SGLang
        try:
            probe.bind((spec.host, spec.port))
        except OSError as error:
            raise ServerError(
                f"sglang.{spec.role}.port = {spec.port}: {error.strerror} on {spec.host}. "
                "Another process would answer in the server's place. Choose another port, or 0 for a free one."
            ) from error


def _without_rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment less what torchrun set for the *trainer's* ranks.

    TORCHELASTIC_USE_AGENT_STORE in particular makes torch wait for a rendezvous store that nobody serves (torch 2.14).
    """
    of_a_rank = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in environment.items() if k not in of_a_rank and not k.startswith(("TORCHELASTIC_", "ROLE_"))}
