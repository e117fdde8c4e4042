"""The trainer's weights, on their way to the student's servers: versioned, verified, whole or not at all.

In: the model's chunks on every trainer rank, and the student servers' client on global rank 0. Out: servers that serve
version N. A transport does it in two parts, so that the ranks need not wait for the second (see ``weight_push``):

                    gather: collective, ranks stand still           send: rank 0 alone, servers stand still
    disk            ranks ──shards──> rank 0 ──> safetensors        sync/vN/ ──load──> servers     needs a shared disk
    broadcast       ranks ──shards──> rank 0 ──> host memory        flat buckets over gloo or NCCL ──> servers

What was gathered last is kept and can be sent again: a server that was started again gets the very weights that it lost. A
broadcast runs while the servers are paused, since between two buckets they would answer with half-new weights.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import socket
import urllib.parse
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.convert.live import receive, save_hf, stream_hf_tensors
from megatron_distill.errors import ServerError
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.sglang.address import LOOPBACK, own_address
from megatron_distill.sglang.client import SGLangClient
from megatron_distill.sglang.control import in_background

GROUP_NAME = "megatron_distill"
GROUP_TIMEOUT_S = 120.0
"""Longest wait for one message of a broadcast, or for a server to join or leave the group."""

DETERMINISTIC_CHANNELS = 8
"""NCCL channels that SGLang 0.5.23 pins in a deterministic tensor-parallel server (SGLANG_DETERMINISTIC_NCCL_NCHANNELS)."""

Bucket = list[tuple[str, Tensor]]


class WeightSync(Protocol):
    """A transport of weights to the student's servers."""

    def gather(self, chunks: Sequence[Any], version: int) -> None:
        """Bring the weights to rank 0, whole, and keep them there in the place of earlier ones. Collective over all ranks.

        They are those of now: the ranks may go on training while they are sent.

        Raises:
            DistillError, OSError: on every rank alike.
        """

    def send(self, version: int) -> None:
        """Make every server serve what was gathered last. On rank 0, in any thread, as often as needed.

        Raises:
            ServerError: a server did not take them. Its weights are then unknown until they are sent again.
        """

    def close(self) -> None:
        """Release what the transport holds. On every rank."""


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
            world: gloo group of all ranks, over which they agree on how it ended; the default group if that is gloo.
            in_flight: what is being written goes on under the new weights; by default it ends first.
        """
        self._hf_config, self._source, self._directory, self._client = hf_config, source, directory, client
        self._world, self._in_flight = world, in_flight

    def gather(self, chunks: Sequence[Any], version: int) -> None:
        """See ``WeightSync``."""
        save_hf(chunks, self._hf_config, self._source, self._path(version), overwrite=True, names_group=self._world)

    def send(self, version: int) -> None:
        """See ``WeightSync``."""
        assert self._client is not None
        path = self._path(version)
        self._client.wait_reachable()
        self._client.update_weights_from_disk(path, str(version), in_flight=self._in_flight)
        for old in self._directory.glob("v*"):
            if old != path:
                shutil.rmtree(old, ignore_errors=True)

    def _path(self, version: int) -> Path:
        return self._directory / f"v{version:06d}"

    def close(self) -> None:
        """Remove the last version."""
        if self._client is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


class BroadcastSync:
    """From rank 0's memory to the servers through a process group of their own, in flat buckets."""

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
            world: gloo group of all ranks, over which they agree on how it ended; the default group if that is gloo.
        """
        self._hf_config, self._client, self._world = hf_config, client, world
        self._num_ranks = 1 + num_replicas * ranks_per_replica
        self._ranks_per_replica, self._num_channels = ranks_per_replica, num_channels
        self._bucket_bytes = bucket_bytes
        self._messages: list[Message] = []
        self._device = torch.device("cpu")
        self._group: WeightsGroup | None = None
        self._sent_version: str | None = None
        self._names = (f"{GROUP_NAME}-{number}" for number in itertools.count())

    def gather(self, chunks: Sequence[Any], version: int) -> None:
        """See ``WeightSync``. Rank 0 keeps the whole student in its host memory, pinned where there is a GPU."""
        buckets = stream_hf_tensors(chunks, self._hf_config, self._bucket_bytes, self._world)

        def keep() -> None:
            earlier = [message.flat for message in self._messages]  # of the same sizes: written over
            self._messages = []
            for bucket, flat in itertools.zip_longest(buckets, earlier):
                self._device = bucket[0][1].device
                self._messages.append(pack(bucket, flat))

        receive(buckets, keep, self._world)

    def send(self, version: int) -> None:
        """See ``WeightSync``."""
        client = self._client
        assert client is not None
        client.wait_reachable()
        if self._group is not None and client.served_versions() != {self._sent_version}:
            self._leave(self._group, failed=True)  # a server was started again: it is in no group
        try:
            with _stream_of_its_own(self._device):
                self._group = self._group or self._join(client)
                send_messages(client, self._group, self._messages, str(version), self._device)
            self._sent_version = str(version)
        except BaseException:
            if self._group is not None:
                self._leave(self._group, failed=True)
            raise

    def _join(self, client: SGLangClient) -> WeightsGroup:
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

    def _leave(self, group: WeightsGroup, failed: bool) -> None:
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

        Raises:
            ServerError: they did not meet within ``GROUP_TIMEOUT_S``, or a server would not.
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
        self._wait(servers, "the servers did not join")  # fails as soon as one of them refuses
        self._group = self._wait(met, "rank 0 did not meet the servers")
        _world.pg_group_ranks[self._group] = {rank: rank for rank in range(self._num_ranks)}

    def broadcast(self, flat: Tensor, received: Future[None]) -> None:
        """Send one message. Ends when all servers have it, or when the first of them fails to take it.

        Raises:
            ServerError: it did not arrive within ``GROUP_TIMEOUT_S``, or a server did not take it.
        """
        work = self._group.broadcast([flat], dist.BroadcastOptions())
        self._wait(received, "a message of weights did not arrive")
        work.wait()

    def _wait[T](self, future: Future[T], what: str) -> T:
        """Its result; a wait that is too long has no words of its own."""
        try:
            return future.result(timeout=GROUP_TIMEOUT_S)
        except TimeoutError as error:
            raise ServerError(
                f"weights group {self.name} at {self.address}:{self.port} = {what} within {GROUP_TIMEOUT_S:g} s: servers and "
                "rank 0 must reach each other at every port. Open the ports between the nodes, set socket_interface in the "
                "cluster's profile to the interface that connects them, or set servers.weight_sync=disk."
            ) from error

    def leave(self, failed: bool) -> None:
        """Leave the group; after a failure without waiting for anyone, so that those who wait for this side wake up."""
        if self._group is None:
            return
        if failed:
            self._group.abort()
        else:
            dist.destroy_process_group(self._group)
        self._group = None


@dataclass(frozen=True)
class Message:
    """A bucket as it travels.

    Attributes:
        names: Hugging Face names of its tensors, those of wider types first: SGLang reads each at an offset that its item size
            divides.
        dtypes: "float32", "bfloat16", ...
        shapes: of whole tensors.
        flat: their bytes, one after the other, in host memory.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    flat: Tensor


