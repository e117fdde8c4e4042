"""The data iterator that Megatron's loop reads: a step's micro-batches, made when the step before it has ended.

    leader:     prompts -> rollouts -> teacher scores          (servers are asked by one rank of each replica)
    all ranks:  each component's token count, summed: the plan's denominators; every sample's length: the deal
    leaders:    samples for each other                          (so that every replica trains on about as many tokens)
    replica:    the same samples, by broadcast                  (every tp and pp rank packs the same micro-batches, of which
                                                                 each cp rank keeps its part of every sequence)

``prepare`` is collective and runs where all ranks are at the same point (see ``cycle``); its iterators only hand out, so
that a pipeline's stages may ask at different times.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_distill.models.context_parallel import sequence_multiple
from megatron_distill.rollouts.batches import MicroBatch, pack_micro_batch
from megatron_distill.rollouts.dealing import Hand, deal, num_tokens
from megatron_distill.rollouts.source import Collected, Share
from megatron_distill.rollouts.summary import rollout_sums
from megatron_distill.runs.metrics import Sums, add_sums
from megatron_distill.training.components import Component, StepPlan, scored_tokens
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
class _Drawn:
    """What every rank learns of the samples that a leader brought.

    Attributes:
        counts: its part of every denominator.
        sums: its rollouts' metrics.
        lengths: tokens of each sample.
        seconds: of each phase.
    """

    counts: dict[str, float]
    sums: Sums
    lengths: list[int]
    seconds: dict[str, float]


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
        rollouts_per_prompt: int,
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
            rollouts_per_prompt: that ``take`` brings.
            packing: of samples into micro-batches.
            num_chunks: of the model on this rank, in an interleaved pipeline.
            show: shown this rank's micro-batches on all ranks at once: what must pass through a pipeline before the student's.
        """
        self._ranks, self._take, self._components, self._packing = ranks, take, components, packing
        self._reverse_kl_weight = reverse_kl_weight
        self._scored_in_trainer, self._asks_teacher = scored_in_trainer, asks_teacher
        self._rollouts_per_prompt = rollouts_per_prompt
        self._show = show
        self._queues: list[deque[StepBatch]] = [deque() for _ in range(num_chunks)]
        self.num_micro_batches = 0
        """Of the step that was prepared last, the same on all ranks."""

    def prepare(self, step: int, horizon_tokens: int) -> Prepared:
        """Collect, share and pack everything that ``step`` needs. Collective over all ranks."""
        ranks = self._ranks
        brought: list[Sample] = []

        def draw() -> _Drawn:
            collected = self._take(step, Share(ranks.dp_rank, ranks.dp_size), horizon_tokens)
            brought.extend(collected.samples)
            return self._drawn(collected, step)

        mine: _Drawn = ranks.from_leader(draw)
        told = ranks.gather(mine if ranks.is_leader else None)
        everyone: list[_Drawn] = [told[leader] for leader in ranks.leaders]
        totals = {name: sum(one.counts[name] for one in everyone) for name in mine.counts}
        num_response_tokens, num_scored_tokens = totals.pop(_RESPONSE), totals.pop(_SCORED)
        num_dropped = totals.pop(_DROPPED, None)
        plan = StepPlan(step, self._reverse_kl_weight(step), num_response_tokens, totals)
        step_batches = [StepBatch(batch, plan) for batch in self._micro_batches(step, everyone, brought)]
        self.num_micro_batches = len(step_batches)
        for queue in self._queues:
            queue.clear()
            queue.extend(step_batches)
        sums = add_sums(one.sums for one in everyone)
        sums["scored_tokens"] = (num_scored_tokens, 1.0)
        sums["reverse_kl_weight"] = (plan.reverse_kl_weight, 1.0)
        if num_dropped is not None:
            sums["dropped_rollouts"] = (num_dropped, 1.0)
        return Prepared(sums, mine.seconds)

    def _drawn(self, collected: Collected, step: int) -> _Drawn:
        samples = collected.samples
        counts = {part.name: float(part.count(samples, self._scored_in_trainer)) for part in self._components}
        counts[_RESPONSE] = float(sum(sample.rollout.num_learnt_tokens for sample in samples))
        counts[_SCORED] = float(sum(scored_tokens(samples, self._scored_in_trainer)))
        if collected.num_dropped is not None:
            counts[_DROPPED] = float(collected.num_dropped)
        sums = rollout_sums(samples, step, self._asks_teacher, self._rollouts_per_prompt)
        return _Drawn(counts, sums, [num_tokens(sample) for sample in samples], collected.seconds)

    def _micro_batches(self, step: int, everyone: Sequence[_Drawn], brought: Sequence[Sample]) -> list[MicroBatch]:
        """This rank's part of the step, whoever drew it; ``brought`` is what this leader did."""
        packing = self._packing
        dealt = deal(
            [length for one in everyone for length in one.lengths],
            self._ranks.dp_size,
            rollouts=packing.micro_batch_rollouts,
            max_tokens=packing.micro_batch_tokens,
            count_multiple=packing.count_multiple,
        )
        first = sum(len(one.lengths) for one in everyone[: self._ranks.dp_rank])  # of what this replica drew
        own: dict[int, Sample] = self._ranks.from_leader(lambda: self._swap(dict(enumerate(brought, first)), dealt))
        batches = [
            pack_micro_batch(
                [own[place] for place in hand],
                step=step,
                scored_in_trainer=self._scored_in_trainer,
                pad_multiple=packing.pad_multiple,
                needs_mask=packing.needs_mask,
                sequence_multiple=sequence_multiple(packing.cp_size),
            )
            for hand in dealt[self._ranks.dp_rank]
        ]
        local = [batch.of_context_rank(packing.cp_rank, packing.cp_size).to(packing.device) for batch in batches]
        if self._show is not None:
            self._show(local)
        return local

    def _swap(self, brought: dict[int, Sample], dealt: Sequence[Sequence[Hand]]) -> dict[int, Sample]:
        """The samples that this replica was dealt, by their places in the step; called by all leaders."""
        parcels = [{place: brought[place] for hand in hands for place in hand if place in brought} for hands in dealt]
        return {place: sample for parcel in self._ranks.exchange(parcels) for place, sample in parcel.items()}

    def of_chunk(self, number: int) -> Iterator[StepBatch]:
        """The iterator of one of this rank's pipeline chunks: each sees every micro-batch, and asks in its own time."""
        while True:
            yield self._queues[number].popleft()


# Beside the components' names, which hold no spaces.
_RESPONSE, _SCORED, _DROPPED = "response tokens", "scored tokens", "dropped rollouts"
