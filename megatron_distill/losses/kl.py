"""KL divergences over a vocabulary that is sharded across tensor-parallel ranks: forward, reverse and every mix.

In: the two models' logits for the same tokens, each rank holding its own columns. Out: a ``KLTerms`` per token, whose ``loss``
has gradients to the student. One pass over the logits, one collective forward, none backward; 24 bytes per token are
saved for the backward (and 8 per stop-token group), whatever the vocabulary.

**Convention: the loss is replicated.** Every tensor-parallel rank computes the same value of the same loss, and there is
*one* such loss. A rank's gradient is the gradient of that one loss to that rank's columns, so nothing is to be summed
over ranks, and nothing is multiplied by their number. Average over data-parallel ranks only.

    terms = distill_kl(student_logits, teacher_logits, reverse_kl_weight=0.2, tp_group=group, vocab_size=151_669)
    (terms.loss * mask).sum().backward()
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.errors import LossError
from megatron_distill.losses.backends import NATIVE_DTYPES, Backend, Kernels, kernels_for
from megatron_distill.losses.first_order import first_order
from megatron_distill.losses.kernels import (
    compute_dtype,
    kl_gradient_,
    kl_statistics,
    merge_statistics,
    weighted,
)
from megatron_distill.losses.shards import StopTokenGroups, VocabShards, exchange, vocab_shards


class KLTerms(NamedTuple):
    """Per-token results, each shaped like the logits without their last dimension.

    Args:
        loss: what to minimise; the only field with gradients.
        forward_kl: KL(teacher || student), nats.
        reverse_kl: KL(student || teacher), nats.
        student_entropy, teacher_entropy: nats, of the distributions that the loss compares: at its temperature and with
            each stop-token group as one outcome.
    """

    loss: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


class KLSummary(NamedTuple):
    """What the vocabulary of each token came to, the same on every rank.

    Args:
        normalisers_T5: see ``kl_gradient_``.
        forward_kl_T, student_entropy_T, teacher_entropy_T: nats.
        student_outcomes_TO, teacher_outcomes_TO: logits of the outcomes made of extras.
    """

    normalisers_T5: Tensor
    forward_kl_T: Tensor
    student_entropy_T: Tensor
    teacher_entropy_T: Tensor
    student_outcomes_TO: Tensor
    teacher_outcomes_TO: Tensor

    @property
    def reverse_kl_T(self) -> Tensor:
        """The last of the normalisers, nats."""
        return self.normalisers_T5[:, 4]

    def reported(self, ctx: Any) -> tuple[Tensor, ...]:
        """What ``KLTerms`` holds besides the loss, as outputs of ``ctx``'s function that have no gradient."""
        terms = (self.forward_kl_T, self.reverse_kl_T.clone(), self.student_entropy_T, self.teacher_entropy_T)
        ctx.mark_non_differentiable(*terms)
        return terms


