"""The parts of the loss, each with a denominator of its own.

    distill   KL between teacher and student      over tokens, or responses, that the teacher scored
    sft       cross entropy                       over tokens that the student did not write
    rl        clipped policy gradient             over tokens of responses that carry signal

A component counts its tokens before the first forward pass; the counts are summed over replicas under its name, and
``training.objective`` divides by them once. A user's component is a file: ``components=["path/to/file.py:function"]``,
where the function takes the ``RunConfig`` and returns a ``Component``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.config import DistillConfig, RlConfig, RunConfig, SftConfig
from megatron_distill.config.loading import load_function
from megatron_distill.errors import ConfigError
from megatron_distill.losses import (
    KLTerms,
    PolicyTerms,
    TokenTerms,
    TopKTerms,
    distill_jsd,
    distill_kl,
    distill_kl_topk,
    distill_skew_kl,
    policy_gradient_loss,
    sampled_kl,
    truncated_importance_weights,
    vocab_parallel_gather_logprobs,
    vocab_parallel_logprobs,
    vocab_parallel_topk,
)
from megatron_distill.losses.sampled import Direction, Estimator, Source
from megatron_distill.losses.topk import Tail
from megatron_distill.rollouts.batches import MicroBatch, TopKTensors
from megatron_distill.types import Sample


@dataclass(frozen=True)
class StepPlan:
    """Numbers that hold for a whole step, the same on every rank.

    Attributes:
        step: 0-based.
        reverse_kl_weight: w of the KL mix.
        num_response_tokens: over all replicas: what Megatron divides gradients by.
        denominators: each component's count over all replicas, by its name.
    """

    step: int
    reverse_kl_weight: float
    num_response_tokens: float
    denominators: Mapping[str, float]


@dataclass(frozen=True)
class LogitTensors:
    """What a teacher says whose output layer is in the trainer: logits [T, V/tp], sharded like the student's."""

    logits_TV: Tensor


SignalTensors = TopKTensors | LogitTensors
"""What any teacher says of a micro-batch's tokens; the loss goes by its type."""


@dataclass(frozen=True)
class Shards:
    """How the vocabulary lies over the ranks.

    Attributes:
        tp_group: over which it is sharded; None if it is whole.
        vocab_size: tokens that exist; the columns after them are padding.
        stop_token_ids: tokens that are one action, merged in the KL.
    """

    tp_group: dist.ProcessGroup | None
    vocab_size: int
    stop_token_ids: tuple[int, ...] = ()

    @property
    def stop_token_groups(self) -> tuple[tuple[int, ...], ...] | None:
        """The stop tokens as one group, if there is something to merge."""
        return (self.stop_token_ids,) if len(self.stop_token_ids) > 1 else None

    def logprobs(self, logits_TV: Tensor, batch: MicroBatch) -> TokenTerms:
        """Log-probs and entropies [T] of the response tokens."""
        return vocab_parallel_logprobs(
            logits_TV,
            batch.target_ids_T,
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
        )


@dataclass(frozen=True)
class LossContext:
    """Response tokens of a micro-batch, all or some of them, as a component sees them.

    Attributes:
        logits_TV: the student's, [T, V/tp], fp32 or bf16, with gradient.
        batch: everything else of the response tokens.
        plan: numbers that hold for the whole step.
        shards: how the vocabulary lies.
        signal: what the teacher said; None if nobody was asked, or it said nothing of this micro-batch.
        reference_TV: logits of RL's reference model, [T, V/tp]; None without one.
        learns_logprobs: whether a component learns through ``student``, so that it must carry a gradient.
        is_only_component: whether nobody else needs the logits in the backward, so that a gradient may take their place.
    """

    logits_TV: Tensor
    batch: MicroBatch
    plan: StepPlan
    shards: Shards
    signal: SignalTensors | None = None
    reference_TV: Tensor | None = None
    learns_logprobs: bool = True
    is_only_component: bool = False

    @cached_property
    def student(self) -> TokenTerms:
        """The student's log-probs and entropies of the response tokens; computed once, shared by whoever asks."""
        with torch.set_grad_enabled(self.learns_logprobs):
            return self.shards.logprobs(self.logits_TV, self.batch)


