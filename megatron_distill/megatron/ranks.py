"""Who this process is, asked of Megatron's parallel state."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_distill.training.ranks import Ranks


def patience() -> timedelta:
    """How long ranks may wait for each other on a group of ours: as on Megatron's, since they wait for servers, samples and
    evaluations. torch's own limit for a new group is 30 minutes."""
    from megatron.training import get_args

    return timedelta(minutes=get_args().distributed_timeout_minutes)


def find_ranks() -> Ranks:
    """Ask Megatron's parallel state, once it is initialised. Collective."""
    from megatron.core import mpu

    rank, world_size = dist.get_rank(), dist.get_world_size()
    world, aside = (dist.new_group(backend="gloo", timeout=patience()) for _ in range(2))
    dp_rank = mpu.get_data_parallel_rank(with_context_parallel=False)
    replica_of: list[Any] = [None] * world_size
    dist.all_gather_object(replica_of, dp_rank, group=world)
    replica, leaders = None, []
    for number in range(mpu.get_data_parallel_world_size(with_context_parallel=False)):
        members = [member for member, of in enumerate(replica_of) if of == number]
        group = dist.new_group(members, backend="gloo", timeout=patience())  # all ranks take part in making each
        leaders.append(members[0])
        if number == dp_rank:
            replica = group
    assert replica is not None
    return Ranks(
        rank=rank,
        dp_rank=dp_rank,
        leaders=tuple(leaders),
        is_last_stage=mpu.is_pipeline_last_stage(),
        speaks=mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0,
        is_reporter=rank == world_size - 1,
        replica=replica,
        world=world,
        aside=aside,
    )
