"""Two replicas of two ranks: what a leader brings or breaks reaches everyone, and every rank plans the same step."""

import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from megatron_distill.errors import DistillError, ServerError
from megatron_distill.rollouts.dealing import deal
from megatron_distill.rollouts.records import BadRow
from megatron_distill.rollouts.source import Collected, Share
from megatron_distill.training.feed import Packing, StepFeed
from megatron_distill.training.ranks import Ranks
from megatron_distill.types import Sample
from tests.support.rank_pool import RankPool
from tests.support.samples import make_samples

WORLD = 4
NUM_SAMPLES = 8
VOCAB_SIZE = 12


def place() -> Ranks:
    """This rank's place: ranks 0 and 1 are one replica, 2 and 3 another."""
    replicas = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    return Ranks(
        rank=rank,
        dp_rank=rank // 2,
        leaders=(0, 2),
        is_last_stage=True,
        speaks=rank % 2 == 0,
        is_reporter=rank == WORLD - 1,
        replica=replicas[rank // 2],
        world=dist.group.WORLD,
        aside=dist.group.WORLD,
    )


def ask_leaders(group: Any) -> tuple[str, list[str], list[int]]:
    """What every rank gets: of its leader, of failing leaders, of all ranks."""
    ranks, told = place(), []
    result = ranks.from_leader(lambda: f"leader {ranks.rank}")
    for error in (ServerError("no server"), BadRow("no answer", "row 3: no answer"), KeyError("hint")):

        def environment(error: Exception = error) -> None:
            if ranks.rank == 2:
                raise error

        try:
            ranks.from_leader(environment)
        except DistillError as raised:
            told.append(f"{type(raised).__name__}: {raised}")
    return result, told, ranks.gather(ranks.rank)


def test_a_leaders_result_is_its_replicas_and_its_failure_everyones(ranks: RankPool) -> None:
    """Nobody waits for a leader that failed, in whichever replica; an error of a user's function arrives with its place."""
    results = ranks.run(ask_leaders, WORLD)
    assert [result for result, _, _ in results] == ["leader 0", "leader 0", "leader 2", "leader 2"]
    for _, told, gathered in results:
        assert told[:2] == ["ServerError: no server", "DistillError: row 3: no answer"]
        assert re.fullmatch(
            r"DistillError: KeyError: 'hint' \(raised at .*/test_feed\.py:\d+, in environment\)", told[2]
        )
        assert gathered == [0, 1, 2, 3]


class Scored:
    """Counts what the teacher scored."""

    name, weight, learns_logprobs = "distill", 1.0, False

    def count(self, samples: Sequence[Sample], scored_in_trainer: bool) -> float:
        return sum(s.rollout.num_learnt_tokens for s in samples if s.signal is not None)


def prepare_step(group: Any) -> tuple[float, dict[str, float], list[torch.Tensor], tuple[float, float]]:
    """A step on this rank: the plan's counts, the targets of each micro-batch, the mean response length's parts."""
    ranks = place()

    def take(step: int, share: Share, horizon_tokens: int) -> Collected:
        assert ranks.is_leader
        half = NUM_SAMPLES // share.size
        return Collected(make_samples(0, NUM_SAMPLES, VOCAB_SIZE)[share.rank * half :][:half], {"rollout_s": 1.0})

    feed = StepFeed(
        ranks,
        take,
        components=[Scored()],  # type: ignore[list-item]
        reverse_kl_weight=lambda step: 0.2,
        scored_in_trainer=False,
        asks_teacher=True,
        rollouts_per_prompt=2,
        packing=Packing(micro_batch_rollouts=2, pad_multiple=8, needs_mask=True, device=torch.device("cpu")),
        num_chunks=2,
    )
    prepared = feed.prepare(3, 16)
    step_batches = list(islice(feed.of_chunk(0), 2))
    assert all(one is other for one, other in zip(step_batches, islice(feed.of_chunk(1), 2), strict=True))
    plan = step_batches[0].plan
    assert all(one.plan is plan for one in step_batches) and plan.step == 3
    targets = [one.batch.target_ids_T for one in step_batches]
    return plan.num_response_tokens, dict(plan.denominators), targets, prepared.sums["response_tokens"]


def test_every_rank_plans_the_same_step_and_a_replica_shares_its_batches(ranks: RankPool) -> None:
    """Denominators are sums over replicas; the ranks of a replica see the same tokens, those of another see others.

    Replicas drew 74 and 46 tokens, and train on 60 each: what the deal gives them, whoever drew it.
    """
    samples = make_samples(0, NUM_SAMPLES, VOCAB_SIZE)
    num_tokens = sum(len(sample.rollout.response_ids) for sample in samples)
    num_scored = sum(len(sample.rollout.response_ids) for sample in samples if sample.signal is not None)
    results = ranks.run(prepare_step, WORLD)
    for response_tokens, denominators, _, length in results:
        assert response_tokens == num_tokens
        assert denominators == {"distill": num_scored}
        assert length == (num_tokens, NUM_SAMPLES)
    batches = [targets for _, _, targets, _ in results]
    assert all(map(torch.equal, batches[0], batches[1])) and all(map(torch.equal, batches[2], batches[3]))
    lengths = [len(sample.rollout.prompt_ids) + len(sample.rollout.response_ids) for sample in samples]
    dealt = [[place for hand in hands for place in hand] for hands in deal(lengths, 2, rollouts=2)]
    assert [sum(lengths[place] for place in places) for places in dealt] == [60, 60]
    for targets, places in zip((batches[0], batches[2]), dealt, strict=True):
        expected = [token for place in places for token in samples[place].rollout.response_ids]
        assert sorted(torch.cat(targets).tolist()) == sorted(expected)