@dataclass(frozen=True)
class ComponentLoss:
    """A component's part of the tokens it was shown.

    Attributes:
        total: its sum over those tokens, a scalar with gradient; not divided by anything.
        sums: {metric: [sum, count]}, fp64; a user's component names its metrics ``COMPONENT.metric``.
    """

    total: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)


class Component(Protocol):
    """One term of the loss: a sum over tokens, which counts them beforehand.

    So neither packing nor replicas change it, nor how many tokens it is shown at a time.
    """

    name: str
    weight: float
    learns_logprobs: bool
    """Whether the gradient flows through ``LossContext.student``."""

    def count(self, samples: Sequence[Sample], scored_in_trainer: bool) -> float:
        """The denominator, of one replica's samples."""

    def loss(self, context: LossContext) -> ComponentLoss:
        """The sum over the tokens of ``context``."""


MakeComponent = Callable[[RunConfig], Component]


def load_components(config: RunConfig) -> list[Component]:
    """The built-in components whose weight is not zero, and the user's.

    Raises:
        ConfigError: a name in ``components`` stands for nothing, or a component has a name that is taken.
    """
    none_built_in: dict[str, MakeComponent] = {}  # distill, sft and rl are chosen by their weights
    parts: list[Component] = [
        Distill(config.distill, config.teacher.tail, config.teacher.num_logprobs),
        Sft(config.sft),
        PolicyGradient(config.rl),
        *(load_function(name, none_built_in, "components", ("config",))(config) for name in config.components),
    ]
    names = [part.name for part in parts]
    if taken := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"components = {list(config.components)}: two components are named {taken[0]!r}: a name is a denominator's and a "
            "metric's. Choose another name."
        )
    return [part for part in parts if part.weight]


