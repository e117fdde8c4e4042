"""What starting a run takes, wherever it runs: the roles' commands, the run folder, NeMo-Run, and the verdict at the end.

    recipe ── launch ──┬── local     this machine, NeMo-Run's LocalExecutor
                       └── cluster   a Slurm job, NeMo-Run's SlurmExecutor

This module, ``keeper`` and ``cluster`` are the only ones here that know NeMo-Run; no process of a run imports them. A run's
roles start all at once and find each other through the run folder (see ``endpoints``). NeMo-Run 0.11 reports a group's
status by whichever task it looks at first and exits with 0 after a failure, so what counts is the run folder:
``finished.json``, or the earliest record in ``errors/``.
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig
from megatron_distill.errors import DistillError
from megatron_distill.launch import endpoints
from megatron_distill.launch.resume import changed_warmup, refused_changes, whole_checkpoint
from megatron_distill.models import hub
from megatron_distill.runs import marks
from megatron_distill.runs.lock import RunLock
from megatron_distill.runs.run_folder import RunFolder

Train = Callable[[RunConfig, RunFolder, TextIO], None]
"""Makes a whole run, or the rest of one, its progress on the stream: ``local.train``, or ``cluster.train`` of a profile."""

ROLE_ENV = {
    "OMP_NUM_THREADS": "1",  # unless ``cpu_threads`` says otherwise; see ``threads``
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait for each other leave the core to whoever works
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron overlaps communication with computation by launch order
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # models are directories; nothing is looked up during a run
}


MODEL_OF: dict[str, Literal["student", "teacher"]] = {
    "student": "student",
    "teacher": "teacher",
    "evaluation": "student",
}
"""Whose model the servers of a role hold, and whose ``servers.*_tp`` and flags are theirs."""


def server_groups(config: RunConfig) -> dict[str, tuple[int, int]]:
    """``{role: (replicas, tensor-parallel size of each)}`` of the SGLang servers that a run needs."""
    servers = config.servers
    groups = {"student": (servers.student_replicas, servers.student_tp)}
    if config.needs_teacher_server:
        groups["teacher"] = (servers.teacher_replicas, servers.teacher_tp)
    if servers.evaluation_replicas:
        groups["evaluation"] = (servers.evaluation_replicas, servers.student_tp)
    return groups


def num_gpus(config: RunConfig) -> int:
    """GPUs that a run takes: one for each trainer rank, ``tp`` for each server, unless they share."""
    sizes = server_groups(config).values()
    if config.servers.shared_gpu_frac:
        return max(config.num_ranks, *(tp for _, tp in sizes))
    return config.num_ranks + sum(replicas * tp for replicas, tp in sizes)


ROLES_MODULE = "megatron_distill.launch.roles"


def role_arguments(role: str, folder: RunFolder) -> list[str]:
    """Arguments of ``python`` that make it one process of a run; see ``roles``."""
    return ["-m", ROLES_MODULE, role, str(folder.root)]


def check_folder(config: RunConfig, folder: RunFolder) -> None:
    """Refuse a run folder that this run may not go on in. Changes nothing, so that a dry run may ask too.

    Raises:
        DistillError: the folder is not ours, holds a finished run, one of another config, or files that would be lost.
    """
    marks.check_claim(folder.root, "run", "run folder")
    step = folder.latest_checkpoint_step()
    where = f"run folder = {folder.root}"
    if step and not folder.config.exists():
        raise DistillError(
            f"{where}: holds a checkpoint of step {step} but no {folder.config.name}, so nothing tells whether it is of this "
            "run. Put the file back, or choose another --run-dir or name=..."
        )
    if step:
        before = config_module.load(folder.config)
        if changed := refused_changes(before, config):
            raise DistillError(
                f"{where}: holds a run of another config ({', '.join(changed)} differ) at step {step}. "
                "Resuming would mix the two. To go on from a checkpoint with another config: megatron-distill fork. Or choose "
                "another --run-dir or name=..., or delete the folder."
            )
        if folder.has_finished(config.num_steps) or step > config.num_steps:
            raise DistillError(
                f"{where}: its run has {'finished' if folder.has_finished(step) else 'come'} to {step} steps. Raise "
                f"num_steps = {config.num_steps} to go on, choose another --run-dir or name=..., or delete the folder to start "
                "over."
            )
        if changed_rate := changed_warmup(before, config, step):
            raise DistillError(f"{where}: {changed_rate}")
    for model in (folder.hf, folder.hf_best):
        marks.check_replaceable(model, f"run folder's {model.name}")


@contextlib.contextmanager
def opened(config: RunConfig, folder: RunFolder) -> Iterator[int]:
    """Hold a run folder, ready for a first or a resumed run: marked, locked, its config written.

    Yields:
        The step that the run continues from, 0 for a fresh one.

    Raises:
        DistillError: see ``check_folder``; or another launcher holds the folder.
    """
    check_folder(config, folder)
    folder.create()
    with RunLock(folder.root):
        check_folder(config, folder)  # again, since another launcher may have been here meanwhile
        step = whole_checkpoint(folder, config.on_damaged_checkpoint == "use_previous")
        check_folder(config, folder)  # and again, since that may be an earlier one
        folder.forget_last_start()
        folder.rewind(step)
        endpoints.forget(folder)
        config_module.save(config, folder.config)
        yield step


def command_facts(config: RunConfig) -> dict[str, Any]:
    """What was typed, where, and what came from the hub, for ``env.json``: no variable of the environment is written."""
    return {"command": sys.argv, "working_directory": os.getcwd(), "hub": hub.revisions(config)}


def trainer_log_size(folder: RunFolder) -> int:
    """Bytes of the trainer's log so far, to tell a start's own lines later."""
    log = folder.logs / "trainer.out"
    return log.stat().st_size if log.exists() else 0


def _killed_rank(folder: RunFolder, since: int) -> str:
    """Which rank a signal ended first, by torchrun's own account; empty if none was.

    The other ranks then report that a connection broke, which is a consequence and not the cause.
    """
    log = folder.logs / "trainer.out"
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(since)
        text = file.read().decode(errors="replace")
    root = re.search(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*-(\d+)", text, re.DOTALL)
    if root is None or int(root[2]) == signal.SIGTERM:  # torchrun's own way to end the others
        return ""
    name = signal.Signals(int(root[2])).name
    hint = " (the kernel kills by SIGKILL where memory runs out: see dmesg)" if name == "SIGKILL" else ""
    return f"trainer rank {root[1]} was ended by {name}{hint}. Start the same command again to resume from the last checkpoint"


def require_success(folder: RunFolder, ended: str, log_size: int | None = None) -> None:
    """Judge a run that has ended, by its folder.

    Args:
        folder: where the run is recorded.
        ended: what ended and how, in case the run folder holds neither a result nor an error.
        log_size: of the trainer's log before the start, on the machine that ran it.

    Raises:
        DistillError: with the first failure's cause.
    """
    if folder.finished.exists():
        return
    killed = _killed_rank(folder, log_size) if log_size is not None else ""
    if killed:
        raise DistillError(killed)
    failure = folder.first_failure()
    if failure is not None:
        raise DistillError(f"{failure['role']} failed: {failure['message']}")
    raise DistillError(
        f"{ended}: the run folder holds neither a result nor an error. See {folder.logs}; the same command again resumes from "
        "the last checkpoint."
    )


def import_nemo_run(home: Path) -> Any:
    """NeMo-Run, its own records in ``home``, which is made.

    Raises:
        DistillError: if it is not installed.
    """
    home.mkdir(parents=True, exist_ok=True)
    os.environ["NEMORUN_HOME"] = str(home)  # read at import
    try:
        import nemo_run
        from nemo_run.config import set_nemorun_home
    except ImportError as error:
        raise DistillError(
            f"nemo_run = {error}: the launcher needs NeMo-Run. Install it with: pip install 'megatron-distill[launch]'."
        ) from error
    set_nemorun_home(str(home))  # where a process launches more than one run
    return nemo_run


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """NeMo-Run's own output goes to a log, since the console shows the run, and what is typed stays with the shell."""
    stdin = sys.stdin
    with (
        log.open("a") as file,
        open(os.devnull) as nothing,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        sys.stdin = nothing  # the commands it runs would read ours
        try:
            yield
        finally:
            sys.stdin = stdin
