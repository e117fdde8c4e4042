"""Many runs at once on a cluster: as few Slurm job arrays as their layouts and their order allow.

In: runs, each with its config, folder and perhaps another whose student it goes on with. Out: submitted arrays, one task a run.

    runs ──┬── array 12    those that may begin now, all of the same nodes             --array=0,1,4,5%8
           ├── array 13    those that take other nodes                                 --array=2,3%8
           └── array 14    those that go on with a student of 12: task 5 begins        --array=1,5%8
                           when 12's task 5 has finished                               --dependency=aftercorr:12

A task of an array can wait for the task of its own number in another array, and for no other. So what goes on with another
run's student has that one's number, in an array of its own for each array that it waits for. A task is an ordinary job: it is
warned, requeued and resumed as ``cluster`` tells, on nodes of its own.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_distill.config import RunConfig
from megatron_distill.launch import cluster
from megatron_distill.launch.job_scripts import run_of_task
from megatron_distill.launch.launch import command_facts, opened
from megatron_distill.launch.nodes import ClusterProfile, Group, groups_of
from megatron_distill.runs.run_folder import RunFolder, write_json


@dataclass(frozen=True)
class ArrayRun:
    """One run of many.

    Attributes:
        number: of its task, unless it waits for a task of another.
        config: of the run.
        folder: of the run.
        after: the run whose student it goes on with, as long as that has not finished; None if it may begin now.
    """

    number: int
    config: RunConfig
    folder: RunFolder
    after: RunFolder | None = None


@dataclass(frozen=True)
class Array:
    """One job array.

    Attributes:
        groups: of nodes that each of its runs takes.
        after: the place among the arrays of the one whose tasks it waits for, task by task; or the id of such an array, or of a
            whole job, that Slurm has already; None if it waits for nothing.
        runs: by the number of the task.
    """

    groups: tuple[Group, ...]
    after: int | str | None
    runs: dict[int, ArrayRun] = field(default_factory=dict)


def arrays_of(
    runs: Sequence[ArrayRun], profile: ClusterProfile, job_of: Callable[[RunFolder], str | None]
) -> list[Array]:
    """Deal runs out to arrays.

    Args:
        runs: of different numbers; one that goes on with another's student stands behind it.
        profile: of the cluster.
        job_of: Slurm's name of the job in which a run waits or runs already, e.g. "12_3", or None.

    Raises:
        ConfigError: a run does not lie on the cluster's nodes.
    """
    arrays: list[Array] = []
    places: dict[Path, tuple[int, int]] = {}  # of the runs so far: their array, and the number there
    for run in runs:
        groups = tuple(groups_of(run.config, profile))
        after: int | str | None = None
        number = run.number
        if run.after is not None and run.after.root in places:
            after, number = places[run.after.root]
        elif run.after is not None and (job_id := job_of(run.after)):
            after, _, task = job_id.partition("_")
            number = int(task) if task else number
            after = f"aftercorr:{after}" if task else f"afterok:{after}"
        place = next((i for i, one in enumerate(arrays) if _takes(one, groups, after, number)), len(arrays))
        if place == len(arrays):
            arrays.append(Array(groups, after))
        arrays[place].runs[number] = run
        places[run.folder.root] = (place, number)
    return arrays


def _takes(array: Array, groups: tuple[Group, ...], after: int | str | None, number: int) -> bool:
    return (array.groups, array.after) == (groups, after) and number not in array.runs


def job_of_array(
    array: Array, profile: ClusterProfile, home: Path, max_running: int, job_ids: Sequence[str]
) -> cluster.Job:
    """The job that is an array.

    Args:
        array: its runs.
        profile: of the cluster; its own directives stay.
        home: where the scripts and the batch scripts' output go.
        max_running: tasks that run at a time; 0 for no limit.
        job_ids: of the arrays before it.
    """
    tasks = ",".join(str(number) for number in sorted(array.runs))
    after = f"aftercorr:{job_ids[array.after]}" if isinstance(array.after, int) else array.after or ""
    return cluster.Job(
        array.groups,
        run_of_task({number: run.folder for number, run in array.runs.items()}),
        home,
        array=f"{tasks}%{max_running}" if max_running else tasks,
        after=after,
    )


def submit_arrays(
    arrays: Sequence[Array], profile: ClusterProfile, home: Path, max_running: int = 0
) -> Mapping[str, Array]:
    """Prepare the folders of all runs and submit their arrays; what is checked beforehand is the caller's.

    Returns:
        Each array by Slurm's id of it.

    Raises:
        DistillError: a folder may not be gone on in, and nothing was submitted; or Slurm refuses an array, and those before it
            were submitted.
    """
    job_ids: list[str] = []
    with contextlib.ExitStack() as held:
        for array in arrays:
            for run in array.runs.values():
                held.enter_context(opened(run.config, run.folder))
                write_json(run.folder.root / "env.json", command_facts(run.config) | {"cluster": profile.name})
        for array in arrays:
            job = job_of_array(array, profile, home, max_running, job_ids)
            folders = {f"_{number}": run.folder for number, run in array.runs.items()}
            job_ids.append(cluster.submit(job, profile, folders))
    return dict(zip(job_ids, arrays, strict=True))