class Distill:
    """The divergence between the teacher's distribution and the student's, at every token that the teacher scored."""

    name = "distill"

    def __init__(self, config: DistillConfig, tail: Tail, num_logprobs: int = 64) -> None:
        """Take the component's settings, what becomes of mass outside a top k, and the k of the student's own."""
        self.weight, self._config, self._tail = config.weight, config, tail
        self._num_logprobs = num_logprobs
        self.learns_logprobs = config.estimator != "distribution"

    def count(self, samples: Sequence[Sample], scored_in_trainer: bool) -> float:
        """Tokens with a signal; responses that have such tokens, if each counts as much as another."""
        scored = scored_tokens(samples, scored_in_trainer)
        return sum(scored) if self._config.normalisation == "token" else sum(tokens > 0 for tokens in scored)

    def loss(self, context: LossContext) -> ComponentLoss:
        """Sum over tokens of what ``distill.divergence`` and ``distill.estimator`` name."""
        batch, signal = context.batch, context.signal
        if signal is None:
            return ComponentLoss(context.logits_TV[:0].sum())
        if self._config.estimator != "distribution":
            return self._sampled(context, signal, self._config.estimator)
        terms = self._terms(context, signal)
        return ComponentLoss(self._total(terms.loss, batch.is_scored_T, batch), self._sums(terms, signal, batch))

    def _total(self, loss_T: Tensor, chosen_T: Tensor, batch: MicroBatch) -> Tensor:
        """What the tokens that ``chosen_T`` keeps add to the numerator."""
        if self._config.normalisation == "sequence":
            loss_T = loss_T * batch.response_share_T
        # Unscored rows hold placeholders: select, never multiply, so that nothing of them can leak.
        return torch.where(chosen_T, loss_T, 0.0).sum()

    def _terms(self, context: LossContext, signal: SignalTensors) -> KLTerms | TopKTerms:
        shards, config, weight = context.shards, self._config, context.plan.reverse_kl_weight
        shared: dict[str, Any] = {
            "tp_group": shards.tp_group,
            "vocab_size": shards.vocab_size,
            "stop_token_groups": shards.stop_token_groups,
        }
        if isinstance(signal, TopKTensors):
            return distill_kl_topk(
                context.logits_TV,
                signal.ids_TK,
                signal.logprobs_TK,
                reverse_kl_weight=weight,
                tail=self._tail,
                stop_logprobs=signal.stop_logprobs_TS if shards.stop_token_groups else None,
                **shared,
            )
        if config.support == "student":
            return self._on_own_support(context, signal, shared)
        pair = (context.logits_TV, signal.logits_TV)
        shared["temperature"] = config.temperature
        if config.divergence == "jsd":
            return distill_jsd(*pair, teacher_weight=weight, **shared)
        if config.divergence == "skew_kl":
            return distill_skew_kl(*pair, reverse=weight == 1, skew=config.skew, **shared)
        return distill_kl(*pair, reverse_kl_weight=weight, grad_in_place=context.is_only_component, **shared)

    def _on_own_support(self, context: LossContext, signal: LogitTensors, shared: dict[str, Any]) -> TopKTerms:
        """The mixed KL over the student's likeliest tokens and a tail: where the student puts its mass, not the teacher."""
        lookup: dict[str, Any] = {"tp_group": context.shards.tp_group, "vocab_size": context.shards.vocab_size}
        ids_TK, _ = vocab_parallel_topk(context.logits_TV, self._num_logprobs, **lookup)
        stops, stop_logprobs_TS = context.shards.stop_token_groups, None
        if stops:
            stop_ids_TS = ids_TK.new_tensor(stops[0]).expand(len(ids_TK), -1)
            stop_logprobs_TS = vocab_parallel_gather_logprobs(signal.logits_TV, stop_ids_TS, **lookup)
        return distill_kl_topk(
            context.logits_TV,
            ids_TK,
            vocab_parallel_gather_logprobs(signal.logits_TV, ids_TK, **lookup),
            reverse_kl_weight=context.plan.reverse_kl_weight,
            tail=self._tail,
            stop_logprobs=stop_logprobs_TS,
            **shared,
        )

    def _sampled(self, context: LossContext, signal: SignalTensors, estimator: Estimator) -> ComponentLoss:
        """From the written token alone; whose it is decides what its log-ratio estimates."""
        batch, student_T = context.batch, context.student.logprobs
        if isinstance(signal, TopKTensors):
            teacher_T = signal.token_logprobs_T
        else:
            with torch.no_grad():
                teacher_T = context.shards.logprobs(signal.logits_TV, batch).logprobs
        direction: Direction = "reverse" if context.plan.reverse_kl_weight == 1 else "forward"
        total, sums = student_T[:0].sum(), {}
        authors: tuple[tuple[Source, Tensor, str], ...] = (
            ("student", batch.is_student_T & batch.is_scored_T, "reverse_kl_nats"),
            ("teacher", ~batch.is_student_T & batch.is_scored_T, "forward_kl_nats"),
        )
        for author, chosen_T, metric in authors:
            kl_T = torch.zeros_like(student_T)
            # An author who wrote nothing is not asked: the config's rules refuse what could not be.
            if chosen_T.any():
                terms = sampled_kl(student_T, teacher_T, direction=direction, sampled_from=author, estimator=estimator)
                total, kl_T = total + self._total(terms.loss, chosen_T, batch), terms.kl
            sums[metric] = masked_sum(kl_T, chosen_T)
        return ComponentLoss(total, sums)

    def _sums(self, terms: KLTerms | TopKTerms, signal: SignalTensors, batch: MicroBatch) -> dict[str, Tensor]:
        named = {"forward_kl_nats": terms.forward_kl, "reverse_kl_nats": terms.reverse_kl}
        if isinstance(terms, TopKTerms):
            named["teacher_topk_mass"] = terms.topk_mass
            named["student_topk_mass"] = terms.student_topk_mass
        if isinstance(signal, TopKTensors):
            named["teacher_entropy_nats"] = _bucketed_entropy(signal.logprobs_TK)
        elif isinstance(terms, KLTerms):
            named["teacher_entropy_nats"] = terms.teacher_entropy
        sums = {name: masked_sum(value, batch.is_scored_T) for name, value in named.items()}
        for name, quarter in (("kl_first_quarter_nats", 0), ("kl_last_quarter_nats", 3)):
            sums[name] = masked_sum(terms.loss, batch.is_scored_T & (batch.response_quarter_T == quarter))
        return sums


