"""Run all of a run's processes on this machine, watch them, and stop them.

In: a validated config and its run folder. Out: a finished run, or a ``DistillError`` with the first cause.

    launcher (this process) ── keeper ── NeMo-Run job group ──┬── trainer: torchrun, tp * pp * dp ranks
                                                              ├── student servers (SGLang)
                                                              └── teacher servers (SGLang), if the config needs them

All start at once; the trainer waits for the servers' health. When the trainer ends, NeMo-Run ends the servers. On a machine
with GPUs each rank has one of its own and each server ``tp``; on one without, they share the cores.
"""

import itertools
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from megatron_distill.config import RunConfig
from megatron_distill.errors import DistillError
from megatron_distill.launch import preflight, processes, signals
from megatron_distill.launch.doctor import environment
from megatron_distill.launch.launch import (
    ROLE_ENV,
    check_folder,
    command_facts,
    num_gpus,
    opened,
    require_success,
    role_arguments,
    server_groups,
    trainer_log_size,
)
from megatron_distill.launch.threads import num_cores, threads_of
from megatron_distill.pages.report import write_report
from megatron_distill.runs.console import Console
from megatron_distill.runs.run_folder import RunFolder, read_lines, write_json
from megatron_distill.runs.trackers.process import track

SAVE_S = 30.0
"""How long a stop waits for the step under way to end, so that it can be saved."""

_FAILED_S = 60.0  # after a role's failure the others notice by themselves, in this time
_END_S = 10.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Task:
    """One process of a run on this machine.

    Attributes:
        name: e.g. "trainer", "student-0"; also names its log.
        command: shell line.
        env: variables of its own.
    """

    name: str
    command: str
    env: dict[str, str] = field(default_factory=dict)


def run_local(config: RunConfig, folder: RunFolder, console: Console) -> None:
    """Run all processes of a run on this machine, to the end.

    The first Ctrl-C, SIGTERM or SIGHUP asks the trainer to save at the end of the step it is in, for so long; then
    everything is ended. A second one ends everything at once.

    Raises:
        DistillError: with the first failure's cause. Everything is stopped by then, and what was written is kept.
        Interrupted: after everything has been stopped.
    """
    names = ", ".join(task.name for task in local_tasks(config, folder, visible_gpus()))
    console.say(f"starting {names}: logs in {folder.logs}")
    tag = secrets.token_hex(8)
    log_size = trainer_log_size(folder)
    with signals.counted() as stop, (folder.logs / "launcher.log").open("ab") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "megatron_distill.launch.keeper", str(folder.root)],
            stdin=subprocess.PIPE,  # closed by the kernel however this process ends; see keeper
            stdout=log,
            stderr=log,
            env=os.environ | {processes.TAG: tag},
            start_new_session=True,  # out of reach of the terminal's Ctrl-C, which is ours to act on
        )
        try:
            told = _follow(keeper, stop, folder, console)
        finally:
            _end(keeper, tag, grace_s=0 if stop.count > 1 else _END_S, stop=stop)
        if stop.count:
            raise signals.Interrupted(stop.first, told)
    require_success(folder, "trainer = ended early", log_size)


def _follow(keeper: "subprocess.Popen[bytes]", stop: signals.Stop, folder: RunFolder, console: Console) -> str:
    """Wait for the keeper's end, a failure that it does not end by itself, or a request to stop.

    Returns:
        What became of a request to stop; empty without one.
    """
    failed_at = None
    while keeper.poll() is None and not stop.count:
        if failed_at is None and folder.first_failure() is not None:
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _FAILED_S:
            return ""
        time.sleep(_POLL_S)
    if not stop.count:
        return ""
    saved = folder.latest_checkpoint_step()
    reached = max((int(record["step"]) for record in read_lines(folder.metrics)), default=0)
    ranks = _ranks_below(keeper.pid)
    if reached <= saved or not ranks:
        console.say(f"{stop.first.name}: stopping. Nothing is lost: the last checkpoint is of step {saved}")
        return _kept(saved)
    console.say(
        f"{stop.first.name}: stopping. A checkpoint is saved if this step ends within {SAVE_S:.0f} s; once more ends "
        "everything at once"
    )
    processes.send(ranks, signal.SIGUSR1)  # the ranks alone: torchrun would end their helpers with them
    deadline = time.monotonic() + SAVE_S
    while keeper.poll() is None and stop.count == 1 and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return _kept(folder.latest_checkpoint_step())


def _kept(step: int) -> str:
    kept = f"from step {step}" if step else "from the start, since no checkpoint was saved"
    return f"stopped; the same command goes on {kept}"


