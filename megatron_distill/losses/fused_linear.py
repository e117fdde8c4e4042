"""The KL between two models given as hidden states and output heads: neither model's logits are ever held whole.

In: both models' last hidden states, and each model's head, sharded by columns of the vocabulary. Out: ``KLTerms``, with
gradients to the student's hidden states and head. Logits exist for one chunk of tokens at a time: once in the forward, for
their statistics, and again in the backward, where the gradient replaces them. That costs one more product with each head
than the unfused loss, and saves both logits tensors; at 152k columns these are what runs out of memory first. Collectives
are one per chunk, forward and backward, each under way while the next products are computed.

The heads must be plain products with a ``[V, H]`` matrix, without bias, scaling or softcap.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.errors import LossError
from megatron_distill.losses.backends import Backend, kernels_for
from megatron_distill.losses.first_order import first_order
from megatron_distill.losses.kl import (
    KLPlan,
    KLTerms,
    check_pair,
    inverse_temperature,
    local_statistics,
    mixed_loss,
    reverse_kl_weights,
    saved_logits,
    summarise,
    write_gradient,
)
from megatron_distill.losses.shards import StopTokenGroups, start_exchange, vocab_shards

# Bytes of one model's logits of a chunk: large enough that the products with the heads run at full speed.
_CHUNK_LOGIT_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
# Rows of a bf16 head whose gradient is computed at a time: enough for the product's full speed, little memory.
_HEAD_ROWS = 4096


def fused_linear_distill_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    reverse_kl_weight: float | Tensor,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    stop_token_groups: StopTokenGroups | None = None,
    chunk_tokens: int | None = None,
    backend: Backend | None = None,
    reduce_hidden_grad: bool = True,
) -> KLTerms:
    """``distill_kl(student_hidden @ student_head.T, teacher_hidden @ teacher_head.T, ...)`` in a chunk's memory.

    Args:
        student_hidden: ``[..., H]``, the same on every tensor-parallel rank; with gradient.
        student_head: ``[V, H]``, this rank's rows of the output matrix; with gradient (summed over chunks in fp32).
        teacher_hidden: ``[..., H']`` for the same tokens; H' may differ from H. No gradient.
        teacher_head: ``[V', H']``, this rank's rows. No gradient.
        reverse_kl_weight, temperature, tp_group, vocab_size, stop_token_groups, backend: as in ``distill_kl``.
        chunk_tokens: tokens whose logits exist at a time; None picks by device.
        reduce_hidden_grad: True sums the hidden states' gradient over the ranks (one collective, backward), so that it is
            whole. False leaves this rank's part: for hidden states that come out of a Megatron mapping whose own
            backward sums, such as ``copy_to_tensor_model_parallel_region``, or the gather of sequence parallelism.

    Returns:
        KLTerms in fp32 (fp64 for fp64 hidden states).

    Raises:
        LossError: hidden states and heads that do not fit, or as in ``distill_kl``.
    """
    check_pair(student_hidden, teacher_hidden)
    for name, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if head.dim() != 2 or head.shape[1] != hidden.shape[-1]:
            raise LossError(
                f"{name}_head = {tuple(head.shape)}: must be [V, {hidden.shape[-1]}], as {name}_hidden has "
                f"{hidden.shape[-1]} features. The logits are hidden @ head.T. Pass the output matrix as Megatron holds it."
            )
    num_features = student_head.shape[1]
    shards = vocab_shards(
        student_head.shape[0], teacher_head.shape[0], tp_group, vocab_size, stop_token_groups, student_hidden.device
    )
    chunk = chunk_tokens or default_chunk_tokens(student_head)
    terms = _FusedLinearKL.apply(
        student_hidden.reshape(-1, num_features),
        student_head,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_head.detach(),
        reverse_kl_weights(reverse_kl_weight, student_hidden),
        KLPlan(
            shards, inverse_temperature(temperature), chunk, kernels_for(student_hidden, backend), grad_in_place=True
        ),
        tp_group,
        reduce_hidden_grad,
    )
    return KLTerms(*(term.view(student_hidden.shape[:-1]) for term in terms))


def default_chunk_tokens(head: Tensor) -> int:
    """Tokens whose logits, under a head ``[V, H]``, are worth making at a time on its device."""
    budget = _CHUNK_LOGIT_BYTES.get(head.device.type, _CHUNK_LOGIT_BYTES["cuda"])
    return max(1, budget // (4 * head.shape[0]))


def add_product_(total_VH: Tensor, logits_grad_TV: Tensor, hidden_TH: Tensor) -> None:
    """``total += logits_grad.T @ hidden`` without a second buffer of the head's size.

    In one dtype the product accumulates where the sum is. A bf16 product is added to an fp32 sum some rows at a time.
    """
    if total_VH.dtype == hidden_TH.dtype:
        total_VH.addmm_(logits_grad_TV.T, hidden_TH)
        return
    for start in range(0, total_VH.shape[0], _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        total_VH[rows] += logits_grad_TV[:, rows].T @ hidden_TH


class _FusedLinearKL(torch.autograd.Function):
    """Per chunk: logits, statistics, forget. Backward: logits again, gradient over them, two products."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        head_VH: Tensor,
        teacher_hidden_TH: Tensor,
        teacher_head_VH: Tensor,
        weight_T: Tensor,
        plan: KLPlan,
        tp_group: dist.ProcessGroup | None,
        reduce_hidden_grad: bool,
    ) -> tuple[Tensor, ...]:
        # Each chunk's exchange is under way while the next chunk's logits are computed.
        pending = []
        for c in plan.chunks(hidden_TH):
            student_TV, teacher_TV = hidden_TH[c] @ head_VH.T, teacher_hidden_TH[c] @ teacher_head_VH.T
            pending.append(start_exchange(*local_statistics(student_TV, teacher_TV, plan), tp_group))
        summary = summarise([exchanged.wait() for exchanged in pending], plan.shards)
        loss_T = mixed_loss(weight_T, summary.reverse_kl_T, summary.forward_kl_T)
        ctx.plan, ctx.tp_group, ctx.reduce_hidden_grad = plan, tp_group, reduce_hidden_grad
        ctx.save_for_backward(
            hidden_TH,
            head_VH,
            teacher_hidden_TH,
            teacher_head_VH,
            weight_T,
            summary.normalisers_T5,
            summary.student_outcomes_TO,
            summary.teacher_outcomes_TO,
        )
        return loss_T, *summary.reported(ctx)

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream_T: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, head_VH, teacher_hidden_TH, teacher_head_VH, weight_T, *summary = saved_logits(ctx)
        plan: KLPlan = ctx.plan
        hidden_grad = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        # In fp32, or a bf16 sum over chunks would drop the later ones' small terms.
        head_grad = torch.zeros_like(head_VH, dtype=weight_T.dtype) if ctx.needs_input_grad[1] else None
        reduced: list[dist.Work] = []
        for c in plan.chunks(hidden_TH):
            logits_TV = hidden_TH[c] @ head_VH.T
            teacher_TV = teacher_hidden_TH[c] @ teacher_head_VH.T
            normalisers, student_outcomes, teacher_outcomes = (part[c] for part in summary)
            outcomes = (normalisers, student_outcomes, teacher_outcomes)
            write_gradient(logits_TV, logits_TV, teacher_TV, outcomes, weight_T[c], upstream_T[c], plan)
            if hidden_grad is not None:
                torch.mm(logits_TV, head_VH, out=hidden_grad[c])
                if ctx.reduce_hidden_grad and ctx.tp_group is not None and ctx.tp_group.size() > 1:
                    reduced.append(dist.all_reduce(hidden_grad[c], group=ctx.tp_group, async_op=True))
            if head_grad is not None:
                add_product_(head_grad, logits_TV, hidden_TH[c])
        for work in reduced:
            work.wait()
        head_grad = None if head_grad is None else head_grad.to(head_VH.dtype)
        return hidden_grad, head_grad, None, None, None, None, None, None
