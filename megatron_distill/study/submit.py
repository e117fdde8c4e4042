"""A study on a cluster: all runs that are missing at once, as Slurm job arrays, and one look at them all.

In: a study's runs and a ``ClusterProfile``. Out: submitted arrays (see ``launch.arrays``); then, while they are followed, the
results, rewritten as runs finish. Asked again, only what neither has finished nor waits nor runs is submitted: so a run that
failed resumes from its last checkpoint, and what goes on with its student waits for it anew.

    megatron-distill study tiny.study --cluster PROFILE                    submit what is missing, and follow
    megatron-distill study tiny.study --cluster PROFILE --max-running 4    four runs of an array at a time
    megatron-distill study tiny.study --cluster PROFILE --detach           submit only; --dry-run submits nothing
"""

import contextlib
import time
from collections import Counter
from collections.abc import Mapping

from megatron_distill.errors import DistillError
from megatron_distill.launch import cluster
from megatron_distill.launch.arrays import Array, ArrayRun, arrays_of, job_of_array, submit_arrays
from megatron_distill.launch.launch import require_success
from megatron_distill.launch.nodes import ClusterProfile, require_plain_path
from megatron_distill.launch.signals import Interrupted
from megatron_distill.launch.slurm import has_ended, job_states
from megatron_distill.pages.report import write_report
from megatron_distill.runs.trackers.process import track
from megatron_distill.study.run import Key, StudyRuns, outcome

_POLL_S = 5.0  # one question to the controller, however many runs


def submit_missing(runs: StudyRuns, profile: ClusterProfile, max_running: int = 0) -> dict[Key, str]:
    """Submit what is missing and neither waits nor runs already.

    Args:
        runs: of the study, checked.
        profile: of the cluster.
        max_running: runs of an array at a time; 0 for no limit.

    Returns:
        Slurm's name of the job of each run that now waits or runs.

    Raises:
        DistillError: a run does not lie on the cluster's nodes, and nothing was submitted; or Slurm refuses an array.
    """
    jobs = _under_way(runs)
    arrays = _arrays(runs, jobs, profile)
    keys = {folder.root: key for key, folder in runs.folders.items()}
    for job_id, array in submit_arrays(arrays, profile, runs.results / "launch", max_running).items():
        print(f"Slurm job array {job_id}: {_told(array)}; stop it with: scancel {job_id}", flush=True)
        jobs |= {keys[run.folder.root]: f"{job_id}_{number}" for number, run in array.runs.items()}
    return {key: jobs[key] for key in runs.missing}


def dry_run(runs: StudyRuns, profile: ClusterProfile, max_running: int = 0) -> dict[str, str]:
    """Every script of every array that would be submitted, by a name; writes below the results' ``launch/`` only.

    Raises:
        DistillError: a run does not lie on the cluster's nodes.
    """
    arrays = _arrays(runs, _under_way(runs), profile)
    names = [f"ARRAY_{number}" for number in range(len(arrays))]  # ids that Slurm has not given yet
    scripts: dict[str, str] = {}
    for name, array in zip(names, arrays, strict=True):
        job = job_of_array(array, profile, runs.results / "launch", max_running, names)
        scripts |= {f"{name}, {_told(array)}: {file}": text for file, text in cluster.scripts_of(job, profile).items()}
    return scripts


def follow(runs: StudyRuns, jobs: Mapping[Key, str]) -> str:
    """Wait for the runs' jobs, and publish what has finished whenever one ends.

    Args:
        runs: of the study.
        jobs: Slurm's name of the job of each run that waits or runs.

    Returns:
        The verdicts and where the results are, for the console.

    Raises:
        DistillError: runs failed; all others were waited for.
        Interrupted: it was asked to stop; the jobs go on.
    """
    verdicts, waiting, failed = runs.publish(), dict(jobs), dict[Key, str]()
    shown: Counter[str] = Counter()
    with contextlib.ExitStack() as all_trackers:
        trackers: dict[Key, contextlib.ExitStack] = {}
        try:
            while waiting:
                states = job_states(set(waiting.values()))
                of_run = {key: states[job_id] for key, job_id in waiting.items()}
                for key, state in of_run.items():
                    if state == "RUNNING" and key not in trackers:
                        trackers[key] = all_trackers.enter_context(contextlib.ExitStack())
                        trackers[key].enter_context(track(runs.configs[key], runs.folders[key]))
                    if has_ended(state):
                        trackers.pop(key, contextlib.ExitStack()).close()
                        if cause := _end(runs, key, f"Slurm job {waiting.pop(key)} = {state}", failed):
                            failed[key] = cause
                if len(waiting) < len(of_run):
                    verdicts = runs.publish()
                if (counts := Counter(of_run[key].lower() for key in waiting)) != shown:
                    shown = counts
                    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())), flush=True)
                if waiting:
                    time.sleep(_POLL_S)
        except Interrupted as stop:
            arrays = " ".join(sorted({job_id.partition("_")[0] for job_id in waiting.values()}))
            stop.told = f"{len(waiting)} runs go on; the same command follows them again, scancel {arrays} stops them"
            raise
    if failed:
        causes = "\n".join(f"study run = {arm}, seed {seed}: {cause}" for (arm, seed), cause in failed.items())
        raise DistillError(
            f"{causes}\n{len(failed)} of {len(jobs)} runs did not finish. The same command submits them again, from their last "
            f"checkpoints; what has finished is in {runs.results}."
        )
    return runs.closing(verdicts)


def _under_way(runs: StudyRuns) -> dict[Key, str]:
    """The missing runs that wait or run, with Slurm's name of their jobs."""
    jobs = {key: job_id for key in runs.missing if (job_id := cluster.last_job(runs.folders[key]))}
    states = job_states(set(jobs.values()))
    return {key: job_id for key, job_id in jobs.items() if not has_ended(states[job_id])}


def _arrays(runs: StudyRuns, under_way: Mapping[Key, str], profile: ClusterProfile) -> list[Array]:
    """The arrays of what is to be submitted, each run checked against the cluster."""
    require_plain_path("study folder", str(runs.results))
    todo = []
    for number, (key, folder) in enumerate(runs.folders.items()):
        if key in under_way or key not in runs.missing:
            continue
        cluster.check_job(runs.configs[key], profile, folder)
        before = runs.before(key)
        after = runs.folders[before] if before in runs.missing else None
        todo.append(ArrayRun(number, runs.configs[key], folder, after))
    jobs = {runs.folders[key].root: job_id for key, job_id in under_way.items()}
    return arrays_of(todo, profile, lambda folder: jobs.get(folder.root))


def _told(array: Array) -> str:
    nodes = sum(group.num_nodes for group in array.groups)
    return f"{len(array.runs)} runs, each on {nodes} {'nodes' if nodes > 1 else 'node'}"


def _end(runs: StudyRuns, key: Key, ended: str, failed: Mapping[Key, str]) -> str:
    """Tell how a run's job ended; the cause if it did not finish, else empty."""
    folder, before = runs.folders[key], runs.before(key)
    try:
        require_success(folder, ended)
    except DistillError as error:
        cause = str(error)
        if before is not None and before in failed:
            cause = f"it was to go on with the student of {before[0]}, which failed"
        print(f"{key[0]}, seed {key[1]}: {cause}", flush=True)
        return cause
    if not folder.report.exists():
        write_report(folder)
    print(f"{key[0]}, seed {key[1]}: {outcome(folder)}", flush=True)
    return ""
