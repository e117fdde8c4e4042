"""KL divergences from a teacher that was asked about K tokens per position, not about the vocabulary.

In: the student's sharded logits, K token ids per position and the teacher's log-probabilities of them. Out: a ``TopKTerms``
per token. One collective forward, none backward.

The K ids may be the teacher's own top-k, or the student's (``vocab_parallel_topk``): a teacher that is asked for the
log-probabilities of the tokens that the *student* believes in gives the better reverse KL. The arithmetic is the same,
and so is the choice of what to do about the rest of the vocabulary:

* ``tail="bucket"``: all other tokens are one more outcome, K + 1 in total. By the data-processing inequality
  0 <= KL_bucket <= KL, it is 0 when the models agree, and the student is held to the teacher's total on the rest.
* ``tail="renormalised"``: both models are conditioned on the K tokens. Nothing then restrains the student elsewhere.
* ``tail="dropped"``: the sum over the vocabulary is cut off after K terms. No divergence: it can be negative.
"""

import math
import warnings
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.errors import LossError
from megatron_distill.losses.backends import Backend, Kernels, kernels_for
from megatron_distill.losses.columns import ColumnShard, chosen_logits, column_shard, locate
from megatron_distill.losses.first_order import first_order
from megatron_distill.losses.kernels import (
    compute_dtype,
    finite_or_zero,
    merge_softmax_statistics,
    weighted,
)
from megatron_distill.losses.kl import as_normaliser, inverse_temperature, mixed_loss, reverse_kl_weights, saved_logits
from megatron_distill.losses.shards import StopTokenGroups, check_stop_token_groups, exchange

Tail = Literal["bucket", "renormalised", "dropped"]

# The least probability that a teacher's tail is given: what 1 minus a sum of fp32 log-probabilities can resolve.
_TAIL_FLOOR = 1e-6

_TAIL_COSTS = {
    "renormalised": "tail = 'renormalised': tokens outside the top-k get no gradient, so the student may drift to them "
    "unseen, and the loss is 0 at distributions that differ there. tail='bucket' has neither fault.",
    "dropped": "tail = 'dropped': the truncated sum is no divergence. It is biased, can be negative, and is not least "
    "where the models agree. tail='bucket' has none of these faults.",
}


class TopKTerms(NamedTuple):
    """Per-token results; ``loss`` alone has gradients.

    Args:
        loss: what to minimise.
        forward_kl, reverse_kl: of the outcomes compared (K tokens, stop groups, tail), nats; both <= the full ones with
            ``tail="bucket"``.
        student_entropy: exact, of the full vocabulary with each stop-token group as one outcome, nats.
        topk_mass: the teacher's probability of the K tokens (and the stop tokens, where these were passed).
        student_topk_mass: the student's probability of the same tokens.
    """

    loss: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    topk_mass: Tensor
    student_topk_mass: Tensor


def distill_kl_topk(
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    reverse_kl_weight: float | Tensor,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    stop_token_groups: StopTokenGroups | None = None,
    stop_logprobs: Tensor | None = None,
    chunk_tokens: int | None = None,
    backend: Backend | None = None,
) -> TopKTerms:
    """``w KL(student || teacher) + (1 - w) KL(teacher || student)`` over K tokens and what ``tail`` makes of the rest.

    Stop-token groups are merged as in ``distill_kl``. With ``stop_logprobs`` the merged outcome is exact, whoever of its
    members are among the K. Without, a group merges those of its members that are, and the others stay in the tail: a
    base student that ends with a token which its teacher never ranks is then not forgiven.

    A teacher's tail mass below 1e-6 is raised to it: 1 minus a sum of fp32 log-probabilities says no more, and a zero
    would make the reverse KL infinite.

    Args:
        student_logits: ``[..., V]``, this rank's columns.
        topk_ids: ``[..., K]`` integers, distinct ids per token, the same on every rank. -1 marks an unused slot; any other
            id outside the vocabulary gives NaN.
        topk_logprobs: ``[..., K]``, the teacher's log-probabilities of them in its full distribution, nats. They must be
            those *at* ``temperature``: K log-probabilities cannot be re-tempered, since the normaliser is unknown.
        reverse_kl_weight: w in [0, 1], one number or one per token.
        tail: see the module's docstring.
        temperature: divides the student's logits.
        tp_group, vocab_size, chunk_tokens, backend: as in ``distill_kl``.
        stop_token_groups: ids that are one action.
        stop_logprobs: ``[..., n]``, the teacher's log-probabilities of all members, in the order of the groups, flattened.

    Returns:
        TopKTerms in the compute dtype.

    Raises:
        LossError: shapes that do not fit, ``tail="renormalised"`` with K = 1 (identically zero), or a fault named in
            ``distill_kl``.
    """
    inverse = inverse_temperature(temperature)
    shape = student_logits.shape[:-1]
    _check_topk(student_logits, topk_ids, topk_logprobs, tail)
    shard = column_shard(student_logits.shape[-1], tp_group, vocab_size)
    groups = check_stop_token_groups(stop_token_groups, shard.vocab_size)
    num_members = sum(map(len, groups))
    if stop_logprobs is not None and stop_logprobs.shape != (*shape, num_members):
        raise LossError(
            f"stop_logprobs = {tuple(stop_logprobs.shape)}: must be {(*shape, num_members)}, one per member of "
            f"stop_token_groups = {groups}. Pass the teacher's log-probability of each, in that order."
        )
    dtype = compute_dtype(student_logits)
    ids_TK = topk_ids.detach().reshape(-1, topk_ids.shape[-1])
    logprobs_TK = topk_logprobs.detach().reshape(ids_TK.shape).to(dtype)
    slots = _slots(ids_TK, logprobs_TK, groups, None if stop_logprobs is None else stop_logprobs.detach().to(dtype))
    plan = _TopKPlan(shard, inverse, tail, chunk_tokens, kernels_for(student_logits, backend))
    terms = _TopKKL.apply(
        student_logits.reshape(-1, student_logits.shape[-1]),
        reverse_kl_weights(reverse_kl_weight, student_logits),
        slots,
        plan,
        tp_group,
    )
    return TopKTerms(*(term.view(shape) for term in terms))


