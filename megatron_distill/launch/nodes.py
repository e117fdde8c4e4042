"""What a cluster offers, and how a run lies on its nodes.

In: a ``ClusterProfile``, which a user writes once for a cluster, and a run's config. Out: one ``Group`` a role: how many nodes,
how many tasks on each. Pure arithmetic: no Slurm, no NeMo-Run.

What a profile says ends up in scripts and in directives that NeMo-Run writes without quotes, so it is held to plain alphabets.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_distill.config import RunConfig
from megatron_distill.errors import ConfigError
from megatron_distill.launch.launch import MODEL_OF, num_gpus, server_groups

_WORD = re.compile(r"[A-Za-z0-9._,-]+")
_IMAGE = re.compile(r"[A-Za-z0-9._,:/@#+=*-]*")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9._/+=,@:-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_SECRET = re.compile(
    r"(?:token|secrets?|passwo?r?d|passphrase|credentials?|api_?key)(?:_|$)|(?:^|_)(?:keys?|pass|pwd|pat)(?:_|$)",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=")  # a variable or an option, in a line of bash or a directive


@dataclass(frozen=True)
class ClusterProfile:
    """One cluster, as a recipe sees it. Profiles live in ``recipes/clusters.py``.

    Attributes:
        name: what ``--cluster`` takes.
        account: Slurm account that is charged.
        partition: Slurm partition.
        time_limit: of one job, as sbatch takes it ("4:00:00"); a longer run goes on in the requeued job.
        gpus_per_node: GPUs of a node; 0 on a cluster of CPU nodes.
        tasks_per_cpu_node: trainer ranks, or servers, that a node without GPUs carries.
        python: the interpreter on the nodes, or in the image; by default this one, or the image's python3.
        container_image: for pyxis, as ``srun --container-image`` takes it; empty runs on the plain host.
        container_mounts: "host:container" pairs. The run folder and the models must be visible under the same paths.
        socket_interface: network interface that connects the nodes, e.g. "ib0"; by default the one that leads to the
            job's other hosts.
        env: variables of every role. Never secrets, here or below: those are inherited from the shell that submits.
        setup: bash lines that every task runs before its role, e.g. "module load cuda".
        sbatch: further #SBATCH directives, e.g. {"qos": "high", "constraint": "h100"}.
        warning_s: how long before the end of the time limit the trainer is told to save and stop. It must cover one step,
            an evaluation if one is due, and the checkpoint.
        max_requeues: how often a job may go on after its time limit.
        max_failed_starts: how many starts in a row may fail without a new checkpoint; 1 leaves a failed job down.
    """

    name: str
    account: str
    partition: str
    time_limit: str
    gpus_per_node: int
    tasks_per_cpu_node: int = 1
    python: str = ""
    container_image: str = ""
    container_mounts: tuple[str, ...] = ()
    socket_interface: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    sbatch: Mapping[str, Any] = field(default_factory=dict)
    warning_s: int = 600
    max_requeues: int = 50
    max_failed_starts: int = 3

    def __post_init__(self) -> None:
        if problems := list(_problems_of(self)):
            raise ConfigError("\n".join(f"ClusterProfile({self.name!r}).{problem}" for problem in problems))
        named = {
            "env": list(self.env),
            "setup": _ASSIGNED.findall("\n".join(self.setup)),
            "sbatch": _ASSIGNED.findall("\n".join(map(str, self.sbatch.values()))),
        }
        for where, names in named.items():
            if secrets := sorted({name for name in names if _SECRET.search(name)}):
                raise ConfigError(
                    f"ClusterProfile({self.name}).{where} = {', '.join(secrets)}: looks like a secret. Job scripts are "
                    "readable files. Export it in the shell that submits; sbatch hands the shell's environment to the job."
                )

    @property
    def interpreter(self) -> str:
        """``python``, settled: a path of the submitting host means nothing inside an image."""
        return self.python or ("python3" if self.container_image else sys.executable)

    @property
    def slots_per_node(self) -> int:
        """Trainer ranks that one node carries; a server takes ``tp`` slots."""
        return self.gpus_per_node or self.tasks_per_cpu_node


def _problems_of(profile: ClusterProfile) -> Iterator[str]:
    """Values that would not survive a script, or would be run by it."""
    words = {"name": profile.name, "account": profile.account, "partition": profile.partition}
    for where, value in words.items():
        if not _WORD.fullmatch(value):
            yield f"{where} = {value!r}: must consist of letters, digits and . _ - , only."
    if not _TIME.fullmatch(profile.time_limit):
        yield f"time_limit = {profile.time_limit!r}: must be minutes, or [days-]hours:minutes:seconds, e.g. 4:00:00."
    elif seconds_of(profile.time_limit) <= profile.warning_s:
        yield f"warning_s = {profile.warning_s}: must be less than time_limit = {profile.time_limit}, or no step is trained."
    for where, value in {
        "socket_interface": profile.socket_interface,
        "container_image": profile.container_image,
    }.items():
        if not _IMAGE.fullmatch(value):
            yield f"{where} = {value!r}: holds characters that a script would act on. Rename it."
    for mount in profile.container_mounts:
        if not _PLAIN_PATH.fullmatch(mount):
            yield f"container_mounts = {mount!r}: holds characters that a script would act on. Rename the directory."
    if isinstance(profile.setup, str) or any("\n" in line for line in profile.setup):
        yield f"setup = {profile.setup!r}: must be a tuple of bash lines, e.g. ('module load cuda',)."
    for name, value in profile.env.items():
        if not _VARIABLE.fullmatch(name) or "\n" in value:
            yield f"env = {name!r}: a variable's name consists of letters, digits and _, and its value is one line."
    for name, value in profile.sbatch.items():
        if not _WORD.fullmatch(name) or not _IMAGE.fullmatch(str(value)):
            yield f"sbatch = {name!r}: {value!r}: holds characters that a directive cannot."


def seconds_of(time_limit: str) -> int:
    """Seconds of a time limit as sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes...]."""
    days, dash, clock = time_limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    weights = {False: {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}, True: {1: (3600,), 2: (3600, 60), 3: (3600, 60, 1)}}
    seconds = sum(part * weight for part, weight in zip(parts, weights[bool(dash)][len(parts)], strict=True))
    return seconds + 86_400 * int(days or 0)


def require_plain_path(where: str, path: str) -> None:
    """Refuse a path that NeMo-Run or Slurm would break, or run: they do not quote it.

    Raises:
        ConfigError: naming the first character that is not plain.
    """
    if not _PLAIN_PATH.fullmatch(path):
        bad = next(character for character in path if not _PLAIN_PATH.fullmatch(character))
        raise ConfigError(
            f"{where} = {path!r}: must not hold {bad!r}. Slurm's scripts name it without quotes. Use letters, digits and "
            "/ . _ - + = , @ only."
        )


def require_mounted(config: RunConfig, profile: ClusterProfile, paths: Mapping[str, Path]) -> None:
    """Refuse a run whose files its containers would not see under the same paths.

    Args:
        config: of the run; its models and data are looked at.
        profile: with the mounts.
        paths: further ones, by what they are called.

    Raises:
        ConfigError: naming all that lie below no mount.
    """
    if not profile.container_image:
        return
    data, teacher = config.data, config.teacher
    wanted = {
        "student.path": config.student.path,
        "data.train_path": data.train_path,
        "data.heldout_path": data.heldout_path,
        **{f"data.sources[{number}].path": source.path for number, source in enumerate(data.sources)},
    }
    if config.needs_teacher:
        wanted |= {"teacher.path": teacher.path, "teacher.cache_dir": teacher.cache_dir}
    absolute = dict(paths) | {where: Path(value).absolute() for where, value in wanted.items() if value}
    mounts = [mount.split(":") for mount in profile.container_mounts]
    same = [Path(parts[0]) for parts in mounts if len(parts) == 1 or parts[0] == parts[1]]
    missing = [f"{where} = {path}" for where, path in absolute.items() if not any(path.is_relative_to(m) for m in same)]
    if missing:
        raise ConfigError(
            f"container_mounts = {', '.join(profile.container_mounts) or 'none'}: {'; '.join(missing)} would not be there, "
            f"under the same path, in the containers of {profile.name}. Mount a directory above, or move them."
        )


@dataclass(frozen=True)
class Group:
    """One role's share of a job.

    Attributes:
        role: "trainer", "student", "teacher", "evaluation", or "run" for a whole run on one node.
        num_nodes: nodes it takes.
        tasks_per_node: Slurm tasks on each; the trainer has one, its torchrun.
        slots_per_task: ranks of a torchrun, or GPUs of a server.
    """

    role: str
    num_nodes: int
    tasks_per_node: int
    slots_per_task: int


def groups_of(config: RunConfig, profile: ClusterProfile) -> list[Group]:
    """Lay a run out on a cluster's nodes: the trainer first, so that Slurm's batch script runs on its first node.

    Raises:
        ConfigError: listing everything that does not divide into nodes.
    """
    slots = profile.slots_per_node
    if profile.gpus_per_node and num_gpus(config) <= profile.gpus_per_node:
        return [Group("run", 1, 1, num_gpus(config))]
    problems: list[str] = []
    if config.servers.shared_gpu_frac:
        problems.append(
            f"servers.shared_gpu_frac = {config.servers.shared_gpu_frac}: is for a run on one node, and this one takes more of "
            f"{profile.name}. Set it to 0."
        )
    ranks_per_node = min(config.num_ranks, slots)
    if config.num_ranks % ranks_per_node:
        problems.append(
            f"student.parallel: tp * pp * cp * dp = {config.num_ranks}: must be a multiple of the {slots} ranks that a node of "
            f"{profile.name} carries. Change student.parallel.dp."
        )
    groups = [Group("trainer", config.num_ranks // ranks_per_node, 1, ranks_per_node)]
    for role, (replicas, tp) in server_groups(config).items():
        size = tp if profile.gpus_per_node else 1  # ranks of a CPU server share its cores
        if size > slots:
            problems.append(
                f"servers.{MODEL_OF[role]}_tp = {tp}: a node of {profile.name} has {slots} GPUs. Lower it to {slots}."
            )
            continue
        num_nodes = -(-replicas * size // (slots // size * size))
        if replicas % num_nodes:
            problems.append(
                f"servers.{role}_replicas = {replicas}: does not spread evenly over the {num_nodes} nodes it takes, at "
                f"{slots // size} a node. Set it to {replicas + num_nodes - replicas % num_nodes}."
            )
            continue
        groups.append(Group(role, num_nodes, replicas // num_nodes, size))
    if problems:
        raise ConfigError("\n".join(problems))
    return groups
