"""Bring live, sharded weights to the servers that sample from them: versioned, verified, whole or not at all.

In: the model's chunks on every trainer rank, and the student servers' client on global rank 0. Out: servers that serve
version N, or an error on every rank.

    disk        ranks ──shards──> rank 0 ──safetensors──> sync/vN/ ──load──> servers     any topology; needs a shared disk
    broadcast   ranks ──shards──> rank 0 ──flat buckets over gloo or NCCL──> servers     no disk; a group rank 0 + servers

Both are collective over the trainer's ranks. A broadcast runs while the servers are paused, since between two buckets they
would answer with half-new weights. A push that fails because a server died or a connection broke is repeated, all of it, once
every server answers again (one that died is started again, see ``sglang.supervisor``); a server that refuses ends it at once.
Whatever rank 0 meets, every rank raises.
"""

import contextlib
import itertools
import shutil
import socket
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.convert.live import save_hf, stream_hf_tensors
from megatron_distill.errors import DistillError, ServerError
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.sglang.address import LOOPBACK, own_address
from megatron_distill.sglang.client import SGLangClient
from megatron_distill.sglang.control import in_background

GROUP_NAME = "megatron_distill"
GROUP_TIMEOUT_S = 120.0
"""Longest wait for one message of a broadcast, or for a server to join or leave the group."""

MAX_ATTEMPTS = 3
DETERMINISTIC_CHANNELS = 8
"""NCCL channels that SGLang 0.5.23 pins in a deterministic tensor-parallel server (SGLANG_DETERMINISTIC_NCCL_NCHANNELS)."""

Bucket = list[tuple[str, Tensor]]


class WeightSync(Protocol):
    """A transport of weights to the student's servers."""

    def push(self, chunks: Sequence[Any], version: int) -> None:
        """Make every server serve ``chunks`` under ``version``. Collective over all ranks.

        Raises:
            DistillError: on every rank, if a server did not take them.
        """

    def push_again(self, version: int) -> bool:
        """Make every server serve the weights of the last push once more, if they were kept. Collective over all ranks.

        Returns:
            Whether they were kept; if not, nothing was sent.
        """

    def close(self) -> None:
        """Release what the transport holds."""


class DiskSync:
    """Through a directory that the servers can read: written under another name, renamed, checked, loaded, verified."""

    def __init__(
        self,
        hf_config: HfConfig,
        source: str | Path,
        directory: Path,
        client: SGLangClient | None,
        world: dist.ProcessGroup | None = None,
        *,
        in_flight: bool = False,
    ) -> None:
        """Write nothing yet.

        Args:
            hf_config: the student's architecture.
            source: Hugging Face directory that tokenizer and configs are copied from.
            directory: where versions are put; only the latest is kept.
            client: of the student's servers; on global rank 0 only.
            world: gloo group of all ranks, over which they agree on how a push ended; the default group if that is gloo.
            in_flight: what is being written goes on under the new weights; by default it ends first.
        """
        self._hf_config, self._source, self._directory, self._client = hf_config, source, directory, client
        self._world, self._in_flight = world, in_flight

    def push(self, chunks: Sequence[Any], version: int) -> None:
        """See ``WeightSync``."""
        path = self._path(version)
        save_hf(chunks, self._hf_config, self._source, path, overwrite=True, names_group=self._world)
        self.push_again(version)
        if self._client is not None:
            for old in self._directory.glob("v*"):
                if old != path:
                    shutil.rmtree(old, ignore_errors=True)

    def push_again(self, version: int) -> bool:
        """See ``WeightSync``: the last version's directory is kept."""

        def attempt() -> None:
            if self._client is not None:
                self._client.wait_reachable()
                self._client.update_weights_from_disk(self._path(version), str(version), in_flight=self._in_flight)

        _together(attempt, self._world)
        return True

    def _path(self, version: int) -> Path:
        return self._directory / f"v{version:06d}"

    def close(self) -> None:
        """Remove the last version."""
        if self._client is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