def _check_topk(student_logits: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, tail: Tail) -> None:
    """Refuse what is not a top-k, and say what a choice of tail costs."""
    if topk_ids.shape != topk_logprobs.shape or topk_ids.shape[:-1] != student_logits.shape[:-1]:
        raise LossError(
            f"topk_ids = {tuple(topk_ids.shape)}, topk_logprobs = {tuple(topk_logprobs.shape)}: must both be "
            f"{(*student_logits.shape[:-1], 'K')}. Each token needs its own K ids. Align them with the logits."
        )
    if tail not in ("bucket", *_TAIL_COSTS):
        raise LossError(f"tail = {tail!r}: must be 'bucket', 'renormalised' or 'dropped'. Use 'bucket'.")
    if tail == "renormalised" and topk_ids.shape[-1] == 1:
        raise LossError(
            "tail = 'renormalised' with k = 1: refused. One token renormalised has probability 1 under both models, so "
            "the loss and its gradient are 0 whatever they say. Use tail='bucket', or a larger k."
        )
    if tail in _TAIL_COSTS:
        warnings.warn(_TAIL_COSTS[tail], stacklevel=3)


class _Slots(NamedTuple):
    """The ids that are looked up, and how they form outcomes.

    Args:
        ids_TN: the ids; -1 where unused.
        logprobs_TN: the teacher's log-probabilities; -inf where unused.
        group_TN: index of the stop-token group that the slot belongs to, -1 for none.
        num_groups: G.
    """

    ids_TN: Tensor
    logprobs_TN: Tensor
    group_TN: Tensor
    num_groups: int


def _slots(
    ids_TK: Tensor, logprobs_TK: Tensor, groups: tuple[tuple[int, ...], ...], stop_logprobs: Tensor | None
) -> _Slots:
    """Join the K tokens and, where the teacher gave them, the members of the stop-token groups."""
    members, owners = _group_members(groups, ids_TK.device)
    group_TK = torch.full_like(ids_TK, -1)
    if groups:
        is_member_TKM = ids_TK.unsqueeze(2) == members
        group_TK = torch.where(is_member_TKM, owners, -1).amax(dim=2).to(ids_TK.dtype)
    if stop_logprobs is not None and groups:
        num_tokens = ids_TK.shape[0]
        # A member among the K would count twice: its own slot gives way to the one that every token has.
        of_all = members.to(ids_TK.dtype).expand(num_tokens, -1)
        ids_TK = torch.cat([torch.where(group_TK >= 0, -1, ids_TK), of_all], dim=1)
        logprobs_TK = torch.cat([logprobs_TK, stop_logprobs.reshape(num_tokens, stop_logprobs.shape[-1])], dim=1)
        group_TK = torch.cat([torch.full_like(group_TK, -1), owners.to(group_TK.dtype).expand(num_tokens, -1)], dim=1)
    logprobs_TK = torch.where(ids_TK == -1, -torch.inf, logprobs_TK)
    return _Slots(ids_TK, logprobs_TK, group_TK, len(groups))


