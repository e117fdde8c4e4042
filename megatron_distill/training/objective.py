"""What is minimised: a weighted sum of components, each divided by its own global token count.

In: response-token logits of one micro-batch, the batch, and the plan of its step. Out: one differentiable number and the
(sum, count) of every metric. No Megatron: the tensor-parallel group is a value (``Shards``).

    loss = sum over components c of  weight_c * (sum of c over the step's tokens) / (number of c's tokens in the step)

The divisor is global (all micro-batches, all replicas) and known before the first forward pass, so that neither
micro-batching, packing nor data parallelism can change loss or gradient, whichever components are on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_distill.losses import vocab_parallel_logprobs, vocab_parallel_topk
from megatron_distill.rollouts.batches import HiddenSignalTensors, MicroBatch, TopKTensors
from megatron_distill.runs.metrics import Sums, add_sums
from megatron_distill.training.components import (
    Component,
    LogitTensors,
    LossContext,
    Shards,
    SignalTensors,
    StepPlan,
    masked_sum,
)

PROBE_TOKENS = 256  # tokens of a micro-batch on which the costlier metrics are measured
OVERLAP_TOP_K = 8


def probe(num_tokens: int) -> range:
    """An even sample of a micro-batch's tokens, on which the costlier metrics are measured."""
    return range(0, num_tokens, max(-(-num_tokens // PROBE_TOKENS), 1))  # a context-parallel rank may have no token


@dataclass(frozen=True)
class LossReport:
    """What one micro-batch came to.

    Attributes:
        loss: its part of the step's loss, times the step's response tokens (Megatron divides by those); has a gradient.
        sums: {metric: [sum, count]}, on the device; "loss" is one of them.
    """

    loss: Tensor
    sums: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """The loss of a run, and the metrics that come with it. It keeps nothing between calls.

    Attributes:
        components: what is added up.
        shards: how the vocabulary lies over the ranks.
        sampling_temperature: at which the sampler's log-probs were taken; they are compared at 1 only.
    """

    components: Sequence[Component]
    shards: Shards
    sampling_temperature: float = 1.0

    def __call__(
        self,
        logits_TV: Tensor,
        batch: MicroBatch,
        plan: StepPlan,
        signal: SignalTensors | None = None,
        reference_TV: Tensor | None = None,
        probed: range | None = None,
    ) -> LossReport:
        """One micro-batch, or some of its response tokens.

        Args:
            logits_TV: student's, [T, V/tp], fp32 or bf16.
            batch: everything else about the same T response tokens.
            plan: numbers that hold for the whole step.
            signal: what the teacher said; by default the top k that travelled with the batch.
            reference_TV: logits of RL's reference model, [T, V/tp].
            probed: the tokens on which the costlier metrics are measured; None takes an even sample (``probe``).
        """
        if signal is None and not isinstance(batch.signal, HiddenSignalTensors):
            signal = batch.signal
        context = LossContext(
            logits_TV=logits_TV,
            batch=batch,
            plan=plan,
            shards=self.shards,
            signal=signal,
            reference_TV=reference_TV,
            learns_logprobs=any(component.learns_logprobs for component in self.components),
            is_only_component=len(self.components) == 1,
        )
        sums: dict[str, Tensor] = {}
        parts: list[Tensor] = []
        for component in self.components:
            part = component.loss(context)
            # A denominator of 0 belongs to a sum of nothing.
            parts.append(component.weight * part.total / (plan.denominators[component.name] or 1.0))
            sums |= part.sums
        loss = torch.stack(parts).sum() * plan.num_response_tokens
        sums["loss"] = torch.stack([loss.detach(), loss.new_tensor(float(batch.target_ids_T.numel()))])
        sums |= self._sampling_sums(context)
        sums |= self._probe_sums(context, probe(batch.target_ids_T.numel()) if probed is None else probed)
        return LossReport(loss, sums)

    def _sampling_sums(self, context: LossContext) -> dict[str, Tensor]:
        student, batch = context.student, context.batch
        sums = {"student_entropy_nats": masked_sum(student.entropy, torch.ones_like(batch.is_student_T))}
        if self.sampling_temperature == 1:
            gap_T = (student.logprobs - batch.sampler_logprobs_T).abs()
            sums["sampler_gap_nats"] = masked_sum(gap_T, batch.is_student_T & ~batch.is_stale_T)
        return sums

    @torch.no_grad()
    def _probe_sums(self, context: LossContext, probed: range) -> dict[str, Tensor]:
        """Metrics that would cost a pass over the vocabulary each: measured on an even sample of the tokens."""
        batch, rows, sums = context.batch, slice(probed.start, probed.stop, probed.step), {}
        logits_PV, target_ids_P = context.logits_TV.detach()[rows], batch.target_ids_T[rows]
        shards: dict[str, Any] = {"tp_group": self.shards.tp_group, "vocab_size": self.shards.vocab_size}
        every_P = torch.ones_like(target_ids_P, dtype=torch.bool)
        if self.shards.stop_token_ids:
            masses = [
                vocab_parallel_logprobs(logits_PV, torch.full_like(target_ids_P, stop), **shards).logprobs.exp()
                for stop in self.shards.stop_token_ids
            ]
            sums["student_stop_mass"] = masked_sum(torch.stack(masses).sum(0), every_P)
        if isinstance(context.signal, LogitTensors) and isinstance(batch.signal, HiddenSignalTensors):
            teacher_P = vocab_parallel_logprobs(context.signal.logits_TV[rows], target_ids_P, **shards).logprobs
            gap_P = (teacher_P - batch.signal.token_logprobs_T[rows]).abs()
            sums["teacher_gap_nats"] = masked_sum(gap_P, batch.is_scored_T[rows])
        if isinstance(context.signal, TopKTensors):
            num_top = min(OVERLAP_TOP_K, context.signal.ids_TK.shape[1])
            student_PK, _ = vocab_parallel_topk(logits_PV, num_top, **shards)
            teacher_PK = context.signal.ids_TK[rows, :num_top]
            shared_P = (student_PK[:, :, None] == teacher_PK[:, None, :]).any(-1).double().mean(-1)
            sums["topk_overlap_frac"] = masked_sum(shared_P, batch.is_scored_T[rows])
        return sums


class StepSums:
    """The metrics of a step's micro-batches, until somebody asks: only then the device is waited for."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def add(self, sums: dict[str, Tensor]) -> None:
        """Keep those of one micro-batch."""
        self._parts.append(sums)

    def take(self) -> Sums:
        """(sum, count) of every metric over the micro-batches since the last call."""
        parts, self._parts = self._parts, []
        return add_sums({name: tuple(pair.tolist()) for name, pair in part.items()} for part in parts)
