"""Who a trainer rank is, and how ranks agree on what to do next.

A *leader* (the first rank of a data-parallel replica) talks to servers and files; the others of its replica get what it
got. The exchange is plain Python objects over gloo, so that it needs no GPU memory and cannot disturb Megatron's own
communication: token ids and top-k scores, 8 bytes x K a response token and replica (K = 64: 17 MB for 8 responses of 4,096), or
hidden states, 2 bytes x H in bf16 (H = 4,096: 268 MB). Leaders exchange as much among themselves, so that replicas get
samples of about as many tokens (see ``rollouts.dealing``).
A leader's failure travels the same way: all ranks raise it, none waits for ever.
"""

import contextlib
import pickle
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.errors import DistillError


@dataclass(frozen=True)
class Ranks:
    """This rank's place.

    Attributes:
        rank: global, 0-based.
        dp_rank: which replica this rank belongs to, 0-based.
        leaders: global rank of each replica's leader, in the order of replicas.
        is_last_stage: holds the logits.
        speaks: the one rank of its replica whose metrics count: the last stage's first tensor-parallel rank.
        is_reporter: the one rank that writes metrics: the last, as in Megatron's own logging.
        replica: gloo group of the replica's ranks; its first is the leader.
        world: gloo group of all ranks.
        aside: another, for threads: what they tell each other has no place in the ranks' common order.
    """

    rank: int
    dp_rank: int
    leaders: tuple[int, ...]
    is_last_stage: bool
    speaks: bool
    is_reporter: bool
    replica: dist.ProcessGroup
    world: dist.ProcessGroup
    aside: dist.ProcessGroup

    @property
    def dp_size(self) -> int:
        """Number of replicas."""
        return len(self.leaders)

    @property
    def is_leader(self) -> bool:
        """Whether this is the first rank of its replica."""
        return self.rank == self.leaders[self.dp_rank]

    def from_leader(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` on every replica's leader and hand its result to the replica's ranks.

        Raises:
            DistillError: on all ranks of the job, whatever a leader raised. An error of another kind, which a user's function
                may raise, is told with the place where it was raised; the leader's log has the whole way there.
        """
        box: list[Any] = [None]
        if self.is_leader:
            try:
                box[0] = (work(), None)
            except Exception as error:
                box[0] = (None, _travelling(error))
        dist.broadcast_object_list(box, group=self.replica, group_src=0)
        result, failure = box[0]
        failures = [one for one in self.gather(failure) if one is not None]
        if failures:
            raise failures[0]
        return result

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * dist.get_world_size(self.world)
        dist.all_gather_object(values, value, group=self.world)
        return values

    def exchange(self, parcels: Sequence[Any]) -> list[Any]:
        """Called by all leaders, and by no one else: give ``parcels[i]`` to the leader of replica i.

        Returns:
            What each replica's leader gave to this one, in the order of replicas.
        """
        own = self.dp_rank
        sent = [b"" if i == own else pickle.dumps(parcel) for i, parcel in enumerate(parcels)]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in parcels]
        self._pass([torch.tensor([len(one)]) for one in sent], sizes)
        received = [torch.empty(int(size), dtype=torch.uint8) for size in sizes]
        self._pass([torch.frombuffer(bytearray(one) or bytearray(1), dtype=torch.uint8) for one in sent], received)
        return [parcels[own] if i == own else pickle.loads(one.numpy().tobytes()) for i, one in enumerate(received)]

    def _pass(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Send one tensor to each other leader, receive one from each."""
        others = [i for i, leader in enumerate(self.leaders) if leader != self.rank]
        works = [dist.irecv(received[i], self.leaders[i], self.world) for i in others]
        works += [dist.isend(sent[i], self.leaders[i], self.world) for i in others]
        for work in works:
            assert work is not None
            work.wait()


def _travelling(error: Exception) -> DistillError:
    """An error as other ranks can be sent it: without its traceback, and of a kind that can be pickled."""
    if not isinstance(error, DistillError):
        traceback.print_exception(error)
        place = traceback.extract_tb(error.__traceback__)[-1]
        return DistillError(
            f"{type(error).__name__}: {error} (raised at {place.filename}:{place.lineno}, in {place.name})"
        )
    with contextlib.suppress(Exception):
        return cast(DistillError, pickle.loads(pickle.dumps(error)))
    return DistillError(str(error))
