"""The policy-gradient loss of the reinforcement stage: clipped, importance-weighted, with an optional reference KL.

In: log-probabilities of the written tokens (``vocab_parallel_logprobs`` for the trainer's, which carry the gradient; the
rest are data) and an advantage per token. Out: a ``PolicyTerms`` per token. Masks, sums and the division by a token or
sequence count are the caller's: they decide between GRPO, DAPO and Dr. GRPO, and belong where global counts are known.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_distill.errors import LossError


class PolicyTerms(NamedTuple):
    """Per-token results; ``loss`` alone has gradients.

    Args:
        loss: what to minimise.
        ratio: probability of the token now over its probability when the rollout was scored.
        clipped: 1.0 where the clip removed the token's policy gradient, else 0.0.
        ref_kl: the k3 estimate of KL(student || reference), nats; 0 without a reference.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    ref_kl: Tensor


def policy_gradient_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    importance_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    ref_kl_coef: float = 0.0,
) -> PolicyTerms:
    """Clipped surrogate with GRPO's reference penalty, per token.

        rho  = exp(logprobs - old_logprobs)
        loss = -w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + ref_kl_coef k3
        k3   = exp(ref - logprobs) - (ref - logprobs) - 1

    PPO's clip (arXiv 1707.06347), group-relative advantages and k3 penalty as in GRPO (arXiv 2402.03300, eq. 3 and 4);
    clip_high > clip_low is DAPO's clip-higher (arXiv 2503.14476), which leaves unlikely tokens room to rise.

    The gradient of k3 is, in expectation over the student's samples, that of the *forward* KL(reference || student), as
    ``sampled_kl`` explains. It is kept here because it is what GRPO trains with; its fixed point is the same.

    Args:
        logprobs: ``[...]``, log-probabilities under the student being trained, nats; with gradient.
        old_logprobs: ``[...]``, the same under the student as it was when the step's rollouts were scored by the trainer.
            Pass ``logprobs.detach()`` for one optimizer step per batch of rollouts.
        advantages: ``[...]``, one per token.
        clip_low, clip_high: how far the ratio may fall below and rise above 1 before its gain stops counting.
        importance_weights: ``[...]``, constants that correct for a sampler whose log-probabilities differ from the
            trainer's; see ``truncated_importance_weights``. None for 1.
        ref_logprobs: ``[...]``, log-probabilities under the reference model, nats.
        ref_kl_coef: weight of the penalty.

    Returns:
        PolicyTerms.

    Raises:
        LossError: a negative clip or coefficient, ``clip_low`` of 1 or more, a coefficient without reference, or shapes
            that differ.
    """
    _check(clip_low, clip_high, ref_kl_coef, ref_logprobs)
    named = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "importance_weights": importance_weights,
        "ref_logprobs": ref_logprobs,
    }
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise LossError(
                f"{name} = {tuple(tensor.shape)}: must be {tuple(logprobs.shape)}, like logprobs. Broadcasting would pair "
                f"tokens with the wrong values. Expand {name} to one value per token."
            )
    advantages = advantages.detach()
    ratio = (logprobs - old_logprobs.detach()).exp()
    free = ratio * advantages
    held = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -torch.minimum(free, held)
    if importance_weights is not None:
        loss = loss * importance_weights.detach()
    ref_kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        gap = ref_logprobs.detach() - logprobs
        ref_kl = torch.expm1(gap) - gap
        if ref_kl_coef:
            loss = loss + ref_kl_coef * ref_kl
    return PolicyTerms(loss, ratio.detach(), (held < free).to(ratio.dtype).detach(), ref_kl.detach())


def _check(clip_low: float, clip_high: float, ref_kl_coef: float, ref_logprobs: Tensor | None) -> None:
    """Refuse settings that are not a clip or a penalty."""
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise LossError(
            f"clip_low = {clip_low}, clip_high = {clip_high}: need 0 <= clip_low < 1 and clip_high >= 0. The ratio is kept "
            "within [1 - clip_low, 1 + clip_high]. Use 0.2 and 0.2 (PPO), or 0.2 and 0.28 (DAPO)."
        )
    if ref_kl_coef < 0 or (ref_kl_coef > 0 and ref_logprobs is None):
        raise LossError(
            f"ref_kl_coef = {ref_kl_coef}: must be >= 0, and needs ref_logprobs when positive. It weights the distance to "
            "the reference. Pass ref_logprobs, or ref_kl_coef=0.0."
        )


def truncated_importance_weights(trainer_logprobs: Tensor, sampler_logprobs: Tensor, *, max_weight: float) -> Tensor:
    """``min(exp(trainer - sampler), max_weight)`` of every token: corrects for tokens drawn by a slightly other student.

    An inference engine's kernels and stale weights make its distribution differ from the trainer's. The weight restores
    the expectation, truncation bounds the variance at the price of a bias towards the sampler.

    Args:
        trainer_logprobs, sampler_logprobs: ``[...]``, nats, of the same tokens under the trainer and the engine.
        max_weight: the cap; 2 is usual.

    Returns:
        ``[...]`` weights without gradient.

    Raises:
        LossError: the cap is not positive.
    """
    if not max_weight > 0:
        raise LossError(f"max_weight = {max_weight}: must be positive. It caps the importance weight. Use 2.0.")
    return (trainer_logprobs - sampler_logprobs).detach().exp().clamp(max=max_weight)
