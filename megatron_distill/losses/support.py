"""Several tokens at each position: a model's most probable ones, and its log-probabilities of given ones; no gradients.

In: sharded logits, and how many tokens or which. Out: ids and log-probabilities, the same on every rank, in one collective.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.errors import LossError
from megatron_distill.losses.backends import Backend, kernels_for
from megatron_distill.losses.columns import TokenPlan, column_shard, look_up
from megatron_distill.losses.kernels import compute_dtype, merge_softmax_statistics
from megatron_distill.losses.kl import inverse_temperature
from megatron_distill.losses.shards import exchange


def vocab_parallel_topk(
    logits: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of the whole vocabulary and their log-probabilities, in one collective; no gradient.

    To ask a teacher about the student's own support, or to cache an in-process teacher's.

    Args:
        logits: ``[..., V]``, this rank's columns.
        k: how many; at most the vocabulary's size.
        temperature, tp_group, vocab_size, backend: as in ``distill_kl``.

    Returns:
        ``[..., k]`` int64 ids, most probable first, and ``[..., k]`` log-probabilities in the full distribution, nats; the
        same on every rank.

    Raises:
        LossError: k is not in [1, vocab_size], or a temperature that is not positive.
    """
    inverse = inverse_temperature(temperature)
    shard = column_shard(logits.shape[-1], tp_group, vocab_size)
    if not 1 <= k <= shard.vocab_size:
        raise LossError(f"k = {k}: must lie in [1, {shard.vocab_size}], the vocabulary. Ask for fewer tokens.")
    flat_TV = logits.detach().reshape(-1, logits.shape[-1])
    dtype, num_tokens = compute_dtype(logits), flat_TV.shape[0]
    here = min(k, shard.width)
    # A rank's candidates: k values, -inf where it has fewer columns, and their ids, which a float holds exactly to 2**24.
    packed = torch.zeros(num_tokens, 3 + 2 * k, dtype=dtype, device=logits.device)
    packed[:, 0].fill_(-torch.inf)
    packed[:, 3 : 3 + k].fill_(-torch.inf)
    kernels = kernels_for(logits, backend)
    for c in kernels.chunks(flat_TV, None) if here else ():
        held_TV = flat_TV[c, : shard.width]
        packed[c, :3] = kernels.softmax_statistics(held_TV, inverse)
        values, columns = held_TV.topk(here, dim=1)
        packed[c, 3 : 3 + here] = values.to(dtype) * inverse
        packed[c, 3 + k : 3 + k + here] = (columns + shard.start).to(dtype)
    stats_RTS, _ = exchange(packed, packed.new_empty(num_tokens, 0), tp_group)
    maximum, total, _ = merge_softmax_statistics(stats_RTS[:, :, :3]).unbind(dim=1)
    values, ids = (part.transpose(0, 1).flatten(1) for part in stats_RTS[:, :, 3:].tensor_split(2, dim=2))
    best, order = values.topk(k, dim=1)
    ids = ids.gather(1, order).to(torch.int64)
    logprobs = best - maximum.unsqueeze(1) - total.log().unsqueeze(1)
    shape = (*logits.shape[:-1], k)
    return ids.view(shape), logprobs.view(shape)


def vocab_parallel_gather_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Log-probabilities of several given tokens at each position, in one collective; no gradient.

    A teacher beside the student answers with it for the student's own support, which ``vocab_parallel_topk`` gives.

    Args:
        logits: ``[..., V]``, this rank's columns.
        token_ids: ``[..., K]`` int64, any ids of the vocabulary.
        temperature, tp_group, vocab_size, backend: as in ``distill_kl``.

    Returns:
        ``[..., K]`` log-probabilities in the full distribution, nats; the same on every rank.

    Raises:
        LossError: ids and logits do not fit, or a temperature that is not positive.
    """
    inverse = inverse_temperature(temperature)
    if token_ids.shape[:-1] != logits.shape[:-1]:
        raise LossError(
            f"token_ids = {tuple(token_ids.shape)}: must be {tuple(logits.shape[:-1])} and one more dimension, the ids asked "
            "for at each position. Add it, or use vocab_parallel_logprobs for one id a position."
        )
    shard = column_shard(logits.shape[-1], tp_group, vocab_size)
    plan = TokenPlan(shard, inverse, None, kernels_for(logits, backend))
    logits_TV, ids_TK = logits.detach().reshape(-1, logits.shape[-1]), token_ids.reshape(-1, token_ids.shape[-1])
    stats_T3, chosen_TK = look_up(logits_TV, ids_TK, plan, tp_group)
    maximum, total, _ = stats_T3.unbind(dim=1)
    return (chosen_TK - (maximum + total.log()).unsqueeze(1)).view(token_ids.shape)
