"""The loss of a micro-batch from hidden states: logits exist for a chunk of response tokens at a time.

In: hidden rows and heads of the student and of the models beside it. Out: what ``Objective`` reports of them all, whose
loss has gradients to the student's rows and head.

    chunk by chunk:   rows @ head.T -> logits [C, V/tp] -> objective, any components -> gradient [C, V/tp] -> two products:
                      the rows' gradient [C, H], and a term of the head's [V/tp, H]

A loss is a sum over tokens, divided by counts of the whole step, so the cut changes rounding only. Each chunk's gradient is
taken at once, while its logits exist: no product is computed twice, and what lies between forward and backward is as
large as the rows and the head, however many tokens there are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_distill.errors import LossError
from megatron_distill.losses.first_order import first_order
from megatron_distill.losses.fused_linear import add_product_, default_chunk_tokens
from megatron_distill.losses.kernels import compute_dtype
from megatron_distill.rollouts.batches import MicroBatch
from megatron_distill.training.components import LogitTensors, SignalTensors, StepPlan
from megatron_distill.training.objective import LossReport, Objective, probe


@dataclass(frozen=True)
class HiddenTensors:
    """What a model says of a micro-batch's response tokens before its head: logits are made of it where they are needed.

    Attributes:
        hidden_TH: [T, H], the hidden states that predict the tokens, the same on every tensor-parallel rank.
        head_VH: [V/tp, H], this rank's rows of the output matrix, cut at the same columns for all models. H may differ from
            model to model.
        take_head_grad: does with the head's whole gradient what must be done, and returns what autograd is to have of it; None
            leaves it to autograd, and is a frozen model's.
    """

    hidden_TH: Tensor
    head_VH: Tensor
    take_head_grad: Callable[[Tensor], Tensor] | None = None

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """[C, V/tp] of some of the tokens, in the hidden states' dtype."""
        return self.hidden_TH[rows] @ self.head_VH.T


@dataclass(frozen=True)
class ChunkedHead:
    """An objective, and how many tokens it sees at a time.

    Attributes:
        objective: turns logits into a loss and metrics.
        chunk_tokens: response tokens whose logits exist at a time; 0 picks by device.
    """

    objective: Objective
    chunk_tokens: int = 0

    def __call__(
        self,
        student: HiddenTensors,
        batch: MicroBatch,
        plan: StepPlan,
        *,
        teacher: HiddenTensors | None = None,
        reference: HiddenTensors | None = None,
    ) -> LossReport:
        """One micro-batch.

        Args:
            student: with gradient. That of ``hidden_TH`` is this rank's columns' part, for whoever gave the rows to sum over
                tensor-parallel ranks.
            batch: everything else about the same tokens.
            plan: numbers that hold for the whole step.
            teacher: by default the signal that travelled with the batch is taken.
            reference: RL's reference model.
        """
        learns = torch.is_grad_enabled()
        gradients = _Gradients.of(student) if learns else None
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        num_tokens = batch.target_ids_T.numel()
        for rows in self._chunks(num_tokens, student.head_VH):
            report = self._chunk(rows, student, batch, plan, teacher, reference, gradients)
            losses.append(report.loss)
            sums |= {name: sums[name] + pair if name in sums else pair for name, pair in report.sums.items()}
        loss = torch.stack(losses).sum()
        if gradients is not None:
            known = (gradients.hidden_TH, gradients.head_VH, student.take_head_grad)
            loss = _Differentiated.apply(loss, student.hidden_TH, student.head_VH, *known)
        return LossReport(loss, sums)

    def _chunks(self, num_tokens: int, head_VH: Tensor) -> Iterator[slice]:
        """At least one: the tensor-parallel collectives of a rank without tokens are waited for."""
        size = self.chunk_tokens or default_chunk_tokens(head_VH)
        for start in range(0, max(num_tokens, 1), size):
            yield slice(start, min(start + size, num_tokens))

    def _chunk(
        self,
        rows: slice,
        student: HiddenTensors,
        batch: MicroBatch,
        plan: StepPlan,
        teacher: HiddenTensors | None,
        reference: HiddenTensors | None,
        gradients: "_Gradients | None",
    ) -> LossReport:
        """The report of some tokens, its gradient already where it belongs; all logits are gone when it returns."""
        with torch.no_grad():
            logits_CV = student.logits(rows)
            signal: SignalTensors | None = None if teacher is None else LogitTensors(teacher.logits(rows))
            reference_CV = None if reference is None else reference.logits(rows)
        logits_CV.requires_grad_(gradients is not None)
        every = probe(batch.target_ids_T.numel())
        probed = range(-rows.start % every.step, rows.stop - rows.start, every.step)
        report = self.objective(logits_CV, batch.at(rows), plan, signal, reference_CV, probed)
        if gradients is not None:
            (logits_grad_CV,) = torch.autograd.grad(report.loss, logits_CV)
            gradients.add_(rows, logits_grad_CV, student)
        return LossReport(report.loss.detach(), report.sums)


@dataclass(frozen=True)
class _Gradients:
    """Of the student's rows, and of its head, summed over chunks in fp32: a bf16 sum would drop the later ones' terms."""

    hidden_TH: Tensor
    head_VH: Tensor

    @classmethod
    def of(cls, student: HiddenTensors) -> "_Gradients":
        head_VH = student.head_VH.detach()
        return cls(
            torch.empty_like(student.hidden_TH, requires_grad=False),
            torch.zeros_like(head_VH, dtype=compute_dtype(head_VH)),
        )

    @torch.no_grad()
    def add_(self, rows: slice, logits_grad_CV: Tensor, student: HiddenTensors) -> None:
        """Take in one chunk."""
        torch.mm(logits_grad_CV, student.head_VH, out=self.hidden_TH[rows])
        add_product_(self.head_VH, logits_grad_CV, student.hidden_TH[rows])


class _Differentiated(torch.autograd.Function):
    """A number whose gradients are known already; the backward multiplies them by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        _hidden_TH: Tensor,
        _head_VH: Tensor,
        hidden_grad_TH: Tensor,
        head_grad_VH: Tensor,
        take_head_grad: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        ctx.gradients, ctx.take_head_grad = (hidden_grad_TH, head_grad_VH), take_head_grad
        return loss.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise LossError(
                "loss = differentiated twice: the first backward has taken its gradient. It is computed with the loss, and is "
                "as large as the head. Compute the loss again."
            )
        hidden_grad_TH, head_grad_VH = (gradient.mul_(upstream) for gradient in gradients)
        if ctx.take_head_grad is not None:
            head_grad_VH = ctx.take_head_grad(head_grad_VH)
        return None, hidden_grad_TH, head_grad_VH, None, None, None
