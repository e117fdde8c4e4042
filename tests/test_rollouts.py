"""Rollouts are a function of (seed, step, place); what is missing stays missing; evaluation counts right."""

import itertools
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_distill.config import DataConfig, EvalConfig, RlConfig, RolloutConfig, RunConfig, TeacherConfig
from megatron_distill.config.schedules import constant
from megatron_distill.errors import DataError, RewardError, TeacherError
from megatron_distill.evaluate.accuracy import answer_given, bootstrap_mean, entropy_nats, evaluate, maj_at_k, pass_at_k
from megatron_distill.rewards import Answered, BoundedReward, Reward, WeightedReward, load_reward
from megatron_distill.rollouts.advantages import with_advantages
from megatron_distill.rollouts.environment import Environment, Episode, Turns, join, single_turn
from megatron_distill.rollouts.order import problem_at, sampling_seed, student_writes
from megatron_distill.rollouts.prompts import PromptSet
from megatron_distill.rollouts.sample_store import SampleStore
from megatron_distill.rollouts.source import Share, SourceContext
from megatron_distill.rollouts.streamed import StreamedSource
from megatron_distill.rollouts.summary import is_repetitive, rollout_sums
from megatron_distill.runs.follower import tracked_step
from megatron_distill.runs.metrics import check_declared
from megatron_distill.sglang.wire import serves
from megatron_distill.teacher import Teacher
from megatron_distill.types import (
    Generation,
    Message,
    Problem,
    Rollout,
    Sample,
    Sampler,
    SamplingParams,
    SinceVersion,
    TopKSignal,
    VersionSpan,
    WantedVersion,
)
from tests.support.waiting import HANG_S

PROBLEMS = [Problem(str(i), (Message("user", "?"),), str(i), solution="7 8 9") for i in range(10)]
PROMPTS = PromptSet(PROBLEMS, [[i, i + 1] for i in range(10)])


class SeedSampler:
    """Answers with the seed it was given, so that tests can see who was asked for what; slowly, and out of order."""

    def __init__(self, version: str) -> None:
        self.version = version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        sampling: SamplingParams,
        seeds: Sequence[int],
        weight_version: WantedVersion = None,
    ) -> list[Generation]:
        assert serves(self.version, weight_version)
        return [Generation([seed % 97, seed % 89], np.zeros(2, np.float32), "stop", 0, self.version) for seed in seeds]


