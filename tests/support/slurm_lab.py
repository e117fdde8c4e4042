"""A whole Slurm on this machine: munge, a controller and several node daemons, in one folder, on a network of its own.

    with SlurmLab(folder, num_nodes=4) as lab:
        subprocess.run(["sbatch", ...], env=os.environ | lab.env)

The nodes n1, n2, ... are daemons of one host that share its cores, memory and disk, but each has a network namespace with an
address of its own, and a host name that means, as on Debian, 127.0.1.1 at home and that address elsewhere. So what listens on
the loopback, or announces it, is as alone here as on a real cluster. Processes are tracked by cgroups where the machine lets
us: then Slurm's signals reach a task's first process only, which is what real clusters do.

What the lab leaves out: an accounting database (``sacct`` is the stand-in beside this file), containers (Debian's Slurm has no
pyxis), GPUs. Written for Debian 12's Slurm 22.05.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.waiting import wait_until

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "iproute2")
_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "ip")
_FREEZER = Path("/sys/fs/cgroup/freezer")  # of cgroup v1, all that Slurm needs to track processes


def install() -> str | None:
    """Make Slurm's programs available through apt-get, if they are not.

    Returns:
        None if they are there, else why they are not, and what to type.
    """
    if all(map(shutil.which, _DAEMONS)):
        return None
    packages = " ".join(PACKAGES)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return f"Slurm is not installed. On Debian, as root: apt-get install --no-install-recommends {packages}"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in ("apt-get -q update", f"apt-get -q install -y --no-install-recommends {packages}"):
        done = subprocess.run(command.split(), env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{command}: {(done.stderr or done.stdout).strip()[-500:]}"
    return None


class SlurmLab:
    """Start with ``with``; every daemon it started has ended when the block ends. Needs root, as Slurm's daemons do."""

    def __init__(self, folder: Path, num_nodes: int, gpus_per_node: int = 0) -> None:
        """Start nothing.

        Args:
            folder: empty; configuration, state and logs of all daemons. Its path must be short (munge's socket is in it).
            num_nodes: emulated nodes.
            gpus_per_node: pretended GPUs of each: null devices, for layouts that ask for some.
        """
        self.folder, self.num_nodes, self.gpus_per_node = folder, num_nodes, gpus_per_node
        self.tracks_by_cgroup = _FREEZER.is_dir() and os.access(_FREEZER, os.W_OK)
        self._network = _Network(num_nodes)
        self._config = folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def address(self, number: int) -> str:
        """Of node ``number``, on the lab's network."""
        return self._network.address(number)

    @property
    def env(self) -> dict[str, str]:
        """What makes Slurm's commands talk to this lab, and find its ``sacct``."""
        return {"SLURM_CONF": str(self._config), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def slurm(self, *command: str) -> str:
        """Run one of Slurm's commands; its standard output."""
        done = subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True, check=True)
        return done.stdout

    def __enter__(self) -> Self:
        for name in ("bin", "state", "spool", "log"):
            (self.folder / name).mkdir(parents=True)
        self._install_sacct()
        try:
            self._network.set_up()
            self._config.write_text(self._configuration())
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
            self._start_munge()
            self._start("slurmctld", "-D", "-f", str(self._config))
            _wait_until(lambda: "UP" in self.slurm("scontrol", "ping"), "the controller")
            for number in range(1, self.num_nodes + 1):
                hosts = self.folder / f"hosts-n{number}"
                hosts.write_text(self._network.hosts_file(at_home=number))
                self._start(
                    *self._network.inside(number, hosts), "slurmd", "-D", "-f", str(self._config), "-N", f"n{number}"
                )
            _wait_until(lambda: len(self._idle_nodes()) == self.num_nodes, "idle nodes")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.slurm("scancel", "--user=root")
                _wait_until(lambda: not self.slurm("squeue", "--noheader").strip(), "cancelled jobs")
        finally:
            self._stop()

    def _idle_nodes(self) -> set[str]:
        return set(self.slurm("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split())

    def _start(self, *command: str) -> None:
        log = (self.folder / "log" / f"{Path(command[0]).name}-{len(self._daemons)}.log").open("ab")
        with log:
            daemon = subprocess.Popen(
                command,
                env=os.environ | self.env,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=_end_with_parent,  # noqa: PLW1509  no threads are running where a lab is started
            )
        self._daemons.append(daemon)

    def _stop(self) -> None:
        """Last started, first ended: nodes, the controller, then munge, which both authenticate with."""
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        self._network.tear_down()

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        options.append(f"--log-file={self.folder / 'log' / 'munged.log'}")
        # --force: below a world-writable directory, and as root
        self._start("munged", "--foreground", "--force", "--num-threads=2", *options)
        _wait_until((self.folder / "munge.sock").exists, "munge's socket")

    def _install_sacct(self) -> None:
        program = self.folder / "bin" / "sacct"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).with_name("sacct.py")} "$@"\n')
        program.chmod(0o755)

    def _configuration(self) -> str:
        host, folder = socket.gethostname().split(".")[0], self.folder
        nodes = "".join(
            f"NodeName=n{number} NodeAddr={self._network.address(number)} CPUs=4 RealMemory=4000"
            f"{f' Gres=gpu:{self.gpus_per_node}' if self.gpus_per_node else ''}\n"
            for number in range(1, self.num_nodes + 1)
        )
        tracking = "cgroup" if self.tracks_by_cgroup else "linuxproc"
        return f"""ClusterName=lab
SlurmctldHost={host}({self._network.address(0)})
SlurmUser=root
SlurmdUser=root
# A credential is accepted once within its life, and a requeued job waits until the old ones have died: 120 s by default.
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldPort={_free_port()}
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
# Nodes claim more cores and memory than their share of the host.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
MinJobAge=3600
KillWait=10
{self._gpu_configuration()}{nodes}PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP
"""

    def _gpu_configuration(self) -> str:
        if not self.gpus_per_node:
            return ""
        for number in range(self.gpus_per_node):
            os.mknod(self.folder / f"gpu{number}", 0o20666, os.makedev(1, 3))  # a second name of /dev/null
        files = f"{self.folder}/gpu[0-{self.gpus_per_node - 1}]"
        (self.folder / "gres.conf").write_text(f"Name=gpu File={files}\n")
        return "GresTypes=gpu\n"


