"""Losses that see one token per position: its log-probability, its entropy, and what can be made of samples alone.

In: the student's sharded logits and the token that was written. Out: ``vocab_parallel_logprobs``, differentiable, in one
collective forward and none backward; and from log-probabilities, ``sampled_kl`` and ``log_ratio_reward``.

A sampled estimator has a value and a gradient, and they need not estimate the same thing: back-propagating through an
unbiased *value* is not an unbiased *gradient*, because the samples depend on the student too. ``sampled_kl`` therefore
asks which divergence is wanted and who wrote the tokens, and refuses what would descend on something else.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.errors import LossError
from megatron_distill.losses.backends import Backend, kernels_for
from megatron_distill.losses.columns import TokenPlan, column_shard, locate, look_up
from megatron_distill.losses.first_order import first_order
from megatron_distill.losses.kl import inverse_temperature, saved_logits


class TokenTerms(NamedTuple):
    """Per-token results, shaped like the ids; both are differentiable.

    Args:
        logprobs: log-probability of the token, nats.
        entropy: entropy of the whole predicted distribution, nats.
    """

    logprobs: Tensor
    entropy: Tensor


def vocab_parallel_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    backend: Backend | None = None,
) -> TokenTerms:
    """Log-probability of the given tokens and entropy of the distributions that they came from.

    The entropy is exact (full vocabulary). The result is replicated over tensor-parallel ranks, as ``kl`` explains: take
    the gradient of the one loss built from it, and sum over data-parallel ranks only.

    Args:
        logits: ``[..., V]``, this rank's columns.
        token_ids: ``[...]`` integers. An id outside the vocabulary (a -100 that marks padding, say) gives NaN: replace it
            by any real id first, and mask the loss with ``torch.where``.
        temperature: divides the logits; that of sampling, if the log-probabilities are to match a sampler's.
        tp_group, vocab_size, chunk_tokens, backend: as in ``distill_kl``.

    Returns:
        TokenTerms in the compute dtype.

    Raises:
        LossError: ids and logits do not fit, or a temperature that is not positive.
    """
    inverse = inverse_temperature(temperature)
    if token_ids.shape != logits.shape[:-1]:
        raise LossError(
            f"token_ids = {tuple(token_ids.shape)}: must be {tuple(logits.shape[:-1])}, one id per token. "
            "Position t of the logits predicts token t + 1: shift the ids, do not drop a position of one of the two."
        )
    shard = column_shard(logits.shape[-1], tp_group, vocab_size)
    plan = TokenPlan(shard, inverse, chunk_tokens, kernels_for(logits, backend))
    logits_TV = logits.reshape(-1, logits.shape[-1])
    logprobs, entropy = _Logprobs.apply(logits_TV, token_ids.reshape(-1, 1), plan, tp_group)
    return TokenTerms(logprobs.view(token_ids.shape), entropy.view(token_ids.shape))


class _Logprobs(torch.autograd.Function):
    """log q(y) = z_y - lse and H = lse - E_q[z], from three statistics and the token's own logit."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, ids_T1: Tensor, plan: TokenPlan, tp_group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        stats_T3, chosen_T1 = look_up(logits_TV, ids_T1, plan, tp_group)
        maximum, total, inner = stats_T3.unbind(dim=1)
        log_total = total.log()
        entropy_T = log_total - inner / total
        logprobs_T = chosen_T1.squeeze(1) - maximum - log_total
        ctx.plan = plan
        ctx.save_for_backward(logits_TV, ids_T1, torch.stack([maximum, log_total], dim=1), entropy_T)
        return logprobs_T, entropy_T.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream_T: Tensor, entropy_upstream_T: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, ids_T1, normalisers_T2, entropy_T = saved_logits(ctx)
        plan: TokenPlan = ctx.plan
        grad_TV = torch.empty_like(logits_TV)
        held_TV, width = logits_TV[:, : plan.shard.width], plan.shard.width
        grad_TV[:, width:].zero_()
        if not width:
            return grad_TV, None, None, None
        for c in plan.kernels.chunks(logits_TV, plan.chunk_tokens):
            plan.kernels.softmax_gradient_(
                grad_TV[c, :width],
                held_TV[c],
                normalisers_T2[c],
                -upstream_T[c],
                entropy_upstream_T[c],
                entropy_T[c],
                plan.inverse_temperature,
            )
        # The token's own column, written whole: adding the one-hot term to a bf16 gradient would round 1 - q away.
        columns_T1 = locate(ids_T1, plan.shard)
        mine_T1, columns_T1 = columns_T1 < width, columns_T1.clamp(max=width - 1)
        chosen_T1 = held_TV.gather(1, columns_T1).to(entropy_T.dtype) * plan.inverse_temperature
        log_q_T = (chosen_T1 - normalisers_T2[:, :1]).squeeze(1) - normalisers_T2[:, 1]
        own_T = -upstream_T * torch.expm1(log_q_T) - entropy_upstream_T * log_q_T.exp() * (log_q_T + entropy_T)
        own_T1 = (plan.inverse_temperature * own_T).unsqueeze(1).to(grad_TV.dtype)
        own_T1 = torch.where(mine_T1, own_T1, grad_TV.gather(1, columns_T1))
        # Not `scatter_`, which on a CPU takes a bf16 tensor through an fp32 copy of the whole.
        grad_TV[torch.arange(len(columns_T1), device=columns_T1.device), columns_T1.squeeze(1)] = own_T1.squeeze(1)
        return grad_TV, None, None, None