class WordTokenizer:
    """Numbers, a space between them."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def source(
    frac: float = 1.0,
    *,
    teacher: Teacher | None = None,
    reward: Reward | None = None,
    environment: Environment = single_turn,
    off_policy: str = "teacher",
    max_missing_frac: float = 0.1,
    max_staleness_steps: int = 0,
    student: Sampler | None = None,
) -> StreamedSource:
    config = RunConfig(
        seed=5,
        data=DataConfig(train_path="train.jsonl"),
        teacher=TeacherConfig(max_missing_frac=max_missing_frac),
        rl=RlConfig(weight=1.0 if reward is not None else 0.0),
        rollouts=RolloutConfig(
            prompts_per_step=4,
            rollouts_per_prompt=2,
            max_staleness_steps=max_staleness_steps,
            student_prefix_frac=constant(frac),
            off_policy_source=off_policy,  # type: ignore[arg-type]
        ),
    )
    made = StreamedSource(
        SourceContext(
            config=config,
            train=PROMPTS,
            tokenizer=WordTokenizer(),
            stop_token_ids=(0, 1),
            student=student or SeedSampler("3"),
            teacher_sampler=SeedSampler("0"),
            teacher=teacher,
            reward=reward,
            environment=environment,
        )
    )
    made.weights_changed(3)
    return made


def take(share: Share, step: int = 0, horizon: int = 8, **kinds: Any) -> list[Sample]:
    return source(**kinds).take(step, share, horizon).samples


def collect(share: Share, step: int = 0, horizon: int = 8, **kinds: Any) -> list[Rollout]:
    return [sample.rollout for sample in take(share, step, horizon, **kinds)]


def facts(rollouts: Sequence[Rollout]) -> list[tuple[int, list[int], str]]:
    return [(r.prompt_index, r.response_ids, r.author) for r in rollouts]


@pytest.mark.parametrize("frac", [0.0, 0.25, 0.5, 1.0])
def test_replicas_share_a_step_without_changing_it(frac: float) -> None:
    """One, two or four replicas draw together exactly what one draws alone, in the same order."""
    whole = facts(collect(Share(0, 1), step=2, frac=frac))
    for size in (2, 4):
        parts = [facts(collect(Share(rank, size), step=2, frac=frac)) for rank in range(size)]
        assert list(itertools.chain(*parts)) == whole
    assert sum(author == "student" for _, _, author in whole) == frac * len(whole)


def test_every_problem_comes_once_an_epoch() -> None:
    """The stream of problems is a fresh permutation each epoch, the same for the same seed."""
    epochs = [[problem_at(e * 10 + i, 10, seed=1) for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != [problem_at(i, 10, seed=2) for i in range(10)]


def test_sampling_seeds_do_not_repeat() -> None:
    """Equal seeds would give equal responses: a run's are distinct and fit 31 bits."""
    seeds = [sampling_seed(1, serial) for serial in range(20000)]
    assert len(set(seeds)) > 0.9999 * len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_what_each_reward_gave_stands_in_the_samples_and_the_metrics(tmp_path: Path) -> None:
    """Two rewards: the sum is the reward, the parts go with the sample, to disk and back, and into means."""
    both = WeightedReward({"first": (starts_with_one, 1.0), "length": (load_reward("length", 9), -2.0)})
    samples = take(Share(0, 1), reward=both)
    for sample in samples:
        parts = sample.reward_parts
        assert parts["length"] == len(sample.rollout.response_ids) / 1000
        assert sample.reward == pytest.approx(parts["first"] - 2 * parts["length"])
    SampleStore(tmp_path).save(0, Share(0, 1), samples)
    assert [one.reward_parts for one in SampleStore(tmp_path).load(0, Share(0, 1)) or ()] == [
        one.reward_parts for one in samples
    ]
    sums = rollout_sums(samples, 0, teacher_scores=False, rollouts_per_prompt=2)
    assert sums["reward.length"][0] == pytest.approx(sum(one.reward_parts["length"] for one in samples))
    record = {"step": 1.0, "reward": 0.5, "reward.length": 0.01}
    check_declared(record)
    assert tracked_step(record) == {"rollouts/reward": 0.5, "reward/length": 0.01}


def test_a_prompt_that_comes_twice_in_a_step_is_two_groups() -> None:
    """Without signal is what has no advantage: a group of its own each time, though the problem is the same."""
    samples = take(Share(0, 1))
    samples = [replace(one, rollout=replace(one.rollout, prompt_index=3)) for one in samples]
    judged = with_advantages(samples, [0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.1 + 0.2, 0.3], 2, RlConfig(weight=1.0))
    assert [one.advantage == 0 for one in judged] == [True, True, True, True, False, False, True, True]
    assert rollout_sums(judged, 0, teacher_scores=False, rollouts_per_prompt=2)["zero_signal_frac"] == (3.0, 4.0)
    assert rollout_sums(samples, 0, teacher_scores=False, rollouts_per_prompt=2)["zero_signal_frac"] == (0.0, 0.0)


def test_others_write_the_same_at_every_visit() -> None:
    """What the student does not write is a data set: a prompt's response is the same in every epoch; the student's not."""
    visits = [facts(collect(Share(0, 1), step=step, frac=0.0)) for step in range(10)]
    by_prompt: dict[int, set[tuple[int, ...]]] = {}
    for prompt, response, _ in itertools.chain(*visits):
        by_prompt.setdefault(prompt, set()).add(tuple(response))
    assert all(len(responses) == 2 for responses in by_prompt.values())  # rollouts_per_prompt


@pytest.mark.parametrize("frac", [0.0, 0.3, 0.5, 1.0])
def test_shares_are_even(frac: float) -> None:
    """Any stretch of places holds the student's share to within one."""
    wrote = [student_writes(place, frac) for place in range(100)]
    for length in (10, 33, 100):
        assert abs(sum(wrote[:length]) - frac * length) < 1