def _end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the lab's own process dies, however that happens (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait_until(holds: Callable[[], bool], what: str) -> None:
    """Also where what Slurm's commands ask is not there yet."""

    def holds_now() -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):
            return holds()
        return False

    wait_until(holds_now, f"Slurm lab, see its log/ folder: {what}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class _Network:
    """A bridge in this machine's own network namespace, and one namespace a node, each with an address on the bridge."""

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes
        self._name = f"lab{os.getpid() % 100_000}"  # of an interface: at most 15 characters
        self._prefix = f"10.{77 + os.getpid() % 100}.{os.getpid() // 100 % 250}"

    def address(self, number: int) -> str:
        """Of node ``number``; of the controller for 0."""
        return f"{self._prefix}.{number or 254}"

    def set_up(self) -> None:
        """Make the bridge and the nodes' namespaces."""
        self._ip(f"link add {self._name} type bridge")
        self._ip(f"address add {self.address(0)}/24 dev {self._name}")
        self._ip(f"link set {self._name} up")
        for number in range(1, self._num_nodes + 1):
            space, outside = self._space(number), f"{self._name}v{number}"
            self._ip(f"netns add {space}")
            self._ip(f"link add {outside} type veth peer name eth0 netns {space}")
            self._ip(f"link set {outside} master {self._name} up")
            self._ip(f"-n {space} link set lo up")
            self._ip(f"-n {space} address add {self.address(number)}/24 dev eth0")
            self._ip(f"-n {space} link set eth0 up")

    def tear_down(self) -> None:
        """Remove them; what is not there is no problem."""
        for number in range(1, self._num_nodes + 1):
            self._ip(f"netns delete {self._space(number)}", check=False)
        self._ip(f"link delete {self._name}", check=False)

    def hosts_file(self, at_home: int) -> str:
        """Text of /etc/hosts on a node."""
        names = {f"n{number}": self.address(number) for number in range(1, self._num_nodes + 1)}
        names[f"n{at_home}"] = "127.0.1.1"
        return "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **names}.items())

    def inside(self, number: int, hosts: Path) -> list[str]:
        """A command's beginning that makes it run on a node: its network, its host name, its /etc/hosts."""
        script = 'echo "$1" > /proc/sys/kernel/hostname; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        inside = ["nsenter", f"--net=/run/netns/{self._space(number)}", "unshare", "--uts", "--mount"]
        return [*inside, "sh", "-ec", script, "sh", f"n{number}", str(hosts)]

    def _space(self, number: int) -> str:
        return f"{self._name}n{number}"

    @staticmethod
    def _ip(arguments: str, check: bool = True) -> None:
        done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"ip {arguments}: {done.stderr.strip()}")
