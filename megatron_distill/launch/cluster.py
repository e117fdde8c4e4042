"""Run a recipe as one Slurm job: trainer nodes, student servers and teacher servers side by side.

In: a validated config, its run folder on a shared file system, and a ``ClusterProfile``. Out: a submitted job, followed to
its end if wished, and a verdict.

    one job ──┬── its first nodes, trainer: one torchrun a node, ranks in node order
              ├── the next, student: SGLang servers, several a node if they fit
              └── the next, teacher: SGLang servers, if the config needs them

A run that fits one node is a one-node job in which ``local`` runs everything. Many runs that lie alike are one job array
(``arrays``). Each role's script and log are files in the run folder. When the job's time is nearly over, Slurm tells every
task's shell by SIGUSR1: the trainer's leaves a file, at which the ranks save a checkpoint and end, and the batch script
requeues the job, which then resumes. A failed job is requeued as well, a few times. Nothing here needs Slurm until a job is
submitted, so ``--dry-run`` shows the job anywhere.

How to run: ``megatron-distill launch RECIPE --cluster PROFILE [--dry-run] [--detach]``.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron_distill import config as config_module
from megatron_distill.config import RunConfig
from megatron_distill.config.loading import load_made
from megatron_distill.errors import DistillError
from megatron_distill.launch.job_scripts import batch_setup, run_of_job, task_script
from megatron_distill.launch.launch import command_facts, import_nemo_run, opened, quiet, require_success
from megatron_distill.launch.nodes import ClusterProfile, Group, groups_of, require_mounted, require_plain_path
from megatron_distill.launch.signals import Interrupted
from megatron_distill.launch.slurm import has_ended, job_state
from megatron_distill.runs.console import Console
from megatron_distill.runs.run_folder import RunFolder, read_json, write_json
from megatron_distill.runs.trackers.process import track

_POLL_S = 2.0


# --- what is submitted ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One sbatch: a run, or an array of runs that lie alike on the nodes.

    Attributes:
        groups: of nodes, one a role.
        which_run: line of the batch script that says it, see ``job_scripts``.
        home: where NeMo-Run's own records and the batch script's output go.
        array: numbers of its tasks as sbatch takes them, e.g. "0,3,4%2"; empty for one run.
        after: what it waits for as sbatch takes it, e.g. "aftercorr:12"; empty for nothing.
    """

    groups: Sequence[Group]
    which_run: str
    home: Path
    array: str = ""
    after: str = ""


def job_of(config: RunConfig, profile: ClusterProfile, folder: RunFolder) -> Job:
    """The job that is one run."""
    return Job(groups_of(config, profile), run_of_job(folder), folder.root / "launch")


def _describe(run: Any, job: Job, profile: ClusterProfile) -> Any:
    """NeMo-Run's experiment of one job, to be entered; nothing is submitted yet."""
    groups = job.groups
    waits = {"dependency": job.after, "kill_on_invalid_dep": "yes"} if job.after else {}
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
        "array": job.array or None,
        "additional_parameters": dict(profile.sbatch) | waits or None,
        "packager": run.Packager(),  # the package is installed on the nodes; nothing is copied
        "setup_lines": batch_setup(profile, job.which_run),
        "wait_time_for_group_job": 0,
        "monitor_group_job_wait_time": 5,
        "poll_estimated_start_time": False,
    }
    num_nodes = sum(group.num_nodes for group in groups)
    firsts = itertools.accumulate((group.num_nodes for group in groups), initial=0)
    executors = [
        run.SlurmExecutor(
            nodes=num_nodes,  # of the job; what a group takes of them is in its srun line
            gpus_per_node=profile.gpus_per_node or None,
            srun_args=_srun_arguments(group, first, profile),
            tunnel=run.LocalTunnel(job_dir=""),
            **common,
        )
        for group, first in zip(groups, firsts, strict=False)
    ]
    scripts = [run.Script(inline=task_script(group, profile)) for group in groups]
    experiment = run.Experiment("run", executor=executors[0], log_level="WARNING", skip_status_at_exit=True)
    with experiment:
        if len(groups) == 1:
            experiment.add(scripts[0], executor=executors[0], name=groups[0].role)
        else:
            experiment.add(scripts, executor=executors, name="roles")
    return experiment


