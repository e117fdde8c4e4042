"""The data iterator that Megatron's loop reads: a step's micro-batches, made when the step before it has ended.

    leader:     prompts -> rollouts -> teacher scores          (servers are asked by one rank of each replica)
    replica:    the same samples, by broadcast                  (every tp and pp rank packs the same micro-batches, of which
                                                                 each cp rank keeps its part of every sequence)
    all ranks:  each component's token count, summed: the plan's denominators

``prepare`` is collective and runs where all ranks are at the same point (see ``cycle``); its iterators only hand out, so
that a pipeline's stages may ask at different times.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_distill.models.context_parallel import sequence_multiple
from megatron_distill.rollouts.batches import MicroBatch, build_micro_batches
from megatron_distill.rollouts.dealing import num_hands_of
from megatron_distill.rollouts.source import Collected, Share
from megatron_distill.rollouts.summary import rollout_sums
from megatron_distill.runs.metrics import Sums, add_sums
from megatron_distill.training.components import Component, StepPlan
from megatron_distill.training.ranks import Ranks
from megatron_distill.types import Sample


@dataclass(frozen=True)
class StepBatch:
    """What the data iterator yields: one micro-batch, and the plan of the step it belongs to."""

    batch: MicroBatch
    plan: StepPlan


@dataclass(frozen=True)
class Packing:
    """How samples become micro-batches.

    Attributes:
        micro_batch_rollouts: rollouts of a micro-batch; None if tokens decide.
        micro_batch_tokens: the most tokens of a micro-batch, if they decide.
        count_multiple: a step's micro-batches are a multiple of it, if tokens decide (an interleaved pipeline needs pp).
        pad_multiple: rows are padded to a multiple of it.
        needs_mask: attention takes a mask, and not the sequences' lengths.
        device: where the batches go.
        cp_rank: this rank's place among those that share each sequence.
        cp_size: number of those.
    """

    micro_batch_rollouts: int | None
    pad_multiple: int
    needs_mask: bool
    device: torch.device
    cp_rank: int = 0
    cp_size: int = 1
    micro_batch_tokens: int = 0
    count_multiple: int = 1


@dataclass(frozen=True)
class Prepared:
    """What is known of a step before it trains.

    Attributes:
        sums: the rollouts' metrics, over all replicas.
        seconds: of each phase of this replica.
    """

    sums: Sums
    seconds: dict[str, float]


class StepFeed:
    """``StepBatch``es for the chunks of the model on this rank; ``prepare`` fills it for one step."""

    def __init__(
        self,
        ranks: Ranks,
        take: Callable[[int, Share, int], Collected],
        *,
        components: Sequence[Component],
        reverse_kl_weight: Callable[[int], float],
        scored_in_trainer: bool,
        asks_teacher: bool,
        packing: Packing,
        num_chunks: int = 1,
        show: Callable[[Sequence[MicroBatch]], object] | None = None,
    ) -> None:
        """Fill nothing yet.

        Args:
            ranks: this process's place among the trainer's ranks.
            take: (step, share, horizon in tokens) -> samples; runs on leaders only.
            components: of the loss, which count their tokens.
            reverse_kl_weight: step -> w in [0, 1].
            scored_in_trainer: the teacher scores every token in the forward step.
            asks_teacher: samples come with scores, some of which may be missing.
            packing: of samples into micro-batches.
            num_chunks: of the model on this rank, in an interleaved pipeline.
            show: shown this rank's micro-batches on all ranks at once: what must pass through a pipeline before the student's.
        """
        self._ranks, self._take, self._components, self._packing = ranks, take, components, packing
        self._reverse_kl_weight = reverse_kl_weight
        self._scored_in_trainer, self._asks_teacher = scored_in_trainer, asks_teacher
        self._show = show
        self._queues: list[deque[StepBatch]] = [deque() for _ in range(num_chunks)]
        self.num_micro_batches = 0
        """Of the step that was prepared last, the same on all ranks."""

    def prepare(self, step: int, horizon_tokens: int) -> Prepared:
        """Collect, share and pack everything that ``step`` needs. Collective over all ranks."""
        ranks, packing = self._ranks, self._packing
        share = Share(ranks.dp_rank, ranks.dp_size)
        collected: Collected = ranks.from_leader(lambda: self._take(step, share, horizon_tokens))
        samples = collected.samples
        mine = None
        if ranks.is_leader:
            counts = self._counts(samples)
            if collected.num_dropped is not None:
                counts[_DROPPED] = float(collected.num_dropped)
            mine = counts, rollout_sums(samples, step, self._asks_teacher), self._fewest(samples)
        facts = [fact for fact in ranks.gather(mine) if fact is not None]
        totals = {name: sum(counts[name] for counts, _, _ in facts) for name in facts[0][0]}
        fewest = max(number for _, _, number in facts)  # the same number on every replica
        num_response_tokens, num_dropped = totals.pop(_RESPONSE), totals.pop(_DROPPED, None)
        plan = StepPlan(step, self._reverse_kl_weight(step), num_response_tokens, totals)
        batches = build_micro_batches(
            samples,
            packing.micro_batch_rollouts,
            step=step,
            num_micro_batches=-(-fewest // packing.count_multiple) * packing.count_multiple,
            scored_in_trainer=self._scored_in_trainer,
            pad_multiple=packing.pad_multiple,
            needs_mask=packing.needs_mask,
            sequence_multiple=sequence_multiple(packing.cp_size),
        )
        own = [batch.of_context_rank(packing.cp_rank, packing.cp_size).to(packing.device) for batch in batches]
        if self._show is not None:
            self._show(own)
        step_batches = [StepBatch(batch, plan) for batch in own]
        self.num_micro_batches = len(step_batches)
        for queue in self._queues:
            queue.clear()
            queue.extend(step_batches)
        sums = add_sums(sums for _, sums, _ in facts)
        sums["scored_tokens"] = (float(totals.get("distill", 0.0)), 1.0)
        sums["reverse_kl_weight"] = (plan.reverse_kl_weight, 1.0)
        if num_dropped is not None:
            sums["dropped_rollouts"] = (num_dropped, 1.0)
        return Prepared(sums, collected.seconds)

    def _counts(self, samples: Sequence[Sample]) -> dict[str, float]:
        """This replica's part of every denominator."""
        counts = {part.name: float(part.count(samples, self._scored_in_trainer)) for part in self._components}
        return counts | {_RESPONSE: float(sum(sample.rollout.num_learnt_tokens for sample in samples))}

    def _fewest(self, samples: Sequence[Sample]) -> int:
        """Micro-batches that this replica needs; 0 if their number is given."""
        packing = self._packing
        return num_hands_of(samples, packing.micro_batch_tokens) if packing.micro_batch_rollouts is None else 0

    def of_chunk(self, number: int) -> Iterator[StepBatch]:
        """The iterator of one of this rank's pipeline chunks: each sees every micro-batch, and asks in its own time."""
        while True:
            yield self._queues[number].popleft()


_RESPONSE, _DROPPED = "response tokens", "dropped rollouts"  # beside the components' names, which hold no spaces
