"""One model's columns on one rank, and how to look chosen token ids up in them.

In: token ids of the whole vocabulary. Out: where they are among this rank's columns, if they are, and with one collective
their logits and the softmax's statistics. The losses that need the student's logits alone (sampled tokens, a teacher's top-k)
build on this; those that need both models' on ``shards``.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.losses.backends import Kernels
from megatron_distill.losses.kernels import compute_dtype, merge_softmax_statistics
from megatron_distill.losses.shards import exchange, resolve_vocab_size


class ColumnShard(NamedTuple):
    """The token ids ``[start, start + width)``, held as a rank's first ``width`` columns; the rest of them are padding.

    Args:
        start: first id of this rank.
        width: number of real tokens on this rank, possibly 0.
        vocab_size: number of tokens that exist, over all ranks.
    """

    start: int
    width: int
    vocab_size: int


def column_shard(num_columns: int, tp_group: dist.ProcessGroup | None, vocab_size: int | None) -> ColumnShard:
    """This rank's share of a vocabulary of which every rank holds ``num_columns``, padding included.

    Raises:
        LossError: ``vocab_size`` exceeds the columns.
    """
    size = tp_group.size() if tp_group is not None else 1
    rank = tp_group.rank() if tp_group is not None else 0
    true_size = resolve_vocab_size(vocab_size, {"student": num_columns * size})
    start = min(rank * num_columns, true_size)
    return ColumnShard(start, min(start + num_columns, true_size) - start, true_size)


def locate(ids_TK: Tensor, shard: ColumnShard) -> Tensor:
    """Local column of each id, ``[T, K]`` int64; ``shard.width``, one past the last, for ids that other ranks hold."""
    local = ids_TK.to(torch.int64) - shard.start  # the CPU kernel reads them as such
    return torch.where((local >= 0) & (local < shard.width), local, shard.width)


def chosen_logits(z_TV: Tensor, ids_TK: Tensor, shard: ColumnShard, inverse_temperature: float) -> Tensor:
    """This rank's share of the logits of the chosen ids, ``[T, K]``: zero where another rank holds the id.

    An id that no rank holds (negative, or at or above the vocabulary's size) gives NaN, so that it cannot pass unseen.
    """
    dtype = compute_dtype(z_TV)
    exists = (ids_TK >= 0) & (ids_TK < shard.vocab_size)
    found = torch.zeros(ids_TK.shape, dtype=dtype, device=z_TV.device)
    if shard.width:
        columns = locate(ids_TK, shard)
        mine = columns < shard.width
        found = torch.where(mine, z_TV.gather(1, columns.clamp(max=shard.width - 1)).to(dtype), 0.0)
    return torch.where(exists, found * inverse_temperature, torch.nan)


class TokenPlan(NamedTuple):
    """How one model's logits are read, once a call.

    Args:
        shard: this rank's columns.
        inverse_temperature: multiplies the logits.
        chunk_tokens: tokens at a time; None as the kernels like it.
        kernels: that read them.
    """

    shard: ColumnShard
    inverse_temperature: float
    chunk_tokens: int | None
    kernels: Kernels


def look_up(
    logits_TV: Tensor, ids_TK: Tensor, plan: TokenPlan, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The softmax's statistics over the whole vocabulary, ``[T, 3]``, and the chosen ids' logits, ``[T, K]``: one collective.

    NaN as in ``chosen_logits``.
    """
    held_TV = logits_TV[:, : plan.shard.width]
    chosen_TK = chosen_logits(held_TV, ids_TK, plan.shard, plan.inverse_temperature)
    stats_TS = chosen_TK.new_zeros(logits_TV.shape[0], 3)
    stats_TS[:, 0].fill_(-torch.inf)
    for c in plan.kernels.chunks(logits_TV, plan.chunk_tokens) if plan.shard.width else ():
        stats_TS[c] = plan.kernels.softmax_statistics(held_TV[c], plan.inverse_temperature)
    stats_RTS, chosen_TK = exchange(stats_TS, chosen_TK, tp_group)
    return merge_softmax_statistics(stats_RTS), chosen_TK