def _ranks_below(keeper_pid: int) -> list[int]:
    """The trainer's ranks, without the torchrun that started them, whose command line names the same module."""
    found = []
    for pid in processes.descendants(keeper_pid):
        arguments = processes.arguments_of(pid)
        if "megatron_distill.launch.roles" in arguments and "torch.distributed.run" not in arguments:
            found += [pid] if arguments[arguments.index("megatron_distill.launch.roles") + 1] == "trainer" else []
    return found


def _end(keeper: "subprocess.Popen[bytes]", tag: str, grace_s: float, stop: signals.Stop) -> None:
    """End every process of the run, the keeper last, since orphans go to it."""
    if keeper.poll() is None:
        ending = threading.Thread(target=processes.end_tagged, args=(tag, grace_s, keeper.pid))
        ending.start()
        while ending.is_alive():
            ending.join(_POLL_S)
            if stop.count > 1:
                processes.end_tagged(tag, 0, keeper.pid)
        keeper.kill()
    keeper.wait()
    processes.end_tagged(tag, 0)
    if keeper.stdin:
        keeper.stdin.close()


def train(config: RunConfig, folder: RunFolder, out: TextIO | None = None, verbose: bool = False) -> None:
    """A whole run, or the rest of one: check, start, follow on the console.

    Raises:
        DistillError: before anything starts, or with the first failure's cause.
        Interrupted: it was asked to stop, and everything has been stopped.
    """
    check_folder(config, folder)
    preflight.check(config, folder)
    with opened(config, folder) as resumed_step:
        write_json(folder.root / "env.json", environment() | command_facts(config))
        with Console(folder, config.num_steps, out, verbose=verbose) as console, track(config, folder):
            start = f"resuming {folder.root} at step {resumed_step}" if resumed_step else f"run folder: {folder.root}"
            console.say(start)
            run_local(config, folder, console)
        if not folder.report.exists():
            write_report(folder)


def local_tasks(config: RunConfig, folder: RunFolder, gpus: Sequence[str]) -> list[Task]:
    """The processes of a run on one machine: the trainer first, since NeMo-Run watches the first task most closely.

    Args:
        config: the run's, as config.json holds it.
        folder: where the run is recorded.
        gpus: ids of this machine's GPUs; empty on a machine without.

    Raises:
        DistillError: there are GPUs, but too few.
    """
    if gpus and len(gpus) < num_gpus(config):
        raise DistillError(
            f"GPUs = {len(gpus)}: the run takes {num_gpus(config)}, one for each of {config.num_ranks} trainer ranks and "
            f"tp for each server ({_list_servers(config)}). Lower student.parallel.tp, student.parallel.dp or "
            "servers.*, let servers share the trainer's GPUs (servers.shared_gpu_frac=0.3), launch it on a cluster, or leave "
            "the GPUs alone: CUDA_VISIBLE_DEVICES= megatron-distill ..."
        )
    # In turn: each has one owner, or more where they are shared.
    free = itertools.cycle(gpus[: num_gpus(config)])
    threads = threads_of(config, num_cores())

    def task(name: str, arguments: list[str], size: int, num_threads: int) -> Task:
        mine = list(itertools.islice(free, size))
        env = {"OMP_NUM_THREADS": str(num_threads)} | ({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})
        return Task(name, shlex.join([sys.executable, *arguments, "--launcher-pid", str(os.getpid())]), env)

    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.num_ranks}"]
    tasks = [task("trainer", torchrun + role_arguments("trainer", folder), config.num_ranks, threads.rank)]
    device = ["--device", "cuda"] if gpus else []  # a server that was given a GPU must not fall back to a CPU
    for role, (replicas, tp) in server_groups(config).items():
        tasks += [
            task(
                f"{role}-{index}",
                [*role_arguments(f"{role}-server", folder), "--index", str(index), *device],
                tp,
                threads.server,
            )
            for index in range(replicas)
        ]
    return tasks


def visible_gpus(devices: Path = Path("/dev")) -> list[str]:
    """Ids of the GPUs that processes started here may use; the launcher needs neither torch nor a driver to tell.

    CUDA counts what a process can see from 0, whatever the device files are called: a container that was given a node's
    last four GPUs holds nvidia4 to nvidia7, and its devices are 0 to 3.

    Args:
        devices: where the driver's device files are: nvidia0, nvidia1, ...
    """
    present = sum(1 for _ in devices.glob("nvidia[0-9]*"))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not present or chosen is None:
        return [str(number) for number in range(present)]
    return [one for one in chosen.split(",") if one not in ("", "-1", "NoDevFiles")]


def _list_servers(config: RunConfig) -> str:
    return ", ".join(f"{replicas} {role} of {tp}" for role, (replicas, tp) in server_groups(config).items())


def task_script(task: Task, folder: RunFolder) -> str:
    """Bash that becomes a task, its output in a log of its own."""
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in (ROLE_ENV | task.env).items())
    log = shlex.quote(str(folder.logs / f"{task.name}.out"))
    return f"{exports}\nexec {task.command} >> {log} 2>&1"
