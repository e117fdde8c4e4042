"""How many OpenMP threads each process of a run on one machine gets: ``cpu_threads``, or its share of the cores.

    staleness 0      trainer │ servers │ trainer │ servers      they take turns: ranks share all cores, then servers do
    staleness >= 1   trainer and servers at once                all processes share them

Threads of a process wait for each other passively (``ROLE_ENV``): ones that spin take the cores of whoever works meanwhile.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_distill.config import RunConfig
from megatron_distill.launch.launch import server_groups

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Threads:
    """OpenMP threads of one trainer rank, and of one CPU server."""

    rank: int
    server: int


def num_cores(quota: Path = _QUOTA) -> int:
    """Cores that this process may use: those it is bound to, or a container's share of them."""
    bound = len(os.sched_getaffinity(0))
    try:
        allowed, period = quota.read_text().split()
    except (OSError, ValueError):
        return bound
    return bound if allowed == "max" else max(1, min(bound, int(allowed) // int(period)))


def threads_of(config: RunConfig, cores: int) -> Threads:
    """What each process of a run gets.

    Args:
        config: of the run.
        cores: that all of its processes share.
    """
    if config.cpu_threads:
        return Threads(config.cpu_threads, config.cpu_threads)
    ranks = config.num_ranks
    servers = sum(replicas * tp for replicas, tp in server_groups(config).values())
    if config.rollouts.max_staleness_steps:
        share = max(1, cores // (ranks + servers))
        return Threads(share, share)
    return Threads(max(1, cores // ranks), max(1, cores // servers))