def pack(bucket: Bucket, flat: Tensor | None = None) -> Message:
    """Copy a bucket out of the device's memory, into ``flat`` if that is given."""
    tensors = sorted(bucket, key=lambda item: -item[1].element_size())
    sizes = [tensor.numel() * tensor.element_size() for _, tensor in tensors]
    if flat is None:
        flat = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=tensors[0][1].is_cuda)
    for (_, tensor), part in zip(tensors, flat.split(sizes), strict=True):
        part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return Message(
        tuple(name for name, _ in tensors),
        tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors),
        tuple(tuple(tensor.shape) for _, tensor in tensors),
        flat,
    )


def send_messages(
    client: SGLangClient,
    group: WeightsGroup,
    messages: Iterable[Message],
    version: str,
    device: torch.device | str = "cpu",
) -> int:
    """Broadcast messages to the servers, which are paused meanwhile, and prove that they took them.

    Args:
        client: of the servers.
        group: rank 0's process group with them.
        messages: all of the model's.
        version: label of the new weights.
        device: that the group sends from.

    Returns:
        Bytes sent.

    Raises:
        ServerError: a server did not take a message. All stay paused, with weights that must not be used: send all again.
    """
    client.pause()
    client.flush_cache()
    client.begin_weight_update()
    num_bytes = 0
    for message in messages:
        received = client.update_weights_from_distributed(
            message.names, message.dtypes, message.shapes, group_name=group.name, version=version
        )
        group.broadcast(message.flat.to(device), received)
        num_bytes += message.flat.numel()
    client.end_weight_update()
    client.require_weight_version(version)
    client.continue_generation()
    return num_bytes


def _stream_of_its_own(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """So that what is sent does not queue behind what the ranks compute."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


def _host_of(client: SGLangClient) -> str:
    return urllib.parse.urlsplit(client.urls[0]).hostname or LOOPBACK