def distill_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    reverse_kl_weight: float | Tensor,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    stop_token_groups: StopTokenGroups | None = None,
    chunk_tokens: int | None = None,
    backend: Backend | None = None,
    grad_in_place: bool = False,
) -> KLTerms:
    """``w KL(student || teacher) + (1 - w) KL(teacher || student)`` of every token, over the whole vocabulary.

    The linear mix of arXiv 2605.16826: w = 1 is the objective of on-policy distillation, w = 0 that of training on soft
    targets. In logits the gradient is ``w q ((log q - log p) - KL(q||p)) + (1 - w) (q - p)``. No factor temperature**2
    is applied: multiply the loss by it to keep gradients comparable across temperatures.

    A token that only the teacher rules out (logit -inf) makes the reverse KL infinite, and infinity is what is reported;
    one that both rule out costs nothing. NaN in either model's logits becomes NaN in that token's loss.

    Args:
        student_logits: ``[..., V]``, this rank's columns; bf16, fp16, fp32 or fp64. Arithmetic is fp32 (fp64 for fp64).
        teacher_logits: ``[..., V']`` for the same tokens. V' may differ from V: give ``vocab_size`` then. No gradient.
        reverse_kl_weight: w in [0, 1]: one number, or a tensor with one per token.
        temperature: divides both models' logits.
        tp_group: the tensor-parallel group that the columns are sharded over, rank r holding columns [r V, (r + 1) V);
            None when this rank holds them all.
        vocab_size: number of tokens that exist; columns from there on are padding, on whichever rank they are. None when
            nothing is padded.
        stop_token_groups: ids that are one action, such as ((151643, 151645),). Each group's probability is summed in
            both models before they are compared, so which member ends a response costs nothing.
        chunk_tokens: tokens per chunk of intermediates; None picks by device. Changes memory and speed, not results.
        backend: who does the arithmetic; None picks by device (see ``backends``). Changes speed, not results.
        grad_in_place: write the student's gradient over its logits during the backward, which saves a buffer of their
            size. Nothing else may need the logits by then; autograd raises if something does.

    Returns:
        KLTerms, in the compute dtype.

    Raises:
        LossError: a weight outside [0, 1], a temperature that is not positive, shapes that do not fit, or a fault named
            in ``vocab_shards``. In the backward: the logits were overwritten after the loss was taken.
    """
    check_pair(student_logits, teacher_logits)
    num_columns = student_logits.shape[-1]
    student_TV, teacher_TV = (
        student_logits.reshape(-1, num_columns),
        teacher_logits.reshape(-1, teacher_logits.shape[-1]),
    )
    if grad_in_place and not student_logits.is_contiguous():
        raise LossError(
            "grad_in_place = True: student_logits must be contiguous. The gradient takes their place in memory. "
            "Pass student_logits.contiguous(), or grad_in_place=False."
        )
    shards = vocab_shards(
        num_columns, teacher_TV.shape[1], tp_group, vocab_size, stop_token_groups, student_logits.device
    )
    inverse, kernels = inverse_temperature(temperature), kernels_for(student_logits, backend)
    plan = KLPlan(shards, inverse, chunk_tokens, kernels, grad_in_place)
    weight_T = reverse_kl_weights(reverse_kl_weight, student_logits)
    terms = _DistillKL.apply(student_TV, teacher_TV.detach(), weight_T, plan, tp_group)
    return KLTerms(*(term.view(student_logits.shape[:-1]) for term in terms))


class KLPlan(NamedTuple):
    """How one call walks over its tokens: the arguments of ``distill_kl``, resolved."""

    shards: VocabShards
    inverse_temperature: float
    chunk_tokens: int | None
    kernels: Kernels
    grad_in_place: bool

    def chunks(self, logits_TV: Tensor) -> list[slice]:
        """Slices of tokens to work through."""
        return self.kernels.chunks(logits_TV, self.chunk_tokens)


