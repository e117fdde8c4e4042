"""Run a recipe as one Slurm job: trainer nodes, student servers and teacher servers side by side.

In: a validated config, its run folder on a shared file system, and a ``ClusterProfile``. Out: a submitted job, followed to
its end if wished, and a verdict.

    one heterogeneous job ──┬── group 0, trainer: one torchrun a node, ranks in node order
                            ├── group 1, student: SGLang servers, several a node if they fit
                            └── group 2, teacher: SGLang servers, if the config needs them

A run that fits one node is a one-node job in which ``local`` runs everything. Each role's script and log are files in the
run folder. When the job's time is nearly over, Slurm tells every task's shell by SIGUSR1: the trainer's leaves a file, at
which the ranks save a checkpoint and end, and the batch script requeues the job, which then resumes. A failed job is requeued
as well, a few times. Nothing here needs Slurm until a job is submitted, so ``--dry-run`` shows the job anywhere.

How to run: ``megatron-distill launch RECIPE --cluster PROFILE [--dry-run] [--detach]``.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig
from megatron_distill.config.loading import load_made
from megatron_distill.errors import DistillError
from megatron_distill.launch.endpoints import HOSTS_VARIABLE
from megatron_distill.launch.launch import (
    ROLE_ENV,
    command_facts,
    import_nemo_run,
    opened,
    quiet,
    require_success,
    role_arguments,
)
from megatron_distill.launch.nodes import ClusterProfile, Group, groups_of, require_mounted, require_plain_path
from megatron_distill.launch.signals import Interrupted
from megatron_distill.runs.console import Console
from megatron_distill.runs.run_folder import RunFolder, read_json, write_json
from megatron_distill.runs.trackers.process import track

_POLL_S = 2.0
_ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "FORGOTTEN",
)


# --- scripts ----------------------------------------------------------------------------------------------------------


def task_script(group: Group, profile: ClusterProfile, folder: RunFolder) -> str:
    """Bash that every task of a group runs, on its node or in its container."""
    run = shlex.quote(str(folder.root))
    interfaces = [f"{name}_SOCKET_IFNAME" for name in ("GLOO", "NCCL", "TP")] if profile.socket_interface else []
    variables = ROLE_ENV | dict.fromkeys(interfaces, profile.socket_interface) | dict(profile.env)
    python = shlex.quote(profile.interpreter)
    slots = group.slots_per_task
    gpus: list[str] = []
    if group.role == "run":
        command, log = f"{python} -m megatron_distill.launch.cluster {run}", "run.out"
    elif group.role == "trainer":
        torchrun = (
            f"-m torch.distributed.run --nnodes={group.num_nodes} --nproc-per-node={slots} "
            '--node-rank="$SLURM_NODEID" --master-addr="$TRAINER_HOST" --master-port="$TRAINER_PORT"'
        )
        command = f"{python} {torchrun} \\\n  {shlex.join(role_arguments('trainer', folder))}"
        log = 'trainer-"$SLURM_NODEID".out'
    else:
        role = shlex.join(role_arguments(f"{group.role}-server", folder))
        command, log = f'{python} {role} --index "$SLURM_PROCID"', f'{group.role}-"$SLURM_PROCID".out'
        if profile.gpus_per_node:
            command += " --device cuda"
            first = f"SLURM_LOCALID * {slots}"
            gpus = [f'export CUDA_VISIBLE_DEVICES="$(seq -s, $(({first})) $(({first} + {slots - 1})))"']
    lines = [
        f"cd {shlex.quote(os.getcwd())} || exit 1  # where the recipe's relative paths are meant from",
        *(
            ["unset PYTHONPATH  # the submitting host's would hide the image's packages"]
            if profile.container_image
            else []
        ),
        *(["export PYTHONNOUSERSITE=1"] if profile.container_image else []),
        *profile.setup,
        "set -u",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        *gpus,
        "# Where processes are tracked by cgroups, Slurm's signals reach this shell alone: it stays, and passes them on.",
        "# The warning before the time limit is for the trainer, which looks for the file after each step.",
        f"trap {shlex.quote(f'touch {run}/stop_requested') if group.role in ('trainer', 'run') else chr(39) * 2} USR1",
        f"{command} >> {run}/logs/{log} 2>&1 &",
        "role=$!",
        "trap 'kill -TERM \"$role\"' TERM",
        'while wait "$role"; kill -0 "$role" 2>/dev/null; do :; done  # a signal ends a wait too',
    ]
    if group.role not in ("trainer", "run"):
        lines.append("exit 1  # a server that ends before the trainer has failed, however politely")
    else:
        lines.append('wait "$role"; exit $?  # the shell remembers how it ended')
    return "\n".join(lines) + "\n"


def batch_setup(profile: ClusterProfile, folder: RunFolder) -> str:
    """Lines of the batch script, which runs on the trainer's first node: a clean start, an address, and going on.

    A requeued job runs the same script again, so what an earlier start left about its end is moved out of the way first.
    """
    return f"""
