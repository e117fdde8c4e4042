"""Data-parallel neighbours as one tensor-parallel group, for a teacher that is too large for the ranks of one replica.

    student tp 2, dp 4        replica   0     1     2     3
                              ranks     0 1   2 3   4 5   6 7
    teacher tp 4              groups    0 1   2 3 | 4 5   6 7

A group's replicas pass their micro-batches through the teacher together, one replica's after the other's, each rank with its
part of every layer. So all see all micro-batches of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_distill.megatron.ranks import patience
from megatron_distill.rollouts.batches import MicroBatch

_READ = (
    "tokens_RL",
    "position_ids_RL",
    "attention_mask",
    "sequence_starts",
    "logits_index_T",
)  # of a batch, by a model


@dataclass(frozen=True)
class Neighbours:
    """The replicas that share a teacher with this rank's.

    Attributes:
        number: of them.
        place: of this rank's replica, 0 to ``number - 1``.
        tp_group: the tp ranks of all, in the order of replicas.
        objects: the same ranks over gloo.
    """

    number: int
    place: int
    tp_group: dist.ProcessGroup
    objects: dist.ProcessGroup

    def pool(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Everyone's first micro-batch, everyone's second, ...; this rank's own are those at ``place``, and not copied.

        Collective over the group, each of whose replicas has as many micro-batches.
        """
        size = self.objects.size()
        sends = self.objects.rank() % (size // self.number) == 0  # one rank speaks for its replica
        told: list[Any] = [None] * size
        dist.all_gather_object(told, [_on_host(one) for one in batches] if sends else None, group=self.objects)
        everyones = told[:: size // self.number]
        device = batches[0].tokens_RL.device
        pooled = []
        for number, own in enumerate(batches):
            for place, theirs in enumerate(everyones):
                pooled.append(own if place == self.place else replace(own, **_on(device, theirs[number])))
        return pooled


def find_neighbours(number: int, world: dist.ProcessGroup) -> Neighbours:
    """Ask Megatron's parallel state for so many replicas side by side. Collective over all ranks.

    Args:
        number: a divisor of dp.
        world: all ranks, over gloo.
    """
    from megatron.core import mpu

    dp_rank = mpu.get_data_parallel_rank(with_context_parallel=False)
    own = (mpu.get_pipeline_model_parallel_rank(), mpu.get_context_parallel_rank(), dp_rank // number)
    told: list[Any] = [None] * world.size()
    dist.all_gather_object(told, own, group=world)
    found = None
    for shared in sorted(set(told)):  # all ranks take part in making each
        members = [rank for rank, where in enumerate(told) if where == shared]
        groups = [dist.new_group(members, backend=backend, timeout=patience()) for backend in (None, "gloo")]
        if shared == own:
            found = Neighbours(number, dp_rank % number, *groups)
    assert found is not None
    return found


def _on_host(batch: MicroBatch) -> dict[str, Any]:
    read = {name: getattr(batch, name) for name in _READ}
    host = {name: None if tensor is None else tensor.cpu() for name, tensor in read.items()}
    return host | {"max_sequence_tokens": batch.max_sequence_tokens}


def _on(device: torch.device, read: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in read.items()}