def check_pair(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuse logits that are not about the same tokens, or not of a place and kind that kernels read side by side.

    Raises:
        LossError: see ``distill_kl``.
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise LossError(
            f"teacher_logits = {tuple(teacher_logits.shape)}: must match student_logits {tuple(student_logits.shape)} in "
            "all but the last dimension. The loss compares the two models token by token. Align the teacher's tokens."
        )
    if student_logits.device != teacher_logits.device:
        raise LossError(
            f"teacher_logits = on {teacher_logits.device}: must be where student_logits are, on {student_logits.device}. "
            "Kernels read both. Move one of them."
        )
    if teacher_logits.dtype not in (*NATIVE_DTYPES, student_logits.dtype):
        raise LossError(
            f"teacher_logits = of {teacher_logits.dtype}: must be bf16, fp16 or fp32, or float64 beside a float64 student. The "
            f"arithmetic is the student's, of {student_logits.dtype}. Convert the teacher's."
        )


def inverse_temperature(temperature: float) -> float:
    """1 / temperature as a number, which is what kernels take.

    Raises:
        LossError: it is not positive, or a tensor that would have a gradient.
    """
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise LossError("temperature = a tensor that requires a gradient: it gets none here. Pass a number.")
    if not temperature > 0:
        raise LossError(
            f"temperature = {temperature}: must be positive. It divides the logits. Use 1.0 for the plain distributions."
        )
    return 1.0 / float(temperature)


def reverse_kl_weights(weight: float | Tensor, logits: Tensor) -> Tensor:
    """The reverse-KL weight of every token, ``[T]`` in the compute dtype.

    Raises:
        LossError: a number outside [0, 1], or a tensor that is not one per token.
    """
    shape = logits.shape[:-1]
    if isinstance(weight, Tensor):
        if weight.shape != shape:
            raise LossError(
                f"reverse_kl_weight = a tensor of shape {tuple(weight.shape)}: must be {tuple(shape)}, one weight per "
                "token. Expand it, or pass a number."
            )
        return weight.detach().reshape(-1).to(compute_dtype(logits))
    if not 0.0 <= weight <= 1.0:
        raise LossError(
            f"reverse_kl_weight = {weight}: must lie in [0, 1]. It weights KL(student||teacher); the rest weights "
            "KL(teacher||student). Use 0.0 for forward KL alone, 1.0 for reverse KL alone."
        )
    return torch.full((shape.numel(),), weight, dtype=compute_dtype(logits), device=logits.device)


def local_statistics(student_TV: Tensor, teacher_TV: Tensor, plan: KLPlan) -> tuple[Tensor, Tensor]:
    """One chunk's statistics ``[T, 8]`` over this rank's core, and its share of both models' extras, ``[T, 2 X]``."""
    shards, dtype = plan.shards, compute_dtype(student_TV)
    core_z, core_t = student_TV[:, shards.student.core], teacher_TV[:, shards.teacher.core]
    if core_z.shape[1]:
        stats_TS = plan.kernels.kl_statistics(core_z, core_t, shards.core_excluded, plan.inverse_temperature)
    else:  # A rank that holds padding only still takes part in the exchange.
        stats_TS = _statistics_of_nothing(student_TV.shape[0], dtype, student_TV.device)
    pairs = ((student_TV, shards.student), (teacher_TV, shards.teacher))
    extras = [shards.extras(logits, held, plan.inverse_temperature, dtype) for logits, held in pairs]
    return stats_TS, torch.cat(extras, dim=1)


def _statistics_of_nothing(num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``kl_statistics`` over no columns: maxima of -inf, sums of 0."""
    row = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=dtype, device=device)
    return row.expand(num_tokens, -1)


def summarise_logits(
    student_TV: Tensor, teacher_TV: Tensor, plan: KLPlan, tp_group: dist.ProcessGroup | None
) -> KLSummary:
    """From logits to the KLs and entropies of every token, over all ranks and outcomes: all chunks, one exchange."""
    parts = [local_statistics(student_TV[c], teacher_TV[c], plan) for c in plan.chunks(student_TV)]
    stats_TS, extras_TX = (torch.cat(part) for part in zip(*parts, strict=True))
    return summarise([exchange(stats_TS, extras_TX, tp_group)], plan.shards)


def summarise(exchanged: Sequence[tuple[Tensor, Tensor]], shards: VocabShards) -> KLSummary:
    """From all chunks' exchanged ``local_statistics`` to the KLs and entropies of every token, over all ranks and outcomes.

    With A = sum e^a and B = sum e^b over the whole vocabulary, KL(q||p) = sum e^a (a - b) / A - (log A - log B) and
    H(q) = log A - sum e^a a / A, and likewise the other way round.
    """
    stats_RTS = torch.cat([stats for stats, _ in exchanged], dim=1)
    extras = torch.cat([columns for _, columns in exchanged])
    student_TO, teacher_TO = (shards.outcomes(part) for part in extras.tensor_split(2, dim=1))
    if shards.num_outcomes:
        outcome_stats = kl_statistics(student_TO, teacher_TO, None, 1.0)
        stats_RTS = torch.cat([stats_RTS, outcome_stats.unsqueeze(0)])
    max_z, sum_z, max_t, sum_t, z_gap, t_gap, z_self, t_self = merge_statistics(stats_RTS).unbind(dim=1)
    log_z, log_t = sum_z.log(), sum_t.log()
    reverse_kl = z_gap / sum_z - (log_z - log_t)
    return KLSummary(
        normalisers_T5=torch.stack([max_z, log_z, max_t, log_t, reverse_kl], dim=1),
        forward_kl_T=t_gap / sum_t - (log_t - log_z),
        student_entropy_T=log_z - z_self / sum_z,
        teacher_entropy_T=log_t - t_self / sum_t,
        student_outcomes_TO=student_TO,
        teacher_outcomes_TO=teacher_TO,
    )


def mixed_loss(weight_T: Tensor, reverse_kl_T: Tensor, forward_kl_T: Tensor) -> Tensor:
    """``w reverse + (1 - w) forward``, in which an infinite term of weight 0 counts as 0."""
    return weighted(weight_T, reverse_kl_T) + weighted(1 - weight_T, forward_kl_T)


def write_gradient(
    out_TV: Tensor,
    student_TV: Tensor,
    teacher_TV: Tensor,
    summary: tuple[Tensor, Tensor, Tensor],
    weight_T: Tensor,
    upstream_T: Tensor,
    plan: KLPlan,
) -> None:
    """Write one chunk's gradient to all of this rank's student columns into ``out_TV``, which may be ``student_TV``.

    Args:
        summary: ``normalisers_T5``, ``student_outcomes_TO``, ``teacher_outcomes_TO`` of the chunk.
        weight_T, upstream_T: as in ``kl_gradient_``.
    """
    shards, held = plan.shards, plan.shards.student
    normalisers_T5 = summary[0]
    extras = outcome_gradient(student_TV, summary, weight_T, upstream_T, plan)
    core_out = out_TV[:, held.core]
    core_in = core_out if out_TV is student_TV else student_TV[:, held.core]
    if core_out.shape[1]:
        core_t = teacher_TV[:, shards.teacher.core]
        rows = (normalisers_T5, weight_T, upstream_T, plan.inverse_temperature)
        plan.kernels.kl_gradient_(core_out, core_in, core_t, *rows)
    out_TV[:, : held.core.start].zero_()
    out_TV[:, held.core.stop :].zero_()
    if extras is not None:
        out_TV[:, held.columns] = extras.to(out_TV.dtype)


def outcome_gradient(
    student_TV: Tensor, summary: tuple[Tensor, Tensor, Tensor], weight_T: Tensor, upstream_T: Tensor, plan: KLPlan
) -> Tensor | None:
    """Gradient to the extras held here, ``[T, n]``, if there are any."""
    if not plan.shards.student.columns.numel():
        return None
    normalisers_T5, student_TO, teacher_TO = summary
    by_outcome_TO = torch.empty_like(student_TO)
    kl_gradient_(by_outcome_TO, student_TO, teacher_TO, normalisers_T5, weight_T, upstream_T, 1.0)
    return shared_among_members(by_outcome_TO, student_TV, student_TO, plan)


def shared_among_members(by_outcome_TO: Tensor, student_TV: Tensor, student_TO: Tensor, plan: KLPlan) -> Tensor:
    """Gradient to the extras held here, ``[T, n]``: their outcome's, times the column's share of its probability."""
    held = plan.shards.student
    owner = plan.shards.outcome_of_extra[held.places]
    columns = student_TV[:, held.columns].to(student_TO.dtype) * plan.inverse_temperature
    share = (columns - as_normaliser(student_TO[:, owner])).exp()
    return weighted(share, by_outcome_TO[:, owner]) * plan.inverse_temperature


def as_normaliser(outcome: Tensor) -> Tensor:
    """An outcome's logit as a normaliser of its members: +inf (so that shares are 0) where the whole outcome is ruled out."""
    return torch.where(outcome == -torch.inf, torch.inf, outcome)


def saved_logits(ctx: Any) -> tuple[Tensor, ...]:
    """``ctx.saved_tensors``, or an error that names the usual culprit.

    Autograd compares each tensor's version counter with the one it had when it was saved.

    Raises:
        LossError: the logits were written to in between.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise LossError(
            "logits = overwritten: they changed between the loss and its backward. Megatron's "
            "vocab_parallel_cross_entropy turns fp32 logits into probabilities in place, and grad_in_place=True writes "
            "the gradient there. Give the other loss logits.clone(), or set grad_in_place=False."
        ) from error


class _DistillKL(torch.autograd.Function):
    """Statistics chunk by chunk, one exchange, and a backward from logits and normalisers alone."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TV: Tensor,
        teacher_TV: Tensor,
        weight_T: Tensor,
        plan: KLPlan,
        tp_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, ...]:
        summary = summarise_logits(student_TV, teacher_TV, plan, tp_group)
        loss_T = mixed_loss(weight_T, summary.reverse_kl_T, summary.forward_kl_T)
        ctx.plan = plan
        ctx.save_for_backward(
            student_TV,
            teacher_TV,
            weight_T,
            summary.normalisers_T5,
            summary.student_outcomes_TO,
            summary.teacher_outcomes_TO,
        )
        return loss_T, *summary.reported(ctx)

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream_T: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student_TV, teacher_TV, weight_T, *summary = saved_logits(ctx)
        plan: KLPlan = ctx.plan
        grad_TV = student_TV.detach() if plan.grad_in_place else torch.empty_like(student_TV)
        for c in plan.chunks(student_TV):
            out = grad_TV[c]
            logits = out if plan.grad_in_place else student_TV[c]
            normalisers, student_outcomes, teacher_outcomes = (part[c] for part in summary)
            write_gradient(
                out,
                logits,
                teacher_TV[c],
                (normalisers, student_outcomes, teacher_outcomes),
                weight_T[c],
                upstream_T[c],
                plan,
            )
        return grad_TV, None, None, None, None
