"""Slurm's own words on jobs: the only place that asks it.

In: ids of jobs, ``12`` or ``12_3`` for a task of an array. Out: the state that Slurm has them in. squeue knows jobs of the last
minutes, the accounting that sacct reads also older ones.
"""

import subprocess
from collections.abc import Collection

_ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "REVOKED",
    "FORGOTTEN",
)
_NO_SUCH_JOB = "Invalid job id"


def job_state(job_id: str) -> str:
    """Slurm's word for a job: PENDING, RUNNING, COMPLETED, ...

    FORGOTTEN is ours, for a job that neither squeue nor sacct knows, and UNKNOWN for a controller that does not answer now.
    """
    known = _ask("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}")
    if known and known.stdout:
        return known.stdout.split()[0]
    recorded = _ask("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job_id}")
    if recorded and recorded.stdout:
        return recorded.stdout.split()[0]
    return "FORGOTTEN" if known and _NO_SUCH_JOB in known.stderr else "UNKNOWN"


def job_states(job_ids: Collection[str]) -> dict[str, str]:
    """``job_state`` of many jobs, by one question; those that squeue has forgotten are asked for singly."""
    if not job_ids:
        return {}
    known = _ask("squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={','.join(job_ids)}")
    if known is None or (known.returncode and _NO_SUCH_JOB not in known.stderr):
        return dict.fromkeys(job_ids, "UNKNOWN")
    told = dict(line.split()[:2] for line in known.stdout.splitlines())
    return {job_id: told.get(job_id) or job_state(job_id) for job_id in job_ids}


def _ask(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Run one of Slurm's commands; None if it is not installed or takes too long."""
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None


def has_ended(state: str) -> bool:
    """Whether a job in ``state`` will never run again. Slurm's requeueing states, and UNKNOWN, are not an end."""
    return state.startswith(_ENDED)
