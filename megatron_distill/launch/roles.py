"""The processes of a run: ``python -m megatron_distill.launch.roles ROLE RUN_DIR ...``, started by the launcher only.

    trainer                     one process a rank, under torchrun
    student-server --index N    one SGLang replica of the student, on a free port, and its successors if it is lost
    teacher-server --index N    one SGLang replica of the teacher, likewise
    evaluation-server --index N one SGLang replica of the student that evaluations alone ask, likewise

Servers announce their addresses in the run folder, where the trainer looks for them (see ``endpoints``). A server that dies or
hangs is started again on the same port (see ``sglang.supervisor``); it serves again when the trainer has sent it its weights.
A role that fails leaves its cause in the run folder's ``errors/``, so that the launcher can print the first one, and ends
with a non-zero code. A role never outlives the launcher that started it (``--launcher-pid``).
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from megatron_distill import config as config_module
from megatron_distill.config import SERVING_DTYPES, RunConfig
from megatron_distill.errors import DistillError
from megatron_distill.launch import endpoints, processes
from megatron_distill.launch.launch import MODEL_OF, server_groups
from megatron_distill.launch.resume import requeued_step
from megatron_distill.runs.lock import take_part
from megatron_distill.runs.run_folder import RunFolder, read_json, write_json
from megatron_distill.sglang.server import NCCL_ENV, ServerSpec

_POLL_S = 0.5
_GRACE_S = 20.0


def main(argv: Sequence[str] | None = None) -> None:
    """Run one role to its end."""
    parser = argparse.ArgumentParser(prog="megatron_distill.launch.roles")
    parser.add_argument("role", choices=["trainer", "student-server", "teacher-server", "evaluation-server"])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--launcher-pid", type=int, default=0)
    options = parser.parse_args(argv)
    folder = RunFolder(options.run_dir)
    name = f"{options.role}-{os.environ.get('RANK', options.index)}"
    take_part(folder.root)
    with _failure_reported(folder, name):
        if options.launcher_pid:
            _end_with(options.launcher_pid, None if options.role == "trainer" else folder)
        config = config_module.load(folder.config)
        if options.role == "trainer":
            _train(config, folder)
        else:
            _serve(config, folder, options.role.removesuffix("-server"), options.index, options.device)


@contextlib.contextmanager
def _failure_reported(folder: RunFolder, name: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        if isinstance(error, SystemExit) and not error.code:  # Megatron's end after it has saved on a signal
            _end_at_once(0)
        try:
            _report(folder, name, error)
        finally:
            _end_at_once(1)


def _report(folder: RunFolder, name: str, error: BaseException) -> None:
    """Tell launcher and log; either may lie on a disk that is full."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, DistillError):
        folder.fail(name, str(error))
        print(text, file=sys.stderr)
    else:
        folder.fail(name, f"{text}. See {folder.logs}.")
        traceback.print_exception(error)


def _end_with(launcher_pid: int, served: RunFolder | None) -> None:
    """End this process soon after the launcher has gone, or the run that it serves has finished; politely at first."""

    def watch() -> None:
        while processes.is_alive(launcher_pid) and not (served and served.finished.exists()):
            time.sleep(_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)
        _end_at_once(1)

    threading.Thread(target=watch, daemon=True, name="launcher-watch").start()


def _end_at_once(code: int) -> NoReturn:
    """End this process and its helpers, which would outlive it: Megatron's checkpoint helper waits for ever.

    Not by ``sys.exit``, which waits: for threads, in which responses are awaited, and perhaps for a collective that other ranks
    never reach.
    """
    with contextlib.suppress(OSError):  # of a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    processes.send(processes.descendants(os.getpid()), signal.SIGKILL)
    os._exit(code)


def _save_and_stop_on(warning: signal.Signals) -> None:
    """Treat ``warning`` as SIGTERM, at which Megatron saves a checkpoint and ends, once Megatron listens for that.

    Slurm announces the end of a job's time to every process of it. It must be a signal that the servers ignore: the step
    that the trainer finishes first still needs them.
    """

    def stop(*_: object) -> None:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(warning, stop)


def _stop_when_requested(folder: RunFolder, warning: signal.Signals) -> None:
    """Send ``warning`` to this process once the run folder holds a request to stop.

    The file rather than Slurm's signal alone: where processes are tracked by cgroups, that reaches the task's first process
    only, and a rank is its grandchild. One rank is enough, since Megatron asks all whether to stop.
    """

    def watch() -> None:
        while not folder.stop_requested.exists():
            time.sleep(_POLL_S)
        os.kill(os.getpid(), warning)

    threading.Thread(target=watch, daemon=True, name="stop-watch").start()


