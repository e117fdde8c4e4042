"""A push of weights in two parts: all ranks gather, then rank 0 sends beside whatever the ranks do next.

    all ranks   gather v ── train, save ─────────────── wait: only who asks the servers, or pushes again ── gather v + 1
    rank 0      thread:     send v to the servers, again where one of them died
    all ranks   threads:    how that ended, over a group of their own

A push that fails because a server died or a connection broke is sent again once every server answers (one that died is
started again, see ``sglang.supervisor``); a server that refuses ends it at once. What rank 0 meets, every rank raises when it
waits.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist

from megatron_distill.errors import DistillError, ServerError
from megatron_distill.sglang.control import in_background
from megatron_distill.training.weight_sync import WeightSync

MAX_ATTEMPTS = 3


class WeightPush:
    """Brings the live weights to the student's servers. Every method is called by all ranks alike, at the same point."""

    def __init__(
        self,
        sync: WeightSync,
        chunks: Sequence[Any],
        group: dist.ProcessGroup,
        sent: Callable[[float], None],
    ) -> None:
        """Send nothing yet.

        Args:
            sync: the transport.
            chunks: the model's on this rank.
            group: gloo group of all ranks that nothing else uses, for threads.
            sent: told how many seconds the servers took for a push, on rank 0, when it has arrived.
        """
        self._sync, self._chunks, self._group, self._sent = sync, chunks, group, sent
        self._version = 0
        self._arrival: Future[float] | None = None
        self.seconds = 0.0
        """From gathered to served, of the push before the one that was begun last."""

    def begin(self, version: int) -> Future[float]:
        """Gather the weights of now, and begin to send them as ``version``, once an earlier push has arrived. Collective.

        Returns:
            Done when every server has proved that it serves them: seconds from gathered to served. It fails as the push did.

        Raises:
            DistillError, OSError: on every rank alike: they could not be gathered, or the earlier push failed.
        """
        self.seconds = self.wait()
        self._sync.gather(self._chunks, version)
        self._version = version
        return self._send()

    def again(self) -> Future[float]:
        """Begin to send once more what was gathered last: servers lost it in a restart. Collective."""
        self.wait()
        return self._send()

    def wait(self) -> float:
        """Until the servers have the weights of the last push, if there was one: how many seconds that took.

        Raises:
            DistillError: on every rank, if a server did not take them.
        """
        return self._arrival.result() if self._arrival is not None else 0.0

    def close(self) -> None:
        """Wait for the last push, however it ends, and release the transport."""
        with contextlib.suppress(DistillError):
            self.wait()
        self._sync.close()

    def _send(self) -> Future[float]:
        self._arrival = in_background(self._deliver, self._version)
        return self._arrival

    def _deliver(self, version: int) -> float:
        """In a thread of every rank."""
        began = time.perf_counter()
        failure: list[DistillError | None] = [None]
        if dist.get_rank() == 0:
            failure[0] = self._failure_of(version)
        dist.broadcast_object_list(failure, src=0, group=self._group)
        if failure[0] is not None:
            raise failure[0]
        seconds = time.perf_counter() - began
        if dist.get_rank() == 0:
            self._sent(seconds)
        return seconds

    def _failure_of(self, version: int) -> DistillError | None:
        """Send, and again what a restart may mend. An error that nobody foresaw ends this process, with its traceback."""
        failure: DistillError | None = None
        for _ in range(MAX_ATTEMPTS):
            try:
                self._sync.send(version)
                return None
            except (DistillError, OSError, RuntimeError) as error:
                failure = error if isinstance(error, DistillError) else ServerError(f"weight sync: {error}")
            if type(failure) is not ServerError:
                break
        return failure