def _srun_arguments(group: Group, first: int, profile: ClusterProfile) -> list[str]:
    """What every srun line says besides NeMo-Run's own: sites differ in what a step takes from its job by itself.

    Args:
        group: whose tasks it starts.
        first: of the job's nodes that are the group's, counted from 0.
        profile: of the cluster.
    """
    return [
        f"--relative={first}",
        f"--nodes={group.num_nodes}",
        f"--ntasks={group.num_nodes * group.tasks_per_node}",
        f"--ntasks-per-node={group.tasks_per_node}",
        "--overlap",  # a step without it may wait for those of the other nodes
        "--mpi=none",
        "--cpu-bind=none",  # else a torchrun and its ranks share one core
        *(["--no-container-mount-home"] if profile.container_image else []),
    ]


def check_job(config: RunConfig, profile: ClusterProfile, folder: RunFolder) -> None:
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
    check_job(config, profile, folder)
    folder.create()
    return scripts_of(job_of(config, profile, folder), profile)


def scripts_of(job: Job, profile: ClusterProfile) -> dict[str, str]:
    """Every script of a job by file name, as NeMo-Run would submit it."""
    run = import_nemo_run(job.home)
    with quiet(job.home / "nemo_run.log"):
        experiment = _describe(run, job, profile)
        experiment.dryrun(log=False, delete_exp_dir=False)
    return {path.name: path.read_text() for path in sorted(Path(experiment._exp_dir).rglob("*.sh"))}


# --- the job ----------------------------------------------------------------------------------------------------------


def submit(job: Job, profile: ClusterProfile, folders: Mapping[str, RunFolder]) -> str:
    """Submit a job of runs whose folders are prepared.

    Args:
        job: what to submit.
        profile: where to.
        folders: its runs', each by what follows the job's id in Slurm's name for it: "_3" for a task of an array, or "".

    Returns:
        Slurm's id of the job.

    Raises:
        DistillError: if Slurm refuses it.
    """
    run = import_nemo_run(job.home)
    log = job.home / "nemo_run.log"
    try:
        with quiet(log), _describe(run, job, profile) as experiment:
            experiment.run(detach=True)
    except Exception as error:  # whatever NeMo-Run or sbatch said
        raise DistillError(
            f"sbatch = {error}: the job was not submitted. See {log}; try the script that --dry-run prints."
        ) from error
    first = experiment.jobs[0]
    handle = first.handles[0] if hasattr(first, "handles") else first.handle  # slurm_tunnel://nemo_run/JOB_ID
    job_id: str = handle.rsplit("/", 1)[1]
    for suffix, folder in folders.items():
        _job_file(folder).parent.mkdir(exist_ok=True)
        write_json(_job_file(folder), {"job_id": job_id + suffix, "cluster": profile.name})
    return job_id


def ensure_job(profile: ClusterProfile, config: RunConfig, folder: RunFolder) -> tuple[str, str]:
    """The run's job: the one that is waiting or running, else a new one, which resumes what the folder holds.

    Returns:
        Slurm's id of the job, and what to tell of a new one (empty if it was there).

    Raises:
        DistillError: the run is unsound, or Slurm refuses it; nothing was submitted.
    """
    from megatron_distill.launch import preflight  # which loads tokenizers; a dry run needs none

    check_job(config, profile, folder)
    preflight.check(config, folder)
    job_id = active_job(folder)
    if job_id is not None:
        return job_id, ""
    with opened(config, folder) as step:
        write_json(folder.root / "env.json", command_facts(config) | {"cluster": profile.name})
        job_id = submit(job_of(config, profile, folder), profile, {"": folder})
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
    job_id = last_job(folder)
    return None if job_id is None or has_ended(job_state(job_id)) else job_id


def last_job(folder: RunFolder) -> str | None:
    """The id of the job that was submitted last for this run, whatever became of it."""
    return str(read_json(_job_file(folder))["job_id"]) if _job_file(folder).exists() else None


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
