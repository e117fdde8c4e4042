"""Divergences to a mixture of teacher and student: generalised Jensen-Shannon and skew KL.

In and out as in ``kl``, whose statistics, exchange and conventions they share. The mixture needs both normalisers before its
own sum over the vocabulary can start: two passes and two collectives forward, one pass and none backward.

Unlike the plain KLs these are bounded: a token that one model rules out costs at most a constant.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.errors import LossError
from megatron_distill.losses.backends import Backend, kernels_for
from megatron_distill.losses.first_order import first_order
from megatron_distill.losses.kernels import Mixture, mixture_gradient_, mixture_statistics
from megatron_distill.losses.kl import (
    KLPlan,
    KLTerms,
    check_pair,
    inverse_temperature,
    saved_logits,
    shared_among_members,
    summarise_logits,
)
from megatron_distill.losses.shards import StopTokenGroups, vocab_shards


def distill_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    teacher_weight: float = 0.5,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    stop_token_groups: StopTokenGroups | None = None,
    chunk_tokens: int | None = None,
    backend: Backend | None = None,
) -> KLTerms:
    """Generalised Jensen-Shannon divergence of every token (arXiv 2306.13649, eq. 1).

        JSD = b KL(p || m) + (1 - b) KL(q || m),   m = b p + (1 - b) q,   b = teacher_weight

    Divided by b it tends to the forward KL as b -> 0; divided by 1 - b, to the reverse KL as b -> 1.

    Args:
        teacher_weight: b in (0, 1).
        student_logits, teacher_logits, temperature, tp_group, vocab_size, stop_token_groups, chunk_tokens, backend:
            as in ``distill_kl``.

    Returns:
        KLTerms; the two KLs and entropies come from the same statistics.

    Raises:
        LossError: ``teacher_weight`` outside (0, 1), or as in ``distill_kl``.
    """
    _check_open_interval("teacher_weight", teacher_weight)
    mixture = Mixture(p_weight=teacher_weight, q_weight=1 - teacher_weight, p_share=teacher_weight)
    options = (temperature, tp_group, vocab_size, stop_token_groups, chunk_tokens, backend)
    return _mixture_divergence(student_logits, teacher_logits, mixture, *options)


def distill_skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    reverse: bool,
    skew: float = 0.1,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    stop_token_groups: StopTokenGroups | None = None,
    chunk_tokens: int | None = None,
    backend: Backend | None = None,
) -> KLTerms:
    """Skew KL of every token (DistiLLM, arXiv 2402.03898, section 3.1): the second argument leans towards the first.

        forward: KL(p || a p + (1 - a) q)        reverse: KL(q || a q + (1 - a) p),   a = skew

    Args:
        reverse: which of the two.
        skew: a in (0, 1); small values stay close to the plain KL while bounding it by -log a.
        student_logits, teacher_logits, temperature, tp_group, vocab_size, stop_token_groups, chunk_tokens, backend:
            as in ``distill_kl``.

    Returns:
        KLTerms; its two KLs are the plain ones.

    Raises:
        LossError: ``skew`` outside (0, 1), or as in ``distill_kl``.
    """
    _check_open_interval("skew", skew)
    mixture = Mixture(0.0, 1.0, 1 - skew) if reverse else Mixture(1.0, 0.0, skew)
    options = (temperature, tp_group, vocab_size, stop_token_groups, chunk_tokens, backend)
    return _mixture_divergence(student_logits, teacher_logits, mixture, *options)


def _check_open_interval(name: str, value: float) -> None:
    """Refuse the ends, where the divergence is a plain KL or nothing at all."""
    if not 0.0 < value < 1.0:
        raise LossError(
            f"{name} = {value}: must lie strictly between 0 and 1. At the ends the mixture is one of the two models and the "
            "divergence a plain KL, or zero. Use distill_kl for the plain ones."
        )


def _mixture_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mixture: Mixture,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int | None,
    stop_token_groups: StopTokenGroups | None,
    chunk_tokens: int | None,
    backend: Backend | None,
) -> KLTerms:
    check_pair(student_logits, teacher_logits)
    student_TV = student_logits.reshape(-1, student_logits.shape[-1])
    teacher_TV = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])
    widths = (student_TV.shape[1], teacher_TV.shape[1])
    shards = vocab_shards(*widths, tp_group, vocab_size, stop_token_groups, student_logits.device)
    inverse, kernels = inverse_temperature(temperature), kernels_for(student_logits, backend)
    plan = KLPlan(shards, inverse, chunk_tokens, kernels, grad_in_place=False)
    terms = _MixtureDivergence.apply(student_TV, teacher_TV, mixture, plan, tp_group)
    return KLTerms(*(term.view(student_logits.shape[:-1]) for term in terms))


class _MixtureDivergence(torch.autograd.Function):
    """Normalisers first (``summarise``), then the mixture's own two sums; the backward is elementwise from both."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TV: Tensor,
        teacher_TV: Tensor,
        mixture: Mixture,
        plan: KLPlan,
        tp_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, ...]:
        shards = plan.shards
        summary = summarise_logits(student_TV, teacher_TV, plan, tp_group)
        normalisers_T5 = summary.normalisers_T5
        sums_T2 = normalisers_T5.new_zeros(student_TV.shape[0], 2)
        core_z, core_t = student_TV[:, shards.student.core], teacher_TV[:, shards.teacher.core]
        for c in plan.chunks(student_TV) if core_z.shape[1] else ():
            sums_T2[c] = plan.kernels.mixture_statistics(
                core_z[c], core_t[c], shards.core_excluded, normalisers_T5[c], mixture, plan.inverse_temperature
            )
        if tp_group is not None and tp_group.size() > 1:
            dist.all_reduce(sums_T2, group=tp_group)
        outcomes = (summary.student_outcomes_TO, summary.teacher_outcomes_TO)
        if shards.num_outcomes:
            sums_T2 = sums_T2 + mixture_statistics(*outcomes, None, normalisers_T5, mixture, 1.0)
        loss_T, mean_slope_T = (part.clone() for part in sums_T2.unbind(dim=1))
        ctx.mixture, ctx.plan = mixture, plan
        ctx.save_for_backward(student_TV, teacher_TV, mean_slope_T, normalisers_T5, *outcomes)
        return loss_T, *summary.reported(ctx)

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream_T: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student_TV, teacher_TV, mean_slope_T, normalisers_T5, student_TO, teacher_TO = saved_logits(ctx)
        plan, mixture = ctx.plan, ctx.mixture
        held, inverse_temperature = plan.shards.student, plan.inverse_temperature
        grad_TV = torch.empty_like(student_TV)
        grad_TV[:, : held.core.start].zero_()
        grad_TV[:, held.core.stop :].zero_()
        core_out, core_z = grad_TV[:, held.core], student_TV[:, held.core]
        core_t = teacher_TV[:, plan.shards.teacher.core]
        for c in plan.chunks(student_TV) if core_z.shape[1] else ():
            rows = (normalisers_T5[c], mean_slope_T[c], upstream_T[c], mixture, inverse_temperature)
            plan.kernels.mixture_gradient_(core_out[c], core_z[c], core_t[c], *rows)
        if held.columns.numel():
            by_outcome_TO = torch.empty_like(student_TO)
            rows = (normalisers_T5, mean_slope_T, upstream_T, mixture, 1.0)
            mixture_gradient_(by_outcome_TO, student_TO, teacher_TO, *rows)
            extras = shared_among_members(by_outcome_TO, student_TV, student_TO, plan)
            grad_TV[:, held.columns] = extras.to(grad_TV.dtype)
        return grad_TV, None, None, None, None
