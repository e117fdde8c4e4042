"""One rank of pushes of weights that end in every way: a transport that is scripted, everything else real."""

import sys
import threading

import pytest
import torch
import torch.distributed as dist

from megatron_distill.errors import CheckpointError, ServerError
from megatron_distill.training.weight_push import MAX_ATTEMPTS, WeightPush
from tests.support.waiting import HANG_S


class Scripted:
    """A transport whose sends end as told, one after the other.

    Attributes:
        gathered: versions.
        sent: versions, at the beginning of each try.
        gate: what a send waits for.
    """

    def __init__(self, *ends: Exception | None) -> None:
        self._ends = list(ends)
        self.gathered: list[int] = []
        self.sent: list[int] = []
        self.gate = threading.Event()

    def gather(self, chunks: object, version: int) -> None:
        """As every rank calls it."""
        dist.barrier()
        self.gathered.append(version)

    def send(self, version: int) -> None:
        """As rank 0's thread calls it."""
        self.sent.append(version)
        assert self.gate.wait(HANG_S)
        end = self._ends.pop(0)
        if end is not None:
            raise end

    def close(self) -> None:
        """Nothing is held."""


def main() -> None:
    dist.init_process_group("gloo")
    {"beside": beside, "again": again, "fails": fails, "refused": refused, "sender": sender}[sys.argv[1]]()


def pushing(*ends: Exception | None) -> tuple[WeightPush, Scripted, list[float]]:
    """A push, its transport, and what was told of it."""
    transport, told = Scripted(*ends), list[float]()
    return WeightPush(transport, [], dist.new_group(backend="gloo"), sent=told.append), transport, told


def beside() -> None:
    """Ranks talk to each other while weights are on their way; the next push waits for them."""
    push, transport, told = pushing(None, None)
    arrival = push.begin(1)
    total = torch.tensor([1.0])
    dist.all_reduce(total)
    assert total == 2 and not arrival.done() and transport.gathered == [1]
    threading.Timer(0.2, transport.gate.set).start()
    push.begin(2)
    assert arrival.done() and push.seconds == arrival.result() > 0 and transport.gathered == [1, 2]
    assert push.wait() > 0
    is_rank_0 = dist.get_rank() == 0
    assert transport.sent == ([1, 2] if is_rank_0 else []) and len(told) == 2 * is_rank_0


def again() -> None:
    """What was gathered last is sent once more, without asking the ranks for it; so it is where a connection broke."""
    push, transport, _ = pushing(None, ServerError("broken"), OSError("broken"), None)
    transport.gate.set()
    push.begin(4)
    push.again()
    push.wait()
    assert transport.gathered == [4] and transport.sent == ([4, 4, 4, 4] if dist.get_rank() == 0 else [])


def fails() -> None:
    """Three times: one error on both ranks, at every wait, and the ranks are still in step."""
    push, transport, _ = pushing(*[ServerError("gone")] * MAX_ATTEMPTS)
    transport.gate.set()
    push.begin(1)
    for ask in (push.wait, push.again, lambda: push.begin(2)):
        with pytest.raises(ServerError, match="gone"):
            ask()
    assert len(transport.sent) == (MAX_ATTEMPTS if dist.get_rank() == 0 else 0)
    push.close()
    dist.barrier()


def refused() -> None:
    """What no restart mends is not tried again."""
    push, transport, _ = pushing(CheckpointError("another model's tensors"))
    transport.gate.set()
    push.begin(1)
    with pytest.raises(CheckpointError, match="another model's tensors"):
        push.wait()
    assert len(transport.sent) == (1 if dist.get_rank() == 0 else 0)
    dist.barrier()


def sender() -> None:
    """Rank 0 gathers from a rank that has no memory for what it should send."""

    def gather(chunks: object, version: int) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("out of memory")
        dist.recv(torch.empty(1), 1)

    push, transport, _ = pushing()
    transport.gather = gather  # type: ignore[method-assign]
    push.begin(1)