def _pin_nccl(config: RunConfig) -> None:
    """Give the trainer the servers' NCCL settings: a group that spans both needs the same. What the profile sets, both have."""
    if config.servers.weight_sync == "broadcast":
        for name, value in NCCL_ENV.items():
            os.environ.setdefault(name, value)


def _train(config: RunConfig, folder: RunFolder) -> None:
    # Before torch is imported: every micro-batch has another length, which would leave holes in the GPU's memory.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from megatron_distill.megatron.session import run
    from megatron_distill.models.vocabulary import load_vocabulary
    from megatron_distill.training.leader import Endpoints, Leader

    _save_and_stop_on(signal.SIGUSR1)
    _pin_nccl(config)
    endpoints.settle_address()
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        folder.rewind(requeued_step(folder, config.on_damaged_checkpoint == "use_previous"))
        _record_environment(folder)
        _stop_when_requested(folder, signal.SIGUSR1)
    vocabulary = load_vocabulary(
        config.student.path, config.teacher.path or config.student.path, config.rollouts.stop_tokens
    )

    def connect(dp_rank: int, must_stop: Callable[[], bool]) -> Leader:
        urls = {
            role: endpoints.announced(folder, role, replicas, config.servers.startup_timeout_s)
            for role, (replicas, _) in server_groups(config).items()
        }
        found = Endpoints(urls, endpoints.key_of(folder))
        return Leader(config, folder, found, vocabulary, dp_rank, must_stop)

    run(config, folder, vocabulary, connect)
    if is_first:
        _write_report(folder)
        write_json(folder.finished, {"time": time.time(), "step": config.num_steps})


def _write_report(folder: RunFolder) -> None:
    """The page, by the trainer: a job that nobody follows has one too. A run does not fail for want of its page."""
    from megatron_distill.pages.report import write_report

    try:
        write_report(folder, at_end=True)
    except Exception as error:
        folder.event(
            "trainer", f"the report was not written: {error!r}; write it with: megatron-distill report {folder.root}"
        )


def _record_environment(folder: RunFolder) -> None:
    """Put the versions and hardware of the node that trains into ``env.json``: the launcher may run on a login node."""
    from megatron_distill.launch.doctor import environment

    path = folder.root / "env.json"
    launched = read_json(path) if path.exists() else {}
    write_json(path, launched | environment())


def _serve(config: RunConfig, folder: RunFolder, role: str, index: int, device: Literal["auto", "cpu", "cuda"]) -> None:
    from megatron_distill.sglang.server import SGLangServer
    from megatron_distill.sglang.supervisor import SupervisionLimits, Supervisor

    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    if os.environ.get("MEGATRON_DISTILL_DEVICE") == "cpu":  # the user's word, as in ``megatron.cpu_backend``
        device = "cpu"
    servers, log_file, key = config.servers, folder.logs / f"{role}-{index}.log", endpoints.key_of(folder)
    num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))  # the launcher's choice
    spec = server_spec(config, role, index, endpoints.settle_address(), device, num_threads)
    first = SGLangServer(spec, log_file, key)
    endpoints.announce(folder, role, index, first.url)
    limits = SupervisionLimits(servers.startup_timeout_s, servers.hang_timeout_s, servers.max_restarts_per_hour)
    Supervisor(
        lambda: SGLangServer(first.spec, log_file, key),  # on the same port: clients need no new address
        limits,
        lambda text: folder.event(f"{role} server {index}", text),
    ).run(stopping)


def server_spec(
    config: RunConfig,
    role: str,
    index: int,
    host: str,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    cpu_threads: int = 1,
) -> ServerSpec:
    """What one server of a run is.

    Args:
        config: of the run.
        role: "student", "teacher" or "evaluation".
        index: of the replica.
        host: address to listen at.
        device: "cuda" where the launcher gave it GPUs: it must not fall back to a CPU.
        cpu_threads: see ``ServerSpec``.
    """
    servers, is_student = config.servers, MODEL_OF[role] == "student"
    shared = (
        (f"--mem-fraction-static={servers.shared_gpu_frac}",) if servers.shared_gpu_frac and device == "cuda" else ()
    )
    writes = is_student or config.teacher_writes
    return ServerSpec(
        model_dir=Path(config.student.path if is_student else config.teacher.path),
        role=f"{role}-{index}",
        host=host,
        device=device,
        dtype=SERVING_DTYPES[config.student.dtype],
        context_length=config.server_context_tokens,
        deterministic=writes and servers.deterministic,  # scores draw nothing
        tp=servers.student_tp if is_student else servers.teacher_tp,
        cpu_threads=cpu_threads,
        returns_hidden_states=not is_student and config.teacher.sends_hidden_states and config.distill.weight > 0,
        extra_args=shared + (servers.student_args if is_student else servers.teacher_args),
    )


if __name__ == "__main__":
    main()
