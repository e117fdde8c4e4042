"""What is minimised: a weighted sum of components, each divided by its own global token count.

In: response-token logits of one micro-batch, the batch, and the plan of its step. Out: one differentiable number and the
(sum, count) of every metric. No Megatron: the tensor-parallel group is an argument.

    loss = sum over components c of  weight_c * (sum of c over the step's tokens) / (number of c's tokens in the step)

The divisor is global (all micro-batches, all replicas) and known before the first forward pass, so that neither
micro-batching, packing nor data parallelism can change loss or gradient, whichever components are on.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.batches import MicroBatch
from megatron_distill.losses import KLTerms, TopKTerms, distill_kl, distill_kl_topk, vocab_parallel_logprobs
from megatron_distill.losses.topk import Tail
from megatron_distill.metrics import Sums, add_sums


@dataclass(frozen=True)
class StepPlan:
    """Numbers that hold for a whole step, the same on every rank.

    Attributes:
        step: 0-based.
        reverse_kl_weight: w of the KL mix.
        num_response_tokens: over all replicas: what Megatron divides gradients by.
        num_scored_tokens: over all replicas: the distillation component's denominator.
    """

    step: int
    reverse_kl_weight: float
    num_response_tokens: int
    num_scored_tokens: int


@dataclass
class Objective:
    """The loss of a run, and the metrics that come with it.

    Attributes:
        distill_weight: weight of the distillation component.
        temperature: divides both models' logits in the KL.
        tail: what becomes of the teacher's mass outside its top-k: see ``losses.distill_kl_topk``.
        stop_token_ids: tokens that are one action, merged in the loss.
        vocab_size: tokens that exist; the columns after them are padding.
        tp_group: over which the vocabulary is sharded; None if it is whole.
    """

    distill_weight: float
    temperature: float
    tail: Tail
    stop_token_ids: tuple[int, ...]
    vocab_size: int
    tp_group: dist.ProcessGroup | None
    _parts: list[dict[str, Tensor]] = field(default_factory=list)

    def __call__(
        self, logits_TV: Tensor, batch: MicroBatch, plan: StepPlan, teacher_TV: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the loss, times the step's response tokens (Megatron divides by those).

        Args:
            logits_TV: student's, [T, V/tp], fp32 or bf16.
            batch: with the teacher's scores, unless ``teacher_TV`` is given.
            plan: of the step.
            teacher_TV: in-process teacher's logits, [T, V/tp].

        Returns:
            A scalar with gradient, and {metric: [sum, count]} for Megatron's own log.
        """
        terms = self._distill_terms(logits_TV, batch, plan, teacher_TV)
        scored_T = batch.is_scored_T
        # Unscored rows hold placeholders: select, never multiply, so that nothing of them can leak.
        loss_T = torch.where(scored_T, terms.loss, 0.0)
        scale = plan.num_response_tokens / max(plan.num_scored_tokens, 1)
        total = self.distill_weight * scale * loss_T.sum()
        report = {"loss": torch.stack([total.detach(), total.new_tensor(float(batch.target_ids_T.numel()))])}
        self._parts.append(report | self._distill_sums(terms, scored_T) | self._sampling_sums(logits_TV, batch))
        return total, report

    def take_sums(self) -> Sums:
        """(sum, count) of every metric over the micro-batches since the last call; the device is waited for here only."""
        parts, self._parts = self._parts, []
        return add_sums({name: tuple(pair.tolist()) for name, pair in part.items()} for part in parts)

    def _distill_terms(
        self, logits_TV: Tensor, batch: MicroBatch, plan: StepPlan, teacher_TV: Tensor | None
    ) -> KLTerms | TopKTerms:
        stop_groups = (self.stop_token_ids,) if len(self.stop_token_ids) > 1 else None
        if teacher_TV is not None:
            return distill_kl(
                logits_TV,
                teacher_TV,
                reverse_kl_weight=plan.reverse_kl_weight,
                temperature=self.temperature,
                tp_group=self.tp_group,
                vocab_size=self.vocab_size,
                stop_token_groups=stop_groups,
            )
        assert batch.topk_ids_TK is not None and batch.topk_logprobs_TK is not None
        return distill_kl_topk(
            logits_TV,
            batch.topk_ids_TK,
            batch.topk_logprobs_TK,
            reverse_kl_weight=plan.reverse_kl_weight,
            tail=self.tail,
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
            stop_token_groups=stop_groups,
            stop_logprobs=batch.stop_logprobs_TS if stop_groups else None,
        )

    def _distill_sums(self, terms: KLTerms | TopKTerms, scored_T: Tensor) -> dict[str, Tensor]:
        named = {"forward_kl_nats": terms.forward_kl, "reverse_kl_nats": terms.reverse_kl}
        if isinstance(terms, TopKTerms):
            named["teacher_topk_mass"] = terms.topk_mass
            named["student_topk_mass"] = terms.student_topk_mass
        else:
            named["teacher_entropy_nats"] = terms.teacher_entropy
        return {name: _masked(value, scored_T) for name, value in named.items()}

    @torch.no_grad()
    def _sampling_sums(self, logits_TV: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        student = vocab_parallel_logprobs(
            logits_TV, batch.target_ids_T, tp_group=self.tp_group, vocab_size=self.vocab_size
        )
        sampled_T = batch.sampler_logprobs_T.isfinite()
        gap_T = (student.logprobs - batch.sampler_logprobs_T).abs()
        every_T = torch.ones_like(sampled_T)
        return {
            "student_entropy_nats": _masked(student.entropy, every_T),
            "sampler_gap_nats": _masked(gap_T, sampled_T),
        }


def _masked(value_T: Tensor, mask_T: Tensor) -> Tensor:
    """[sum, count] over the tokens that ``mask_T`` keeps, fp64."""
    total = torch.where(mask_T, value_T.detach(), 0.0).sum(dtype=torch.float64)
    return torch.stack([total, mask_T.sum(dtype=torch.float64)])
