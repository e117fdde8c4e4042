"""How the trainer finds its servers: each server picks a free port where it runs and announces its address in the run folder.

    server 3 of the student ──> RUN/endpoints/student-3.json {"url": "http://node17:21873"} ──> every replica's leader

No launcher has to know hosts or guess ports beforehand, so one machine, a Slurm job and a requeued Slurm job on other nodes
work alike. An address says where a server will answer, not that it does: ``Leader.wait_ready`` waits for that.

On one machine everything listens on the loopback; in a job of several, on the interface that leads to the others. A server
asks for the run's key, which only the run's user can read: ``RUN/server_key``, new at each start of the run.
"""

import os
import secrets
import shutil
import time
from pathlib import Path

from megatron_distill.errors import ServerError
from megatron_distill.runs.run_folder import RunFolder, read_json, write_json
from megatron_distill.sglang.address import LOOPBACK, address_for_peers, address_of, interface_of

HOSTS_VARIABLE = "MEGATRON_DISTILL_HOSTS"
"""Names of a job's hosts, with commas between; unset where one machine runs everything."""

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
_POLL_S = 0.5


def settle_address() -> str:
    """The address at which this process listens, and which it announces; torch's back ends are told its interface.

    Gloo announces what the host's own name resolves to, which at home is often a loopback address. A variable that is already
    set, by a cluster's profile, decides.

    Raises:
        ServerError: the job has several hosts, and none can be reached.
    """
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    own = os.uname().nodename.partition(".")[0]
    listed = [host for host in os.environ.get(HOSTS_VARIABLE, "").split(",") if host]
    hosts = [host for host in listed if host.partition(".")[0] != own]
    try:
        address = address_of(chosen) if chosen else address_for_peers(hosts)
    except OSError as error:
        raise ServerError(
            f"{chosen or ', '.join(hosts)} = {error}: no address found on the way to the job's other nodes. Set "
            "socket_interface in the cluster's profile to the interface that connects them."
        ) from error
    if address == LOOPBACK and hosts and not chosen:
        raise ServerError(
            f"{', '.join(hosts)} = all lead to the loopback: the job's other nodes could not reach this one. Set "
            "socket_interface in the cluster's profile to the interface that connects them."
        )
    for variable in _INTERFACE_VARIABLES:
        os.environ.setdefault(variable, chosen or interface_of(address))
    return address


def key_file(folder: RunFolder) -> Path:
    """Where a run's key lies."""
    return folder.root / "server_key"


def key_of(folder: RunFolder) -> str:
    """The key that the run's servers ask for.

    Raises:
        ServerError: the run was not started by a launcher, which makes it.
    """
    try:
        return key_file(folder).read_text()
    except OSError as error:
        raise ServerError(f"{key_file(folder)} = {error.strerror}: start the run again, which makes a key.") from error


def announce(folder: RunFolder, role: str, index: int, url: str) -> None:
    """Say where replica ``index`` of ``role`` ("student", "teacher", "evaluation") listens."""
    directory = folder.root / "endpoints"
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / f"{role}-{index}.json", {"url": url})


def announced(folder: RunFolder, role: str, num_replicas: int, timeout_s: float) -> tuple[str, ...]:
    """Wait for all replicas of ``role`` to announce themselves.

    Returns:
        Their URLs, in index order.

    Raises:
        ServerError: a role of the run failed meanwhile, or some replica said nothing within ``timeout_s`` seconds.
    """
    paths = [folder.root / "endpoints" / f"{role}-{index}.json" for index in range(num_replicas)]
    deadline = time.monotonic() + timeout_s
    while missing := [path.stem for path in paths if not path.exists()]:
        failure = folder.first_failure()
        if failure is not None:
            raise ServerError(failure["message"])
        if time.monotonic() > deadline:
            raise ServerError(
                f"servers.startup_timeout_s = {timeout_s:.0f}: {', '.join(missing)} did not start in time. See its log "
                f"in {folder.logs}, or raise the limit."
            )
        time.sleep(_POLL_S)
    return tuple(read_json(path)["url"] for path in paths)


def forget(folder: RunFolder) -> None:
    """Remove the addresses of an earlier start of the run, and make a new key."""
    shutil.rmtree(folder.root / "endpoints", ignore_errors=True)
    key_file(folder).unlink(missing_ok=True)
    with os.fdopen(os.open(key_file(folder), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