@lru_cache(maxsize=64)  # Copied to the device once, not at every step.
def _group_members(groups: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """All groups' members in order, and the group of each; int64."""
    members = [token for group in groups for token in group]
    owners = [index for index, group in enumerate(groups) for _ in group]
    return (
        torch.tensor(members, dtype=torch.int64, device=device),
        torch.tensor(owners, dtype=torch.int64, device=device),
    )


def _outcomes(slots: _Slots, values_TN: Tensor, tail_T: Tensor) -> Tensor:
    """Log-weights of the outcomes, ``[T, N + G + 1]``: single slots, merged groups, tail."""
    single = torch.where(slots.group_TN < 0, values_TN, -torch.inf)
    merged = [
        torch.where(slots.group_TN == index, values_TN, -torch.inf).logsumexp(dim=1, keepdim=True)
        for index in range(slots.num_groups)
    ]
    return torch.cat([single, *merged, tail_T.unsqueeze(1)], dim=1)


class _TopKPlan(NamedTuple):
    shard: ColumnShard
    inverse_temperature: float
    tail: Tail
    chunk_tokens: int | None
    kernels: Kernels


def _teacher_log_probs(slots: _Slots, student_rest_T: Tensor, tail: Tail) -> tuple[Tensor, Tensor]:
    """The teacher's log-probabilities of the outcomes, ``[T, N + G + 1]``, and its mass on the slots, ``[T]``.

    Args:
        student_rest_T: the student's log-weight of everything outside the slots; -inf where there is nothing outside.
    """
    known_TN = slots.logprobs_TN
    log_mass_T = known_TN.logsumexp(dim=1)
    none_T = torch.full_like(log_mass_T, -torch.inf)
    if tail == "renormalised":
        return _outcomes(slots, known_TN - log_mass_T.unsqueeze(1), none_T), log_mass_T.exp()
    if tail == "dropped":
        return _outcomes(slots, known_TN, none_T), log_mass_T.exp()
    floor = _TAIL_FLOOR if known_TN.dtype == torch.float32 else 1e-12
    held_T = log_mass_T.clamp(max=math.log1p(-floor))
    tail_T = torch.log(-torch.expm1(held_T))
    # Slots that cover the vocabulary leave no tail to floor: what the sum then lacks to 1 is rounding.
    covered_T = (student_rest_T == -torch.inf) & (log_mass_T > math.log1p(-1e-3))
    held_T, tail_T = torch.where(covered_T, 0.0, held_T), torch.where(covered_T, none_T, tail_T)
    excess_T = torch.where(log_mass_T == -torch.inf, 0.0, log_mass_T - held_T)
    return _outcomes(slots, known_TN - excess_T.unsqueeze(1), tail_T), log_mass_T.exp()


class _Divergences(NamedTuple):
    """Both KLs over the outcomes and the gradient of their mix to the student's log-weights."""

    forward_kl_T: Tensor
    reverse_kl_T: Tensor
    grad_TO: Tensor


def _divergences(log_q_TO: Tensor, log_p_TO: Tensor, counted_O: Tensor, weight_T: Tensor) -> _Divergences:
    """KLs summed over the counted outcomes, with gradients that know the uncounted ones share the normaliser.

    With c = 1 for counted outcomes, else 0: grad forward = q sum(c p) - c p, and grad reverse = q (f - sum q f) with
    f = c (log q - log p + 1). Where every outcome is counted these are the formulas of ``kl_gradient_``.
    """
    q, p = log_q_TO.exp(), log_p_TO.exp()
    ratio = log_q_TO - log_p_TO
    counted_q, counted_p = q * counted_O, p * counted_O
    forward_kl_T = -weighted(counted_p, ratio).sum(dim=1)
    reverse_kl_T = weighted(counted_q, ratio).sum(dim=1)
    mean_T1 = (reverse_kl_T + counted_q.sum(dim=1)).unsqueeze(1)
    forward_grad = q * counted_p.sum(dim=1, keepdim=True) - counted_p
    reverse_grad = weighted(counted_q, ratio + 1) - weighted(q, mean_T1)
    weight = weight_T.unsqueeze(1)
    grad = weighted(weight, reverse_grad) + weighted(1 - weight, forward_grad)
    return _Divergences(forward_kl_T, reverse_kl_T, grad)


class _TopKKL(torch.autograd.Function):
    """One pass over the vocabulary without the slots, one exchange; then everything happens on N + G + 1 outcomes."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        weight_T: Tensor,
        slots: _Slots,
        plan: _TopKPlan,
        tp_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, ...]:
        used_TN = slots.ids_TN != -1
        looked_up = torch.where(used_TN, slots.ids_TN, 0)
        shares_TN = chosen_logits(logits_TV, looked_up, plan.shard, plan.inverse_temperature)
        columns_TN, held_TV = locate(slots.ids_TN, plan.shard), logits_TV[:, : plan.shard.width]
        stats_TS = shares_TN.new_zeros(logits_TV.shape[0], 3)
        stats_TS[:, 0].fill_(-torch.inf)
        for c in plan.kernels.chunks(logits_TV, plan.chunk_tokens) if plan.shard.width else ():
            stats_TS[c] = plan.kernels.rest_statistics(held_TV[c], columns_TN[c], plan.inverse_temperature)
        stats_RTS, slots_TN = exchange(stats_TS, shares_TN, tp_group)
        slots_TN = torch.where(used_TN, slots_TN, -torch.inf)
        rest_max, rest_sum, rest_inner = merge_softmax_statistics(stats_RTS).unbind(dim=1)
        rest_T = rest_max + rest_sum.log()

        full_z = _outcomes(slots, slots_TN, rest_T)
        log_q_full = full_z - full_z.logsumexp(dim=1, keepdim=True)
        log_p, topk_mass_T = _teacher_log_probs(slots, rest_T, plan.tail)
        counted_O = log_q_full.new_ones(log_q_full.shape[1])
        log_q = log_q_full
        if plan.tail == "dropped":
            counted_O[-1].zero_()
        elif plan.tail == "renormalised":
            log_q = torch.cat([full_z[:, :-1].log_softmax(dim=1), torch.full_like(full_z[:, -1:], -torch.inf)], dim=1)
        forward_kl_T, reverse_kl_T, grad_TO = _divergences(log_q, log_p, counted_O, weight_T)
        loss_T = mixed_loss(weight_T, reverse_kl_T, forward_kl_T)

        # H = -sum q log q over single outcomes, and over the rest from its own statistics.
        heads = log_q_full[:, :-1]
        log_rest_mass_T = log_q_full[:, -1]
        rest_mass_T = log_rest_mass_T.exp()
        rest_entropy_T = rest_sum.log() - rest_inner / rest_sum
        entropy_T = -weighted(heads.exp(), heads).sum(dim=1) - weighted(rest_mass_T, log_rest_mass_T - rest_entropy_T)

        ctx.plan = plan
        ctx.save_for_backward(
            logits_TV,
            slots.ids_TN,
            _slot_gradient(slots, slots_TN, full_z, grad_TO),
            # An empty rest: finite normalisers, so that what is ruled out anyway gets 0 rather than inf - inf.
            torch.stack([finite_or_zero(rest_max), finite_or_zero(rest_sum.log()), grad_TO[:, -1]], dim=1),
        )
        detached = (forward_kl_T, reverse_kl_T, entropy_T, topk_mass_T, 1 - rest_mass_T)
        ctx.mark_non_differentiable(*detached)
        return loss_T, *detached

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream_T: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, ids_TN, slot_grad_TN, rest_T3 = saved_logits(ctx)
        plan: _TopKPlan = ctx.plan
        width = plan.shard.width
        grad_TV = torch.empty_like(logits_TV)
        grad_TV[:, width:].zero_()
        columns_TN = locate(ids_TN, plan.shard)
        # A token that does not count may have an infinite loss: its gradient is 0 all the same.
        counts_T1 = (upstream_T != 0).unsqueeze(1)
        slot_grad_TN = torch.where(counts_T1, slot_grad_TN, 0.0)
        rest_T3 = torch.cat([rest_T3[:, :2], torch.where(counts_T1, rest_T3[:, 2:], 0.0)], dim=1)
        for c in plan.kernels.chunks(logits_TV, plan.chunk_tokens) if width else ():
            rows = (columns_TN[c], slot_grad_TN[c], rest_T3[c], upstream_T[c], plan.inverse_temperature)
            plan.kernels.rest_gradient_(grad_TV[c, :width], logits_TV[c, :width], *rows)
        return grad_TV, None, None, None, None


def _slot_gradient(slots: _Slots, slots_TN: Tensor, outcomes_TO: Tensor, grad_TO: Tensor) -> Tensor:
    """Gradient to each slot's logit, ``[T, N]``: its own outcome's, or its share of its group's."""
    num_slots = slots_TN.shape[1]
    grad_TN = grad_TO[:, :num_slots]
    for index in range(slots.num_groups):
        group = outcomes_TO[:, num_slots + index].unsqueeze(1)
        share = (slots_TN - as_normaliser(group)).exp()
        grad_TN = torch.where(slots.group_TN == index, weighted(share, grad_TO[:, num_slots + index, None]), grad_TN)
    return grad_TN.contiguous()