class BroadcastSync:
    """From rank 0 to the servers through a process group of their own, in flat buckets."""

    def __init__(
        self,
        hf_config: HfConfig,
        client: SGLangClient | None,
        *,
        num_replicas: int,
        ranks_per_replica: int,
        bucket_bytes: int,
        num_channels: int | None = None,
        world: dist.ProcessGroup | None = None,
    ) -> None:
        """Connect nothing yet: servers join at the first push.

        Args:
            hf_config: the student's architecture.
            client: of the student's servers; on global rank 0 only.
            num_replicas: student servers.
            ranks_per_replica: tensor-parallel size of each.
            bucket_bytes: of one message.
            num_channels: of NCCL, where the servers pin theirs: both sides of a group need the same number.
            world: gloo group of all ranks, over which they agree on how a push ended; the default group if that is gloo.
        """
        self._hf_config, self._client, self._world = hf_config, client, world
        self._num_ranks = 1 + num_replicas * ranks_per_replica
        self._ranks_per_replica, self._num_channels = ranks_per_replica, num_channels
        self._bucket_bytes = bucket_bytes
        self._group: WeightsGroup | None = None
        self._sent_version: str | None = None
        self._names = (f"{GROUP_NAME}-{number}" for number in itertools.count())

    def push(self, chunks: Sequence[Any], version: int) -> None:
        """See ``WeightSync``."""

        def attempt() -> None:
            buckets = stream_hf_tensors(chunks, self._hf_config, self._bucket_bytes, self._world)
            try:
                if self._client is not None:
                    self._send(self._client, buckets, str(version))
            finally:
                for _ in buckets:  # the other ranks' part; on rank 0 what a failure left, so that nobody waits for ever
                    pass

        _together(attempt, self._world)

    def push_again(self, version: int) -> bool:
        """See ``WeightSync``: nothing is kept."""
        return False

    def _send(self, client: SGLangClient, buckets: Iterable[Bucket], version: str) -> None:
        client.wait_reachable()
        if self._group is not None and client.served_versions() != {self._sent_version}:
            self._leave(self._group, failed=True)  # a server was started again: it is in no group
        try:
            self._group = self._group or self._join(client)
            send_buckets(client, self._group, buckets, version)
            self._sent_version = version
        except BaseException:
            if self._group is not None:
                self._leave(self._group, failed=True)
            raise

    def _join(self, client: SGLangClient) -> "WeightsGroup":
        on_gpu = torch.cuda.is_available()
        group = WeightsGroup(next(self._names), own_address(_host_of(client)), self._num_ranks)
        joined = client.init_weights_group(
            group.address,
            group.port,
            group_name=group.name,
            backend="nccl" if on_gpu else "gloo",
            ranks_per_replica=self._ranks_per_replica,
        )
        try:
            group.join(joined, on_gpu, self._num_channels)
        except BaseException:
            self._leave(group, failed=True)
            raise
        return group

    def _leave(self, group: "WeightsGroup", failed: bool) -> None:
        """Both sides at once: NCCL's farewell takes both, and servers that wait in a broken broadcast wake up by it."""
        assert self._client is not None
        self._group = None
        left = self._client.destroy_weights_group(group.name)
        group.leave(failed)
        with contextlib.suppress(ServerError, TimeoutError):
            left.result(timeout=GROUP_TIMEOUT_S)

    def close(self) -> None:
        """Let the servers leave the group, and leave it."""
        if self._group is not None:
            self._leave(self._group, failed=False)