class Sft:
    """Cross entropy, -log q(token), on what the student did not write (hard targets)."""

    name, learns_logprobs = "sft", True

    def __init__(self, config: SftConfig) -> None:
        """Take the component's weight."""
        self.weight = config.weight

    def count(self, samples: Sequence[Sample], scored_in_trainer: bool) -> float:
        """Tokens that the student did not write."""
        return sum(s.rollout.num_learnt_tokens for s in samples if s.rollout.author != "student")

    def loss(self, context: LossContext) -> ComponentLoss:
        """Sum of ``-log q(token)``."""
        written_T, logprobs_T = ~context.batch.is_student_T, context.student.logprobs
        total = -torch.where(written_T, logprobs_T, 0.0).sum()
        return ComponentLoss(total, {"cross_entropy_nats": masked_sum(-logprobs_T, written_T)})


class PolicyGradient:
    """The clipped policy gradient, on responses of the student.

    Fresh tokens: the old policy is the present one, and a truncated importance weight corrects for the sampler's other
    kernels. Stale tokens: the old policy is the one that sampled them, whose log-probs are the sampler's.
    """

    name, learns_logprobs = "rl", True

    def __init__(self, config: RlConfig) -> None:
        """Take the component's weight, clips and reference KL."""
        self.weight, self._config = config.weight, config

    def count(self, samples: Sequence[Sample], scored_in_trainer: bool) -> float:
        """Sum of the tokens' weights."""
        return sum(s.rollout.num_learnt_tokens * s.policy_weight for s in samples)

    def loss(self, context: LossContext) -> ComponentLoss:
        """Weighted sum of the tokens' policy losses."""
        batch, terms = context.batch, self._terms(context)
        counted_T = batch.policy_weights_T > 0
        total = (torch.where(counted_T, terms.loss, 0.0) * batch.policy_weights_T).sum()
        sums = {
            "policy_loss": masked_sum(terms.loss, counted_T),
            "clipped_frac": masked_sum(terms.clipped, counted_T),
        }
        if context.reference_TV is not None:
            sums["reference_kl_nats"] = masked_sum(terms.ref_kl, counted_T)
        return ComponentLoss(total, sums)

    def _terms(self, context: LossContext) -> PolicyTerms:
        batch, config, logprobs_T = context.batch, self._config, context.student.logprobs
        sampler_T = torch.where(batch.is_student_T, batch.sampler_logprobs_T, logprobs_T.detach())
        weights_T = truncated_importance_weights(logprobs_T, sampler_T, max_weight=config.max_importance_weight)
        reference_T = None
        if context.reference_TV is not None:
            with torch.no_grad():
                reference_T = context.shards.logprobs(context.reference_TV, batch).logprobs
        return policy_gradient_loss(
            logprobs_T,
            torch.where(batch.is_stale_T, sampler_T, logprobs_T.detach()),
            batch.advantages_T,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            importance_weights=torch.where(batch.is_stale_T, 1.0, weights_T),
            ref_logprobs=reference_T,
            ref_kl_coef=config.reference_kl_coef if reference_T is not None else 0.0,
        )


def scored_tokens(samples: Sequence[Sample], scored_in_trainer: bool) -> list[int]:
    """Learnt tokens of each response that a teacher scores; it scores all of them if it is in the trainer."""
    return [s.rollout.num_learnt_tokens for s in samples if scored_in_trainer or s.signal is not None]


def masked_sum(value_T: Tensor, mask_T: Tensor) -> Tensor:
    """[sum, count] over the tokens that ``mask_T`` keeps, fp64: what a metric is made of."""
    total = torch.where(mask_T, value_T.detach(), 0.0).sum(dtype=torch.float64)
    return torch.stack([total, mask_T.sum(dtype=torch.float64)])


def _bucketed_entropy(topk_logprobs_TK: Tensor) -> Tensor:
    """Entropy [T] over the top-k and one bucket for the rest, nats: a lower bound on the full one."""
    probabilities_TK = topk_logprobs_TK.exp()
    tail_T = (1 - probabilities_TK.sum(-1)).clamp(min=0)
    return torch.special.entr(probabilities_TK).sum(-1) + torch.special.entr(tail_T)