def test_the_data_writes_its_solutions_up_to_the_horizon() -> None:
    """A solution ends with the stop token; one longer than the horizon is truncated, and says so; nobody sampled it."""
    whole, cut = (collect(Share(0, 1), horizon=n, frac=0.0, off_policy="data")[0] for n in (4, 2))
    assert (whole.response_ids, whole.stop_reason, whole.author) == ([7, 8, 9, 0], "stop", "data")
    assert (cut.response_ids, cut.stop_reason) == ([7, 8], "length")
    assert np.isnan(whole.sampler_logprobs).all()


def test_a_problem_without_solution_cannot_be_written_by_the_data() -> None:
    """It is named before anything is asked."""
    problems = [replace(p, solution=None) if p.id == "3" else p for p in PROBLEMS]
    context = replace(source(0.5, off_policy="data")._context, train=PromptSet(problems, PROMPTS.prompts))
    with pytest.raises(DataError, match=r"1 training problems have no 'solution', the first is '3'"):
        StreamedSource(context)


class PatchyTeacher:
    """Scores a rollout unless its prompt is one of the first few that it was asked about."""

    def __init__(self, num_missing: int) -> None:
        self._missing = set(range(num_missing))
        self._seen: dict[tuple[int, tuple[int, ...]], int] = {}

    def score(self, rollouts: Sequence[Rollout], /) -> list[TopKSignal | None]:
        signals: list[TopKSignal | None] = []
        for rollout in rollouts:
            length = len(rollout.response_ids)
            serial = self._seen.setdefault((rollout.prompt_index, tuple(rollout.response_ids)), len(self._seen))
            zeros = np.zeros((length, 1), np.float32)
            signal = TopKSignal(zeros[:, 0], zeros.astype(np.int32), zeros, zeros)
            signals.append(None if serial in self._missing else signal)
        return signals


def test_missing_scores_stay_missing_and_are_bounded() -> None:
    """A teacher that answered nothing gives None, not zeros; too many of those are an error that names the limit."""
    samples = take(Share(0, 1), teacher=PatchyTeacher(2), max_missing_frac=0.25)
    assert sum(s.signal is None for s in samples) == 2
    sums = rollout_sums(samples, step=4, teacher_scores=True, rollouts_per_prompt=2)
    assert sums["missing_teacher_frac"] == (2.0, 8.0)
    assert sums["staleness_steps"] == (8.0, 8.0)
    with pytest.raises(TeacherError, match=r"3/8.*max_missing_frac = 0.25"):
        take(Share(0, 1), teacher=PatchyTeacher(3), max_missing_frac=0.25)


def test_rewards_find_their_responses_whenever_these_end() -> None:
    """Responses are judged in whatever groups they end in, and each gets its own reward and the advantage of its prompt."""

    def last_token(answered: Sequence[Answered], /) -> list[float]:
        return [float(one.response_ids[-1] + int(one.problem.answer)) for one in answered]

    samples = take(Share(0, 1), reward=last_token)
    for sample in samples:
        assert sample.reward == sample.rollout.response_ids[-1] + sample.rollout.prompt_index
    assert any(sample.advantage != 0 for sample in samples)
    assert all(a.advantage == -b.advantage for a, b in itertools.batched(samples, 2))


def say_twice(problem: Problem, prompt_ids: list[int], turns: Turns, /) -> Episode:
    first = turns.generate(prompt_ids)
    second = turns.generate([*prompt_ids, *first.response_ids, 42])
    assert turns.room([*prompt_ids, *first.response_ids, 42, *second.response_ids]) == 3
    return join([first, [42], second])


