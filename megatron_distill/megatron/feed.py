"""The data iterator that Megatron's loop reads: a step's micro-batches, made when the step before it has ended.

    leader:     prompts -> rollouts -> teacher scores          (servers are asked by one rank of each replica)
    replica:    the same samples, by broadcast                  (every tp and pp rank packs the same micro-batches)
    all ranks:  token counts, summed: the plan's denominators

``prepare`` is collective and runs where all ranks are at the same point (see ``session``); ``__next__`` only hands out,
so that a pipeline's stages may ask at different times.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch

from megatron_distill.batches import Sample, build_micro_batches, num_scored_tokens
from megatron_distill.collector import Collected
from megatron_distill.megatron.forward_step import StepBatch
from megatron_distill.megatron.ranks import Ranks
from megatron_distill.metrics import Sums, add_sums
from megatron_distill.objective import StepPlan
from megatron_distill.rollouts import Share, rollout_sums


class StepFeed:
    """Iterator over ``StepBatch``es; ``prepare`` fills it for one step."""

    def __init__(
        self,
        ranks: Ranks,
        collect: Callable[[int, Share], Collected],
        *,
        micro_batch_rollouts: int,
        reverse_kl_weight: Callable[[int], float],
        in_process_teacher: bool,
        pad_multiple: int,
        device: torch.device,
    ) -> None:
        """Fill nothing yet.

        Args:
            ranks: of this process.
            collect: (step, share) -> samples; runs on leaders only.
            micro_batch_rollouts: rollouts of a micro-batch.
            reverse_kl_weight: of a step.
            in_process_teacher: every response token is scored by the teacher beside the student.
            pad_multiple: rows are padded to a multiple of it.
            device: where the batches go.
        """
        self._ranks = ranks
        self._collect = collect
        self._micro_batch_rollouts = micro_batch_rollouts
        self._reverse_kl_weight = reverse_kl_weight
        self._in_process_teacher = in_process_teacher
        self._pad_multiple = pad_multiple
        self._device = device
        self._queue: deque[StepBatch] = deque()

    def prepare(self, step: int) -> tuple[Sums, dict[str, float]]:
        """Collect, share and pack everything that ``step`` needs. Collective over all ranks.

        Returns:
            The rollouts' metrics over all replicas, and the seconds of each phase (the slowest replica's).
        """
        ranks = self._ranks
        share = Share(ranks.dp_rank, ranks.dp_size)
        collected: Collected = ranks.from_leader(lambda: self._collect(step, share))
        samples = collected.samples
        mine = self._facts(samples, step) if ranks.is_leader else None
        facts = [fact for fact in ranks.gather(mine) if fact is not None]
        plan = StepPlan(
            step=step,
            reverse_kl_weight=self._reverse_kl_weight(step),
            num_response_tokens=sum(num_tokens for num_tokens, _, _ in facts),
            num_scored_tokens=sum(num_scored for _, num_scored, _ in facts),
        )
        batches = build_micro_batches(
            samples,
            self._micro_batch_rollouts,
            in_process_teacher=self._in_process_teacher,
            pad_multiple=self._pad_multiple,
        )
        self._queue = deque(StepBatch(batch.to(self._device), plan) for batch in batches)
        sums = add_sums(sums for _, _, sums in facts)
        sums["scored_tokens"] = (float(plan.num_scored_tokens), 1.0)
        sums["reverse_kl_weight"] = (plan.reverse_kl_weight, 1.0)
        return sums, collected.seconds

    def _facts(self, samples: Sequence[Sample], step: int) -> tuple[int, int, Sums]:
        num_tokens = sum(len(sample.rollout.response_ids) for sample in samples)
        num_scored = num_scored_tokens(samples, self._in_process_teacher)
        return num_tokens, num_scored, rollout_sums(samples, step, self._in_process_teacher)

    def __iter__(self) -> "StepFeed":
        return self

    def __next__(self) -> StepBatch:
        return self._queue.popleft()

    def __len__(self) -> int:
        return len(self._queue)