# A requeued job starts here again: forget how the start before it ended, but keep why.
run={shlex.quote(str(folder.root))}
past="$run"/launch/failures/"$SLURM_JOB_ID"-"${{SLURM_RESTART_COUNT:-0}}"
mkdir -p "$past" && mv "$run"/errors/*.json "$past"/ 2>/dev/null
rmdir "$past" 2>/dev/null
rm -rf "$run"/finished.json "$run"/stop_requested "$run"/endpoints "$run"/sync

# The trainer's ranks meet on this node, at a port that nobody answers on. Its processes, and those of all the job's nodes, find
# their own addresses on the way to one another.
export TRAINER_HOST="$(uname -n)" TRAINER_PORT
for TRAINER_PORT in $(shuf --input-range=20000-32767 --head-count=20); do
    (exec 3<>"/dev/tcp/127.0.0.1/$TRAINER_PORT") 2>/dev/null || break
done
hosts() {{ for list in ${{!SLURM_JOB_NODELIST*}}; do scontrol show hostnames "${{!list}}"; done | sort -u | paste -s -d ,; }}
export {HOSTS_VARIABLE}="$(hosts)"

# Whether to go on: after the time limit if there is a new checkpoint; after a failure if it is not the last that is allowed.
saved_step() {{ cat "$run"/checkpoints/latest_checkpointed_iteration.txt 2>/dev/null || echo 0; }}
step_at_start=$(saved_step)
failed_starts() {{ cat "$run"/launch/failed_starts 2>/dev/null || echo 0; }}
go_on() {{
    [ ! -e "$run"/finished.json ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {profile.max_requeues} ] || return
    if [ "$(saved_step)" -gt "$step_at_start" ]; then
        echo 0 > "$run"/launch/failed_starts
    elif [ -z "$(ls "$run"/errors)" ]; then
        return  # no step was saved, and nothing is known to be wrong: stopped by its user, or too short a time limit
    fi
    if [ -n "$(ls "$run"/errors)" ]; then
        echo $(($(failed_starts) + 1)) > "$run"/launch/failed_starts
        [ "$(failed_starts)" -lt {profile.max_failed_starts} ] || return
    fi
    scontrol requeue "$SLURM_JOB_ID"
}}
trap go_on EXIT
"""


def _describe(run: Any, config: RunConfig, profile: ClusterProfile, folder: RunFolder) -> Any:
    """NeMo-Run's experiment of one job, to be entered; nothing is submitted yet."""
    groups = groups_of(config, profile)
    common: dict[str, Any] = {
        "account": profile.account,
        "partition": profile.partition,
        "time": profile.time_limit,
        "signal": f"USR1@{profile.warning_s}",
        "exclusive": True,
        "mem": "0",  # all of the node's
        "job_name_prefix": "megatron-distill.",  # NeMo-Run reads a role as what follows the last dot
        "container_image": profile.container_image or None,
        "container_mounts": list(profile.container_mounts),
        "additional_parameters": dict(profile.sbatch) or None,
        "packager": run.Packager(),  # the package is installed on the nodes; nothing is copied
        "heterogeneous": len(groups) > 1,
        "setup_lines": batch_setup(profile, folder),
        "wait_time_for_group_job": 0,
        "monitor_group_job_wait_time": 5,
        "poll_estimated_start_time": False,
    }
    executors = [
        run.SlurmExecutor(
            nodes=group.num_nodes,
            ntasks_per_node=group.tasks_per_node,
            gpus_per_node=profile.gpus_per_node or None,
            srun_args=_srun_arguments(group, profile),
            tunnel=run.LocalTunnel(job_dir=""),
            **common,
        )
        for group in groups
    ]
    scripts = [run.Script(inline=task_script(group, profile, folder)) for group in groups]
    experiment = run.Experiment("run", executor=executors[0], log_level="WARNING", skip_status_at_exit=True)
    with experiment:
        if len(groups) == 1:
            experiment.add(scripts[0], executor=executors[0], name=groups[0].role)
        else:
            experiment.add(scripts, executor=executors, name="roles")
    return experiment


def _srun_arguments(group: Group, profile: ClusterProfile) -> list[str]:
    """What every srun line says besides NeMo-Run's own: sites differ in what a step takes from its job by itself."""
    return [
        f"--nodes={group.num_nodes}",
        f"--ntasks={group.num_nodes * group.tasks_per_node}",
        f"--ntasks-per-node={group.tasks_per_node}",
        "--mpi=none",
        "--cpu-bind=none",  # else a torchrun and its ranks share one core
        *(["--no-container-mount-home"] if profile.container_image else []),
    ]


def _check(config: RunConfig, profile: ClusterProfile, folder: RunFolder) -> None:
    """Refuse what would not lie on the cluster's nodes, or not survive its scripts."""
    groups_of(config, profile)
    require_plain_path("run folder", str(folder.root))
    require_plain_path("working directory", os.getcwd())
    require_mounted(config, profile, {"run folder": folder.root, "working directory": Path.cwd()})


def dry_run(config: RunConfig, profile: ClusterProfile, folder: RunFolder) -> dict[str, str]:
    """Every script of the job by file name, as NeMo-Run would submit it. Needs neither Slurm nor a GPU.

    Writes below the run folder's ``launch/`` and ``logs/`` only.

    Raises:
        ConfigError: the job is unsound.
    """
    _check(config, profile, folder)
    folder.create()
    run = import_nemo_run(folder)
    with quiet(folder.logs / "launcher.log"):
        experiment = _describe(run, config, profile, folder)
        experiment.dryrun(log=False, delete_exp_dir=False)
    return {path.name: path.read_text() for path in sorted(Path(experiment._exp_dir).rglob("*.sh"))}


# --- the job ----------------------------------------------------------------------------------------------------------


def submit(config: RunConfig, profile: ClusterProfile, folder: RunFolder) -> str:
    """Submit a run whose folder is prepared.

    Returns:
        Slurm's id of the job.

    Raises:
        DistillError: if Slurm refuses it.
    """
    run = import_nemo_run(folder)
    try:
        with quiet(folder.logs / "launcher.log"), _describe(run, config, profile, folder) as experiment:
            experiment.run(detach=True)
    except Exception as error:  # whatever NeMo-Run or sbatch said
        raise DistillError(
            f"sbatch = {error}: the job was not submitted. See {folder.logs / 'launcher.log'}; try the script that "
            "--dry-run prints."
        ) from error
    job = experiment.jobs[0]
    handle = job.handles[0] if hasattr(job, "handles") else job.handle  # slurm_tunnel://nemo_run/JOB_ID
    job_id = handle.rsplit("/", 1)[1]
    write_json(_job_file(folder), {"job_id": job_id, "cluster": profile.name})
    return job_id


def ensure_job(profile: ClusterProfile, config: RunConfig, folder: RunFolder) -> tuple[str, str]:
    """The run's job: the one that is waiting or running, else a new one, which resumes what the folder holds.

    Returns:
        Slurm's id of the job, and what to tell of a new one (empty if it was there).

    Raises:
        DistillError: the run is unsound, or Slurm refuses it; nothing was submitted.
    """
    from megatron_distill.launch import preflight  # which loads tokenizers; a dry run needs none

    _check(config, profile, folder)
    preflight.check(config, folder)
    job_id = active_job(folder)
    if job_id is not None:
        return job_id, ""
    with opened(config, folder) as step:
        write_json(folder.root / "env.json", command_facts(config) | {"cluster": profile.name})
        job_id = submit(config, profile, folder)
    return job_id, f"Slurm job {job_id}, from step {step}; run folder {folder.root}; stop it with: scancel {job_id}"


def train(
    profile: ClusterProfile, config: RunConfig, folder: RunFolder, out: TextIO | None = None, verbose: bool = False
) -> None:
    """A whole run, or the rest of one, as a Slurm job: what ``local.train`` is on one machine.

    Raises:
        DistillError: before anything is submitted, or with the first failure's cause.
        Interrupted: it was asked to stop; the job goes on.
    """
    from megatron_distill.pages.report import write_report

    job_id, submitted = ensure_job(profile, config, folder)
    with Console(folder, config.num_steps, out, verbose=verbose) as console, track(config, folder):
        if submitted:
            console.say(submitted)
        try:
            follow(job_id, folder, console)
        except Interrupted as stop:
            stop.told = f"Slurm job {job_id} goes on; the same command follows it again, scancel {job_id} stops it"
            raise
    if not folder.report.exists():
        write_report(folder)


def active_job(folder: RunFolder) -> str | None:
    """The id of this run's job, if one is waiting or running: a run folder takes one job at a time."""
    if not _job_file(folder).exists():
        return None
    job_id = read_json(_job_file(folder))["job_id"]
    return None if has_ended(job_state(job_id)) else job_id


def follow(job_id: str, folder: RunFolder, console: Console) -> None:
    """Watch a job until it has ended for good.

    Raises:
        DistillError: it ended without a result.
    """
    shown = ""
    while not has_ended(state := job_state(job_id)):
        if state != shown:
            console.say(f"Slurm job {job_id}: {state.lower()}")
            shown = state
        time.sleep(_POLL_S)
    require_success(folder, f"Slurm job {job_id} = {state}")


def job_state(job_id: str) -> str:
    """Slurm's word for a job, of its first component if it is heterogeneous: PENDING, RUNNING, COMPLETED, ...

    ``squeue`` knows jobs of the last minutes, the accounting that ``sacct`` reads also older ones. FORGOTTEN is ours, for a job
    that neither knows, and UNKNOWN for a controller that does not answer now.
    """
    known = _ask("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}")
    if known and known.stdout:
        return known.stdout.split()[0]
    recorded = _ask("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job_id}")
    if recorded and recorded.stdout:
        return recorded.stdout.split()[0]
    return "FORGOTTEN" if known and "Invalid job id" in known.stderr else "UNKNOWN"


def _ask(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Run one of Slurm's commands; None if it is not installed or takes too long."""
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None


def has_ended(state: str) -> bool:
    """Whether a job in ``state`` will never run again. Slurm's requeueing states, and UNKNOWN, are not an end."""
    return state.startswith(_ENDED)


def _job_file(folder: RunFolder) -> Path:
    return folder.root / "launch" / "job.json"


def load_profile(name: str) -> ClusterProfile:
    """The profile that ``name`` stands for: a function of ``recipes/clusters.py``, or ``path/to/file.py:function``.

    Raises:
        ConfigError: if there is none.
    """
    is_short = name.isidentifier()
    return load_made(f"clusters.{name}" if is_short else name, ClusterProfile, "--cluster")


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m megatron_distill.launch.cluster RUN_DIR``: all of a run inside a one-node job."""
    from megatron_distill.launch.local import run_local

    parser = argparse.ArgumentParser(prog="megatron_distill.launch.cluster")
    parser.add_argument("run_dir", type=Path)
    folder = RunFolder(parser.parse_args(argv).run_dir)
    config = config_module.load(folder.config)
    try:
        with Console(folder, config.num_steps) as console:
            run_local(config, folder, console)
    except DistillError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