def test_an_environment_may_speak_between_turns() -> None:
    """What the environment says is in the response and is not learnt; every turn has a seed of its own; the first is that
    of a single turn; the horizon caps all turns together."""
    rollout = collect(Share(0, 1), environment=say_twice)[0]
    single = collect(Share(0, 1))[0]
    assert rollout.response_ids[:2] == single.response_ids != rollout.response_ids[3:]
    assert rollout.is_learnt is not None and rollout.is_learnt.tolist() == [True, True, False, True, True]
    assert (
        rollout.num_learnt_tokens == 4
        and np.isnan(rollout.sampler_logprobs).tolist() == [False] * 2 + [True] + [False] * 2
    )
    assert facts(collect(Share(0, 1), environment=say_twice)) == facts(collect(Share(0, 1), environment=say_twice))
    with pytest.raises(DataError, match="none is left of a horizon of 2"):
        collect(Share(0, 1), horizon=2, environment=say_twice)


class ChangingSampler:
    """Its weights change from version 5 to 6 in the middle of every response."""

    def __init__(self) -> None:
        self.asked_for: list[WantedVersion] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        sampling: SamplingParams,
        seeds: Sequence[int],
        weight_version: WantedVersion = None,
    ) -> list[Generation]:
        self.asked_for.append(weight_version)
        spans = (VersionSpan("5", 0, 1), VersionSpan("6", 1, 2))
        return [Generation([seed % 97, 0], np.zeros(2, np.float32), "stop", 0, "6", spans) for seed in seeds]


def test_in_flight_every_response_says_which_weights_drew_which_tokens() -> None:
    """With a staleness of 2 nothing older than two steps is asked for, and a step counts as old as its oldest token. An
    environment's own words belong to no weights. Several steps are drawn at once, each with its own rewards."""
    student = ChangingSampler()

    def last_token(answered: Sequence[Answered], /) -> list[float]:
        return [float(one.response_ids[0] + int(one.problem.id)) for one in answered]

    made = source(max_staleness_steps=2, student=student, environment=say_twice, reward=last_token)
    with ThreadPoolExecutor(3) as threads:
        steps = list(threads.map(lambda step: made.take(step, Share(0, 1), 8).samples, (6, 7, 8)))
    assert set(student.asked_for) == {SinceVersion(4), SinceVersion(5), SinceVersion(6)}
    for step, samples in zip((6, 7, 8), steps, strict=True):
        assert rollout_sums(samples, step, False, 2)["staleness_steps"] == (8.0 * (step - 5), 8.0)
        for sample in samples:
            rollout = sample.rollout
            assert (rollout.oldest_version, rollout.newest_version) == (5, 6)
            assert rollout.version_spans == (("5", 0, 1), ("6", 1, 2), ("5", 3, 4), ("6", 4, 5))
            assert sample.reward == rollout.response_ids[0] + rollout.prompt_index
    made.close()


@pytest.mark.parametrize(
    ("reward", "timeout_s", "text"),
    [
        (lambda answered: [0.0], HANG_S, r"returned \[0.0\] for 2 responses"),
        (lambda answered: [math.nan, 1.0], HANG_S, "one finite number for each"),
        (lambda answered: 3, HANG_S, "returned 3 for 2 responses"),
        (lambda answered: {}["x"], HANG_S, "raised KeyError: 'x'"),
        (lambda answered: threading.Event().wait(), 0.2, r"no answer for 2 responses within 0\.2 s"),
    ],
)
def test_a_reward_is_held_to_its_word(reward: Reward, timeout_s: float, text: str) -> None:
    """Too few values, nan, something else, an exception, a hang: each is one message that names the reward."""
    answered = [Answered(PROBLEMS[0], [1], "1", "stop")] * 2
    with pytest.raises(RewardError, match=f"reward = mine: {text}|{text}"):
        BoundedReward(reward, "mine", timeout_s)(answered)


def test_repetition_is_recognised() -> None:
    """Loops are repetitive, varied text and short responses are not."""
    rng = np.random.default_rng(0)
    assert is_repetitive([5, 6, 7] * 40)
    assert not is_repetitive(rng.integers(0, 50000, 100).tolist())
    assert not is_repetitive([1] * 20)


def test_pass_at_k_is_unbiased() -> None:
    """Over all subsets of k of n samples, the share that holds a right one equals the estimator (Chen et al. 2021)."""
    for n, correct, k in [(5, 2, 3), (4, 0, 2), (4, 4, 1), (6, 1, 4)]:
        outcomes = [any(i < correct for i in subset) for subset in itertools.combinations(range(n), k)]
        assert pass_at_k(n, correct, k) == pytest.approx(sum(outcomes) / len(outcomes))


