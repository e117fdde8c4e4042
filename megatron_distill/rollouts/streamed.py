"""The built-in source: a step's responses at once, each scored and judged the moment it ends.

    place 0   prompt ── student writes ──────────┐── teacher scores ──┐
    place 1   prompt ── teacher writes ──┐── teacher scores ──┐       │      both authors begin together,
    place 2   prompt ── student writes ──────┐── scores ──┐   │       │      the longest prompts first
                                         judge:  1    2 . . . 0       │
                                                                      └──> samples, in the order of places

When a request is sent cannot change its answer (see ``order``), so the bits are those of one request after another. With
``rollouts.max_staleness_steps`` of 2 or more weights change under a response (see ``ahead``), and several steps are drawn at
once, the requests of the earlier ones first.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

from megatron_distill.errors import TeacherError
from megatron_distill.rewards import Answered, Judged, Reward, WeightedReward
from megatron_distill.rollouts.advantages import with_advantages
from megatron_distill.rollouts.environment import Episode, Turns
from megatron_distill.rollouts.order import sampling_of, sampling_seed, student_writes
from megatron_distill.rollouts.solutions import check_solutions, cut_solution, encode_solution
from megatron_distill.rollouts.source import IN_FLIGHT, Collected, Share, SourceContext
from megatron_distill.types import Author, Rollout, Sample, Signal, SinceVersion, WantedVersion

_OFF_POLICY_SERIAL = 1 << 40  # seeds of what the student does not write lie apart from its own


@dataclass(frozen=True)
class Place:
    """One response to be made.

    Attributes:
        problem_index: position of the problem in the training set, 0-based.
        author: who writes it.
        seed: its sampling seed, 31 bits.
    """

    problem_index: int
    author: Author
    seed: int


class StreamedSource:
    """See the module's docstring; every replica's leader has one."""

    def __init__(self, context: SourceContext) -> None:
        """Prepare threads, and the data's solutions if the data writes.

        Raises:
            DataError: the data is to write, and a problem has no solution.
        """
        self._context, self._version = context, 0
        config = context.config
        num_student = config.servers.student_replicas * config.servers.requests_per_replica
        num_teacher = max(config.servers.teacher_replicas, 1) * config.servers.requests_per_replica
        self._writers = ThreadPoolExecutor(num_student + num_teacher, thread_name_prefix="rollout")
        self._scorers = ThreadPoolExecutor(num_teacher, thread_name_prefix="score")
        self._judges = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._solutions = _solutions(context) if config.writes_solutions else []

    def weights_changed(self, version: int) -> None:
        """See ``RolloutSource``."""
        self._version = version

    def take(self, step: int, share: Share, horizon_tokens: int) -> Collected:
        """See ``RolloutSource``."""
        began = time.perf_counter()
        reward = self._context.reward
        judge = _Judge(reward, self._judges) if reward is not None else None
        places = self._places(step, share)
        prompts = self._context.train.prompts
        longest_first = sorted(range(len(places)), key=lambda i: len(prompts[places[i].problem_index]), reverse=True)
        wanted = self._wanted(step)
        writing = {self._writers.submit(self._write, places[i], horizon_tokens, wanted): i for i in longest_first}
        rollouts: dict[int, Rollout] = {}
        scoring: dict[int, Future[Signal | None]] = {}
        try:
            for done in as_completed(writing):
                place, rollout = writing[done], done.result()
                rollouts[place] = rollout
                if self._context.teacher is not None:
                    scoring[place] = self._scorers.submit(self._score, rollout)
                if judge is not None:
                    judge.add(place, self._answered(rollout))
            written = time.perf_counter()
            signals = {place: score.result() for place, score in scoring.items()}
            rewards = judge.take() if judge is not None else {}
        except BaseException:
            unfinished: list[Future[Any]] = [*writing, *scoring.values()]
            for future in unfinished:
                future.cancel()
            raise
        samples = [Sample(rollouts[i], signals.get(i)) for i in range(len(places))]
        self._check_missing(samples)
        if rewards:
            config = self._context.config
            in_order = [rewards[i] for i in range(len(places))]
            samples = [replace(one, reward_parts=judged.parts) for one, judged in zip(samples, in_order, strict=True)]
            totals = [judged.total for judged in in_order]
            samples = with_advantages(samples, totals, config.rollouts.rollouts_per_prompt, config.rl)
        return Collected(samples, {"rollout_s": written - began, "score_s": time.perf_counter() - written})

    def _wanted(self, step: int) -> WantedVersion:
        """Which weights may draw the student's responses of ``step``, which is begun now."""
        staleness = self._context.config.rollouts.max_staleness_steps
        return SinceVersion(max(0, step - staleness)) if staleness >= IN_FLIGHT else str(self._version)

    def _places(self, step: int, share: Share) -> list[Place]:
        """The responses of this replica's part of the step, prompt-major."""
        context, config = self._context, self._context.config
        per_prompt, seed = config.rollouts.rollouts_per_prompt, config.seed
        per_replica = config.rollouts.prompts_per_step // share.size
        first = step * config.rollouts.prompts_per_step + share.rank * per_replica
        frac = config.rollouts.student_prefix_frac.at(step)
        places = []
        for offset in range(per_replica):
            index = context.train.index_at(first + offset, seed)
            is_students = student_writes(share.rank * per_replica + offset, frac)
            # The student's responses differ from visit to visit; others' are a data set, the same at every visit.
            serial = (first + offset) * per_prompt if is_students else _OFF_POLICY_SERIAL + index * per_prompt
            author: Author = "student" if is_students else config.rollouts.off_policy_source
            places += [Place(index, author, sampling_seed(seed, serial + number)) for number in range(per_prompt)]
        return places

    def _write(self, place: Place, horizon_tokens: int, wanted: WantedVersion) -> Rollout:
        """One finished response."""
        context = self._context
        prompt_ids = context.train.prompts[place.problem_index]
        if place.author == "data":
            episode = cut_solution(self._solutions[place.problem_index], horizon_tokens)
        else:
            episode = self._respond(place, prompt_ids, horizon_tokens, wanted)
        spans = episode.version_spans if place.author == "student" else ()
        versions = [int(span.version) for span in spans] or [0]
        return Rollout(
            prompt_index=place.problem_index,
            prompt_ids=list(prompt_ids),
            response_ids=episode.response_ids,
            sampler_logprobs=episode.sampler_logprobs,
            author=place.author,
            oldest_version=min(versions),
            newest_version=max(versions),
            stop_reason=episode.stop_reason,
            is_learnt=episode.is_learnt,
            version_spans=spans if len(set(versions)) > 1 else (),
        )

    def _respond(self, place: Place, prompt_ids: list[int], horizon_tokens: int, wanted: WantedVersion) -> Episode:
        context = self._context
        is_students = place.author == "student"
        sampler = context.student if is_students else context.teacher_sampler
        assert sampler is not None, (
            "the teacher writes, but its server was not started: preflight should have seen to it"
        )
        turns = Turns(
            sampler,
            sampling=sampling_of(context.config.rollouts, horizon_tokens, context.stop_token_ids),
            seed=place.seed,
            num_prompt_tokens=len(prompt_ids),
            weight_version=wanted if is_students else None,
            tokenizer=context.tokenizer,
        )
        return context.environment(context.train.problems[place.problem_index], list(prompt_ids), turns)

    def _score(self, rollout: Rollout) -> Signal | None:
        assert self._context.teacher is not None
        [signal] = self._context.teacher.score([rollout])
        return signal

    def _answered(self, rollout: Rollout) -> Answered:
        problem = self._context.train.problems[rollout.prompt_index]
        return Answered(problem, rollout.response_ids, self._context.decode(rollout.response_ids), rollout.stop_reason)

    def _check_missing(self, samples: Sequence[Sample]) -> None:
        """Refuse to go on with too few scores: a loss over the rest would be biased."""
        missing = sum(sample.signal is None for sample in samples) if self._context.teacher is not None else 0
        limit = self._context.config.teacher.max_missing_frac
        if missing > limit * len(samples):
            raise TeacherError(
                f"missing_teacher_frac = {missing}/{len(samples)}: must not exceed teacher.max_missing_frac = {limit}. "
                "Unscored rollouts are left out of the loss, and this many would bias it. See the teacher's log, then start "
                "the same command again to resume."
            )

    def close(self) -> None:
        """End the threads."""
        for pool in (self._writers, self._scorers, self._judges):
            pool.shutdown(wait=False, cancel_futures=True)


class _Judge:
    """Judges whatever has ended of one step since it last looked: few calls when it is slow, early ones when not."""

    def __init__(self, reward: Reward, thread: ThreadPoolExecutor) -> None:
        self._reward = reward if isinstance(reward, WeightedReward) else WeightedReward({"reward": (reward, 1.0)})
        self._thread = thread
        self._lock = threading.Lock()
        self._waiting: dict[int, Answered] = {}
        self._calls: list[Future[dict[int, Judged]]] = []

    def add(self, place: int, answered: Answered) -> None:
        with self._lock:
            self._waiting[place] = answered
        self._calls.append(self._thread.submit(self._look))

    def _look(self) -> dict[int, Judged]:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        return dict(zip(waiting, self._reward.judge(list(waiting.values())), strict=True)) if waiting else {}

    def take(self) -> dict[int, Judged]:
        """The reward of every place added."""
        return {place: reward for call in self._calls for place, reward in call.result().items()}


def _solutions(context: SourceContext) -> list[list[int]]:
    check_solutions(context.train.problems, context.config.data)
    stop = context.stop_token_ids[0]
    return [encode_solution(problem, context.tokenizer, stop) for problem in context.train.problems]