Estimator = Literal["k1", "k2", "k3"]
Direction = Literal["forward", "reverse"]
Source = Literal["student", "teacher"]

_REFUSED: dict[tuple[Direction, Source, Estimator], str] = {
    ("reverse", "student", "k3"): "its gradient is that of the forward KL. Use 'k1' or 'k2', or direction='forward'",
    ("forward", "student", "k1"): "its gradient is that of the reverse KL. Use 'k3', or direction='reverse'",
    ("forward", "student", "k2"): "its gradient is that of the reverse KL. Use 'k3', or direction='reverse'",
    ("forward", "teacher", "k2"): "its gradient under the teacher's samples is that of neither KL. Use 'k1' or 'k3'",
}
_NO_REVERSE_FROM_TEACHER = (
    "a log-ratio at tokens that the teacher wrote is no estimate of the reverse KL's gradient, which is an average over "
    "the student's own choices. Use distill_kl or distill_kl_topk at the teacher's prefixes, or sample a token from the "
    "student there"
)


class SampledTerms(NamedTuple):
    """Per-token results.

    Args:
        loss: back-propagates to an unbiased gradient of the divergence asked for. Its *value* need not mean anything.
        kl: an unbiased, non-negative estimate of that KL's value where the samples allow one (k3), nats, detached: of
            the reverse KL from student's tokens, of the forward KL from teacher's.
    """

    loss: Tensor
    kl: Tensor


def sampled_kl(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    direction: Direction,
    sampled_from: Source,
    estimator: Estimator,
) -> SampledTerms:
    """A KL from one sampled token per position, where its gradient is what its name says.

    With l = log q - log p at the token (q student, p teacher; k1, k2 and k3 after Schulman, "Approximating KL
    Divergence", 2020):

    | direction, tokens by | k1 | k2 | k3 |
    |---|---|---|---|
    | reverse, student | stop_gradient(l) log q, REINFORCE | l**2 / 2 | refused |
    | forward, student | refused | refused | e**-l + l - 1 |
    | forward, teacher | -l, cross-entropy on samples | refused | e**l - l - 1 |
    | reverse, teacher | refused | refused | refused |

    k1 of the student's tokens back-propagated as it stands has expected gradient 0, so there it serves as the reward of
    a policy gradient. The gradients of that form and of k2 are the same, token by token. The k3 forms weigh a token by
    a probability ratio, hence have heavy tails when the models are far apart.

    Args:
        student_logprobs: ``[...]``, of the written tokens, nats; with gradient.
        teacher_logprobs: ``[...]``, the same under the teacher.
        direction: which KL to descend on.
        sampled_from: who wrote the tokens.
        estimator: which estimator.

    Returns:
        SampledTerms.

    Raises:
        LossError: an unknown word, or a combination that descends on something else.
    """
    words = {
        "direction": (direction, Direction),
        "sampled_from": (sampled_from, Source),
        "estimator": (estimator, Estimator),
    }
    for name, (word, known) in words.items():
        if word not in get_args(known):
            raise LossError(f"{name} = {word!r}: must be one of {', '.join(map(repr, get_args(known)))}.")
    reason = _NO_REVERSE_FROM_TEACHER if (direction, sampled_from) == ("reverse", "teacher") else None
    reason = reason or _REFUSED.get((direction, sampled_from, estimator))
    if reason is not None:
        raise LossError(
            f"sampled_kl(direction={direction!r}, sampled_from={sampled_from!r}, estimator={estimator!r}): refused: {reason}."
        )
    gap = student_logprobs - teacher_logprobs.detach()
    other = gap if sampled_from == "teacher" else -gap
    k3 = torch.expm1(other) - other
    if estimator == "k3":
        loss = k3
    elif estimator == "k2":
        loss = gap.square() / 2
    else:
        loss = -gap if direction == "forward" else gap.detach() * student_logprobs
    return SampledTerms(loss, k3.detach())


def log_ratio_reward(student_logprobs: Tensor, teacher_logprobs: Tensor, *, clip_nats: float | None = None) -> Tensor:
    """``log p - log q`` of every token that the student wrote, detached: the reward whose policy gradient is the reverse KL's.

    For use as (part of) an advantage in ``policy_gradient_loss``. Unclipped it is unbiased but unbounded: single tokens
    reach -50 and drown a batch. Clipping bounds that and biases the gradient at the clipped tokens only.

    Args:
        student_logprobs, teacher_logprobs: ``[...]``, nats.
        clip_nats: largest magnitude, or None.

    Returns:
        ``[...]``, nats, without gradient.

    Raises:
        LossError: a clip that is not positive.
    """
    if clip_nats is not None and not clip_nats > 0:
        raise LossError(
            f"clip_nats = {clip_nats}: must be positive. It bounds the reward's magnitude. Use None for no bound."
        )
    reward = (teacher_logprobs - student_logprobs).detach()
    return reward if clip_nats is None else reward.clamp(-clip_nats, clip_nats)