def test_bootstrap_interval_covers_the_mean() -> None:
    """The 95% interval contains the truth in about 95% of repetitions, and is a point for constants."""
    rng = np.random.default_rng(0)
    hits = sum(low <= 0.3 <= high for _, low, high in (bootstrap_mean(rng.random(60) < 0.3) for _ in range(200)))
    assert 175 <= hits <= 200
    assert bootstrap_mean(np.ones(5)) == (1.0, 1.0, 1.0)


class KnownModel:
    """Answers every second seed rightly; its distribution is uniform over the vocabulary."""

    vocab_size = 8

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        sampling: SamplingParams,
        seeds: Sequence[int],
        weight_version: str | None = None,
    ) -> list[Generation]:
        return [
            Generation([i % 2, 7], np.zeros(2, np.float32), "length" if i == 0 else "stop", 7, "0")
            for i in range(len(prompts))
        ]

    def score(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        /,
        *,
        top_k: int,
        weight_version: str | None = None,
    ) -> list[TopKSignal | None]:
        logprobs = np.full((2, top_k), -math.log(self.vocab_size), np.float32)
        ids = np.tile(np.arange(top_k, dtype=np.int32), (2, 1))
        scores = TopKSignal(np.zeros(2, np.float32), ids, logprobs, np.zeros((2, 0), np.float32))
        return [scores for _ in sequences]


def starts_with_one(answered: Sequence[Answered], /) -> list[float]:
    """Right if the text starts with 1."""
    return [float(one.text.startswith("1")) for one in answered]


def test_evaluation_counts() -> None:
    """Avg@k, Pass@k, truncation, stop reasons and entropy of a model that is known."""
    problems = [Problem(str(i), (Message("user", "?"),), "1") for i in range(3)]
    evaluation = evaluate(
        PromptSet(problems, [[1, 2]] * 3),
        KnownModel(),
        starts_with_one,
        EvalConfig(num_problems=3, samples_per_problem=2),
        stop_token_ids=(7,),
        decode=lambda ids: "".join(map(str, ids)),
        seed=0,
        step=9,
    )
    summary = evaluation.summary
    assert (summary.avg_at_k, summary.pass_at_k, summary.k, summary.step) == (0.5, 1.0, 2, 9)
    assert summary.truncated_frac == pytest.approx(1 / 6)
    assert summary.stop_reasons == {"7": 5, "length": 1}
    assert summary.entropy_nats == pytest.approx(math.log(8), rel=1e-6)
    assert summary.entropy_gap_nats == pytest.approx(0, abs=1e-6)
    assert summary.maj_at_k == 1.0  # no boxes: right answers vote for themselves, wrong ones for nothing
    assert len(evaluation.responses) == 6


def test_maj_at_k() -> None:
    """The most frequent answer counts, right ones together however written; ties by share; no answer is no vote."""
    assert maj_at_k(["5", "5.0", "7"], [True, True, False]) == 1.0
    assert maj_at_k(["7", "7", "5"], [False, False, True]) == 0.0
    assert maj_at_k(["7", "5", None], [False, True, False]) == 0.5
    assert maj_at_k(["1", "2", "3", "5"], [False, False, False, True]) == 0.25
    assert maj_at_k([None, None, None, "5"], [False, False, False, True]) == 1.0
    assert maj_at_k([None, None], [False, False]) == 0.0
    assert answer_given("so \\boxed{ 7. } then \\boxed{8}") == "8"
    assert answer_given("8") is None


def test_entropy_with_a_tail_brackets_the_truth() -> None:
    """With only the top k known, the entropy is a lower bound and the gap reaches the truth."""
    model = KnownModel()
    model.vocab_size = 2000  # the model is uniform over 2000, of which 64 are reported
    entropy, gap = entropy_nats(model, [([1], [2, 3])])
    assert entropy < math.log(2000) <= entropy + gap + 1e-6