class WeightsGroup:
    """Rank 0's side of the process group that ``SGLangClient.init_weights_group`` lets the servers join.

    Outside the trainer's world, since the servers are no ranks of it. Made as SGLang 0.5.23 makes its side
    (``init_custom_process_group``), so that both choose the same back end and meet under the same keys of the store.
    """

    def __init__(self, name: str, address: str, num_ranks: int) -> None:
        """Open the store at which the servers will meet; on this address only.

        Args:
            name: of the group, used once.
            address: of this host, as the servers reach it.
            num_ranks: this process and all ranks of all servers.
        """
        self.name, self.address, self._num_ranks = name, address, num_ranks
        listener = socket.create_server((address, 0))
        self.port = listener.getsockname()[1]
        timeout = timedelta(seconds=GROUP_TIMEOUT_S)
        self._store = dist.TCPStore(
            address, self.port, num_ranks, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._group: Any = None

    def join(self, servers: Future[list[None]], on_gpu: bool, num_channels: int | None = None) -> None:
        """Meet the servers; if one of them fails to come, the wait ends with its cause.

        Args:
            servers: done when they have joined.
            on_gpu: NCCL, or gloo.
            num_channels: of NCCL; see ``BroadcastSync``.
        """
        from torch.distributed.distributed_c10d import Backend, _new_process_group_helper, _world

        options = None
        if on_gpu and num_channels is not None:
            options = dist.ProcessGroupNCCL.Options()
            options.config.min_ctas = options.config.max_ctas = num_channels

        def meet() -> Any:
            return _new_process_group_helper(
                self._num_ranks,
                0,
                [],
                Backend("nccl" if on_gpu else "gloo"),
                dist.PrefixStore(self.name, self._store),
                group_name=self.name,
                backend_options=options,
                timeout=timedelta(seconds=GROUP_TIMEOUT_S),
            )[0]

        met = in_background(meet)
        servers.result(timeout=GROUP_TIMEOUT_S)  # fails as soon as one of them refuses
        self._group = met.result(timeout=GROUP_TIMEOUT_S)
        _world.pg_group_ranks[self._group] = {rank: rank for rank in range(self._num_ranks)}

    def broadcast(self, flat: Tensor, received: Future[None]) -> None:
        """Send one message. Ends when all servers have it, or when the first of them fails to take it."""
        work = self._group.broadcast([flat], dist.BroadcastOptions())
        received.result(timeout=GROUP_TIMEOUT_S)
        work.wait()

    def leave(self, failed: bool) -> None:
        """Leave the group; after a failure without waiting for anyone, so that those who wait for this side wake up."""
        if self._group is None:
            return
        if failed:
            self._group.abort()
        else:
            dist.destroy_process_group(self._group)
        self._group = None


def send_buckets(client: SGLangClient, group: WeightsGroup, buckets: Iterable[Bucket], version: str) -> int:
    """Broadcast buckets to the servers, which are paused meanwhile, and prove that they took them.

    Args:
        client: of the servers.
        group: rank 0's process group with them.
        buckets: of (Hugging Face name, whole tensor); a tensor is used before the next bucket is asked for.
        version: label of the new weights.

    Returns:
        Bytes sent.

    Raises:
        ServerError: a server did not take a bucket. All stay paused, with weights that must not be used: send all again.
    """
    client.pause()
    client.flush_cache()
    client.begin_weight_update()
    num_bytes = 0
    for bucket in buckets:
        # SGLang reads each tensor at an offset that its item size divides: wider types come first.
        tensors = sorted(bucket, key=lambda item: -item[1].element_size())
        flat = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for _, tensor in tensors])
        received = client.update_weights_from_distributed(
            [name for name, _ in tensors],
            [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            [tuple(tensor.shape) for _, tensor in tensors],
            group_name=group.name,
            version=version,
        )
        group.broadcast(flat, received)
        num_bytes += flat.numel()
    client.end_weight_update()
    client.require_weight_version(version)
    client.continue_generation()
    return num_bytes


def _together(attempt: Callable[[], None], world: dist.ProcessGroup | None) -> None:
    """Run ``attempt`` on every rank until it succeeds on rank 0, or fails for good; then every rank raises what rank 0 met.

    No rank goes on with servers of unknown weights. Repeated is what a server's restart may mend; a refusal is not. What
    another rank alone meets, such as a lack of memory, it raises at once: rank 0 is waiting for its tensors, and would go on
    waiting for hours unless that process ended.
    """
    for number in itertools.count(1):
        failure: list[Exception | None] = [None]
        try:
            attempt()
        except (DistillError, OSError, RuntimeError) as error:
            if not isinstance(error, DistillError | OSError) and dist.get_rank() != 0:
                raise
            failure[0] = error if isinstance(error, DistillError) else ServerError(f"weight sync: {error}")
        dist.broadcast_object_list(failure, src=0, group=world)
        if failure[0] is None:
            return
        may_pass = type(failure[0]) is ServerError
        if not may_pass or number == MAX_ATTEMPTS:
            raise failure[0]


def _host_of(client: SGLangClient) -> str:
    return urllib.parse.urlsplit(client.urls[0]).hostname or LOOPBACK
