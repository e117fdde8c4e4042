"""Start a run's processes with NeMo-Run, watch them, and stop them: the only module that knows NeMo-Run.

In: a validated config and its run folder. Out: a finished run, or a ``DistillError`` with the first cause.

    launcher (this process) ── NeMo-Run job group ──┬── trainer: torchrun, tp * pp * dp ranks
                                                    ├── student servers (SGLang)
                                                    └── teacher servers (SGLang), if the config needs them

All start at once; the trainer waits for the servers' health. When the trainer ends, NeMo-Run ends the servers. NeMo-Run
0.11 reports a group's status by whichever task it looks at first and exits 0 after a failure, so what counts here is the
run folder: ``finished.json``, or the earliest record in ``errors/``.
"""

import contextlib
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_distill import config as config_module
from megatron_distill.collector import Endpoints
from megatron_distill.config import RunConfig
from megatron_distill.console import Console
from megatron_distill.errors import DistillError
from megatron_distill.run_folder import RunFolder

TRAINER_ENV = {
    "OMP_NUM_THREADS": "1",  # one core a rank: more threads than cores cost more than they bring
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron overlaps communication with computation by launch order
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # models are directories; nothing is looked up during a run
}


@dataclass(frozen=True)
class Task:
    """One process of a run.

    Attributes:
        name: e.g. "trainer", "student-0"; also names its log.
        command: shell line.
    """

    name: str
    command: str


def run_local(config: RunConfig, folder: RunFolder, console: Console) -> None:
    """Run all processes of a run on this machine, to the end.

    Raises:
        DistillError: with the first failure's cause. Everything is stopped by then, and what was written is kept.
        KeyboardInterrupt: after everything has been stopped.
    """
    ports = _free_ports(num_servers(config))
    tasks = local_tasks(config, folder, ports)
    console.say(f"starting {', '.join(task.name for task in tasks)}: logs in {folder.logs}")
    run = _import_nemo_run(folder)
    scripts = [run.Script(inline=_script(task, folder)) for task in tasks]
    executors = [run.LocalExecutor() for _ in tasks]
    with _quiet(folder.logs / "launcher.log"):
        experiment = run.Experiment("run", executor=run.LocalExecutor(), log_level="WARNING")
        try:
            with experiment:
                experiment.add(scripts, executor=executors, name="roles")
                experiment.run(detach=False, tail_logs=False)
        finally:
            _end_roles(folder)
    failure = folder.first_failure()
    if failure is not None:
        raise DistillError(f"{failure['role']} failed: {failure['message']}")
    if not folder.finished.exists():
        raise DistillError(
            f"trainer = ended early: it left neither a result nor a cause. See {folder.logs}/trainer.log; start the same "
            "command again to resume from the last checkpoint."
        )


def num_servers(config: RunConfig) -> int:
    """SGLang servers of a run."""
    return config.servers.student_replicas + config.needs_teacher_server * config.servers.teacher_replicas


def local_tasks(config: RunConfig, folder: RunFolder, ports: list[int]) -> list[Task]:
    """The processes of a run on one machine: the trainer first, since NeMo-Run watches the first task most closely."""
    urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
    endpoints = Endpoints(urls[: config.servers.student_replicas], urls[config.servers.student_replicas :])
    tasks = [Task("trainer", trainer_command(config, folder, endpoints))]
    for role, urls in (("student", endpoints.student), ("teacher", endpoints.teacher)):
        tasks += [
            Task(f"{role}-{index}", server_command(folder, role, index, int(url.rsplit(":", 1)[1])))
            for index, url in enumerate(urls)
        ]
    return tasks


def trainer_command(config: RunConfig, folder: RunFolder, endpoints: Endpoints) -> str:
    """The shell line of the trainer's ranks on one machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.num_ranks}"]
    role = ["-m", "megatron_distill.roles", "trainer", str(folder.root)]
    urls = ["--student-urls", ",".join(endpoints.student), "--teacher-urls", ",".join(endpoints.teacher)]
    return shlex.join([*torchrun, *role, *urls, *_leash()])


def server_command(folder: RunFolder, role: str, index: int, port: int) -> str:
    """The shell line of one server."""
    module = [sys.executable, "-m", "megatron_distill.roles", f"{role}-server", str(folder.root)]
    return shlex.join([*module, "--index", str(index), "--port", str(port), *_leash()])


def _leash() -> list[str]:
    return ["--launcher-pid", str(os.getpid())]


def _script(task: Task, folder: RunFolder) -> str:
    """Bash that runs a task, its output in a log of its own.

    The cause of a failure stays in the log, and the last line is ``exit 1`` for a server, since NeMo-Run takes a group for
    succeeded when its first task to end succeeded.
    """
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in TRAINER_ENV.items())
    log = shlex.quote(str(folder.logs / f"{task.name}.out"))
    return f"{exports}\nexec {task.command} >> {log} 2>&1"


def _import_nemo_run(folder: RunFolder) -> Any:
    os.environ["NEMORUN_HOME"] = str((folder.root / "launch").absolute())  # read at import
    try:
        import nemo_run
    except ImportError as error:
        raise DistillError(
            f"nemo_run = {error}: the launcher needs NeMo-Run. Install it with: pip install 'megatron-distill[launch]'."
        ) from error
    return nemo_run


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """NeMo-Run's own output goes to a log: the console shows the run, not its launcher."""
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def _end_roles(folder: RunFolder) -> None:
    """Stop what NeMo-Run left running (after Ctrl-C it leaves everything): whoever names this run folder as its own."""
    import signal
    import time

    deadline = time.monotonic() + 30
    number = signal.SIGTERM
    while pids := _role_pids(folder):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        time.sleep(0.5)


def _role_pids(folder: RunFolder) -> list[int]:
    """Processes of this run started by this launcher, by their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_bytes().decode(errors="replace").split("\0")
            is_role = "megatron_distill.roles" in arguments and str(folder.root) in arguments
            if is_role and str(os.getpid()) in arguments:
                found.append(int(path.parent.name))
    return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def prepare_folder(config: RunConfig, folder: RunFolder) -> int:
    """Make the run folder ready for a first or a resumed run.

    Returns:
        The step that the run continues from, 0 for a fresh one.

    Raises:
        DistillError: if the folder holds a finished run, or one of another config.
    """
    step = folder.latest_checkpoint_step()
    if folder.config.exists():
        before, now = (config_module.to_dict(c) for c in (config_module.load(folder.config), config))
        if step and (changed := sorted(key for key in now if key != "num_steps" and now[key] != before.get(key))):
            raise DistillError(
                f"run folder = {folder.root}: holds a run of another config ({', '.join(changed)} differ) at step {step}. "
                "Resuming would mix the two. Choose another --run-dir or name=..., or delete the folder."
            )
        if step >= config.num_steps:
            raise DistillError(
                f"run folder = {folder.root}: its run has finished ({step} steps). Raise num_steps to go on, choose "
                "another --run-dir or name=..., or delete the folder to start over."
            )
    folder.create()
    if not step:  # what a run left that never reached a checkpoint
        for path in (folder.metrics, folder.samples, folder.events, folder.curriculum):
            path.unlink(missing_ok=True)
    for path in folder.errors.glob("*.json"):
        path.unlink()
    folder.finished.unlink(missing_ok=True)
    shutil.rmtree(folder.sync, ignore_errors=True)
    return step
