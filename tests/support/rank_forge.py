"""Megatron ranks without their start-up: one process imports torch and Megatron, and forks the ranks of every job.

    with RankForge(folder) as forge:
        forge.run("tests.support.train_job", 2, [str(run_dir)], log_dir)     # main() of the module on two ranks

A rank sees what torchrun would give it (RANK, WORLD_SIZE, a store to meet at). Importing Megatron takes longer than the
jobs of these tests; whole runs under torchrun itself are heavy tests. Jobs may run at the same time.
"""

import ctypes
import importlib
import multiprocessing.util
import os
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
PRELOADED = (
    "megatron.training",
    "megatron.training.training",
    "megatron.training.arguments",
    "megatron.core.dist_checkpointing",
    "transformers.models.qwen3.modeling_qwen3",
    "megatron_distill.megatron.session",
)


class RankForge:
    """A context manager: the process that ranks are forked from, which ends with this one."""

    def __init__(self, folder: Path) -> None:
        """Name the place of its socket and log; nothing is started yet."""
        self._folder = folder
        self._address = str(folder / "forge")
        self._log = folder / "forge.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "tests.support.rank_forge", self._address]
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        wait_until(lambda: Path(self._address).exists() or self._process.poll() is not None, "the forge's imports")
        assert self._process.poll() is None, self._log.read_text()[-3000:]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait()

    def run(self, module: str, world_size: int, argv: Sequence[str], log_dir: Path) -> None:
        """``main()`` of a module on every rank; an ``AssertionError`` with the ranks' last words if one fails."""
        import torch.distributed as dist

        log_dir.mkdir(parents=True, exist_ok=True)
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
        with Client(self._address) as forge:
            forge.send((module, world_size, store.port, list(argv), str(log_dir)))
            codes = forge.recv()
        words = "\n".join(f"rank {rank}:\n{log_of(log_dir, rank).read_text()[-4000:]}" for rank in range(world_size))
        assert codes == [0] * world_size, words


def log_of(log_dir: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return log_dir / f"rank{rank}.log"


def _serve(address: str) -> None:
    _end_with_parent()
    from megatron_distill.megatron.backend import prepare

    prepare()
    for name in PRELOADED:
        importlib.import_module(name)
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = (
        queue.Queue()
    )  # instead of a manager process for each rank, which imports it all again
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # agents are nobody's to wait for
    with Listener(address + ".part") as listener:
        os.rename(address + ".part", address)  # there once it listens
        while True:
            with listener.accept() as client:
                if os.fork() == 0:
                    _end_with_parent()
                    _run_job(client, *client.recv())
                    os._exit(0)


def _run_job(client: Connection, module: str, world_size: int, port: int, argv: list[str], log_dir: str) -> None:
    """Fork the ranks, wait for them, and answer with their exit codes; the first failure ends the others."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pids = [_fork_rank(rank, module, world_size, port, argv, log_of(Path(log_dir), rank)) for rank in range(world_size)]
    codes = dict.fromkeys(pids, -1)
    for _ in pids:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in pids:
                if codes[other] == -1:
                    os.kill(other, signal.SIGKILL)
    client.send([codes[pid] for pid in pids])


def _fork_rank(rank: int, module: str, world_size: int, port: int, argv: list[str], log: Path) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        _end_with_parent()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        sys.argv = [module, *argv]
        importlib.import_module(module).main()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):  # told, with 1 for a code, as by Python itself
            print(end.code, file=sys.stderr)
        else:
            code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        multiprocessing.util._exit_function()  # os._exit would leave a manager of multiprocessing running
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent dies, however that happens (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    _serve(sys.argv[1])
