"""What a replica's leader asks: prompts, servers, teacher, reward, put together from what the config names.

In: a run's config, the servers' addresses. Out: a ``Leader``: samples for a step, evaluations, a client to push weights to.
Every name in the config that may be a user's function is looked up here.
"""

import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_distill.config import RunConfig
from megatron_distill.config.loading import load_function
from megatron_distill.evaluate.heldout import HeldOut, MeasuredSet
from megatron_distill.evaluate.sets import load_sets
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.models.vocabulary import Vocabulary
from megatron_distill.rewards import WeightedReward, load_reward, weights_of
from megatron_distill.rollouts.ahead import Ahead
from megatron_distill.rollouts.environment import Environment, single_turn
from megatron_distill.rollouts.prompts import PromptSet, load_prompt_set, load_training_set
from megatron_distill.rollouts.readable import by_token
from megatron_distill.rollouts.sample_store import SampleStore
from megatron_distill.rollouts.source import IN_FLIGHT, Collected, MakeSource, RolloutSource, Share, SourceContext
from megatron_distill.rollouts.streamed import StreamedSource
from megatron_distill.runs.checkpoints import steps_on_disk
from megatron_distill.runs.run_folder import RunFolder, append
from megatron_distill.runs.timeline import Timeline
from megatron_distill.sglang.client import SGLangClient
from megatron_distill.sglang.readiness import wait_ready
from megatron_distill.teacher import (
    TRANSPORTS,
    CachedSampler,
    MakeTeacher,
    PrivilegedTeacher,
    Teacher,
    TeacherContext,
    served_identity,
    teacher_prompts,
)
from megatron_distill.training.beside import EvaluationBeside
from megatron_distill.training.components import load_components
from megatron_distill.types import Generation, Sample, Sampler

SAMPLES_PER_STEP = 2  # rollouts of each step that samples.jsonl keeps
SOURCES: dict[str, MakeSource] = {"streamed": StreamedSource}
ENVIRONMENTS: dict[str, Environment] = {"single_turn": single_turn}


@dataclass(frozen=True)
class Endpoints:
    """Where the servers of a run listen.

    Attributes:
        urls: of the replicas of each role ("student", "teacher", "evaluation") that the run starts.
        key: what all of them ask for.
    """

    urls: Mapping[str, tuple[str, ...]]
    key: str


class Leader:
    """Everything a leader needs outside Megatron. Building it reads the data and touches no server.

    Attributes:
        student: client of the student's servers.
        heldout: measures what they hold.
        beside: evaluates beside training, on servers of its own; None without such.
        ahead: draws the samples.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        endpoints: Endpoints,
        vocabulary: Vocabulary,
        dp_rank: int = 0,
        must_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read problems, prepare clients, look up what the config names.

        Args:
            config: the run's, as config.json holds it.
            folder: where the run is recorded.
            endpoints: its servers.
            vocabulary: shared by student and teacher.
            dp_rank: of the replica: each leader begins with another server, so that few responses spread over all.
            must_stop: whether this process was told to end, so that nobody need wait any more.

        Raises:
            DataError: for problems that cannot be read.
            ConfigError: for a name that stands for nothing.
        """
        self._config, self._folder, self._endpoints, self._vocabulary = config, folder, endpoints, vocabulary
        tokenizer = vocabulary.tokenizer
        self._train = load_training_set(config.data, tokenizer)
        for note in self._train.notes if dp_rank == 0 else ():
            folder.event("data", note)
        self._timeline = Timeline(folder.timeline)
        self.student = self._client("student", dp_rank)
        self._teacher_client = self._client("teacher", dp_rank) if "teacher" in endpoints.urls else None
        self._teacher = _teacher(config, self._train, vocabulary, self._teacher_client)
        names = {name for name, _ in weights_of(config.rl).values()} if config.rl.weight else set()
        self._rewards = {name: load_reward(name, config.rl.reward_timeout_s) for name in names}
        self._source = self._make_source()
        staleness = config.rollouts.max_staleness_steps
        self._is_in_flight, self._num_dropped = staleness >= IN_FLIGHT, 0
        store = SampleStore(folder.ahead) if 0 < staleness < IN_FLIGHT else None
        self.ahead = Ahead(self._source, store, must_stop, num_steps=1 + staleness if self._is_in_flight else 1)
        self._sets = self._make_sets()
        self.heldout = self._make_heldout(self.student)
        self.beside: EvaluationBeside | None = None
        if dp_rank == 0 and "evaluation" in endpoints.urls:
            client = self._client("evaluation", dp_rank)
            self.beside = EvaluationBeside(folder, self._make_heldout(client), client, must_stop)

    def _make_sets(self) -> dict[str, MeasuredSet]:
        """Each with a reward of its own, which the source's threads do not call."""
        sets = load_sets(self._config)
        judges = {
            name: load_reward(name, self._config.rl.reward_timeout_s) for name in {one.settings.reward for one in sets}
        }
        self._judges = judges
        return {
            one.name: MeasuredSet(
                load_prompt_set(one.path, one.data, self._vocabulary.tokenizer),
                one.settings,
                judges[one.settings.reward],
            )
            for one in sets
        }

    def _make_heldout(self, client: SGLangClient) -> HeldOut:
        return HeldOut(
            self._config,
            self._folder,
            self._sets,
            client,
            stop_token_ids=self._vocabulary.stop_token_ids,
            decode=self._vocabulary.decode,
        )

    def _make_source(self) -> RolloutSource:
        config, vocabulary = self._config, self._vocabulary
        context = SourceContext(
            config=config,
            train=self._train,
            tokenizer=vocabulary.tokenizer,
            stop_token_ids=vocabulary.stop_token_ids,
            student=self.student,
            teacher_sampler=_teacher_sampler(config, self._teacher_client),
            teacher=self._teacher,
            reward=self._weighted_reward() if config.rl.weight else None,
            environment=_environment(config),
        )
        return _make_source(config)(context)

    def _weighted_reward(self) -> WeightedReward:
        weights = weights_of(self._config.rl)
        return WeightedReward({short: (self._rewards[name], weight) for short, (name, weight) in weights.items()})

    def _client(self, role: Literal["student", "teacher", "evaluation"], dp_rank: int) -> SGLangClient:
        config, servers, urls = self._config, self._config.servers, self._endpoints.urls[role]
        model = config.teacher if role == "teacher" else config.student
        return _TimedClient(
            urls,
            vocab_size=HfConfig.from_dir(model.path).vocab_size,
            context_length=config.server_context_tokens,
            num_connections=servers.requests_per_replica,
            key=self._endpoints.key,
            timeout_s=servers.request_timeout_s,
            min_tokens_per_s=servers.min_tokens_per_s,
            unreachable_s=servers.hang_timeout_s + servers.startup_timeout_s,  # a hung server's end, and its restart
            first_replica=dp_rank * len(urls) // config.student.parallel.dp,
            log_files={url: self._folder.logs / f"{role}-{index}.log" for index, url in enumerate(urls)},
            busy=functools.partial(self._timeline.busy, role),
        )

    def wait_ready(self, progress: Callable[[str], None]) -> None:
        """Wait until every server answers.

        Raises:
            ServerError: one does not within ``servers.startup_timeout_s``, or its role reported a failure.
        """
        servers = [(role, url) for role, urls in self._endpoints.urls.items() for url in urls]
        wait_ready(
            servers,
            timeout_s=self._config.servers.startup_timeout_s,
            failure=lambda: (self._folder.first_failure() or {}).get("message"),
            progress=progress,
        )

    def take(self, step: int, share: Share, horizon_tokens: int) -> Collected:
        """The samples of ``step``, a few of which go to ``samples.jsonl``; see ``rollouts.ahead``."""
        self._timeline.is_kept = share.rank == 0
        collected = self.ahead.take(step, share, horizon_tokens)
        self._timeline.flush()
        self.ahead.forget([*steps_on_disk(self._folder), step, step - 1], share.rank)
        if share.rank == 0:
            for sample in collected.samples[:SAMPLES_PER_STEP]:
                append(self._folder.samples, self._readable(step, sample))
        if not self._is_in_flight:
            return collected
        before, self._num_dropped = self._num_dropped, self.student.counters["too_old"]
        return replace(collected, num_dropped=self._num_dropped - before)

    def weights_changed(self, version: int, arrival: Future[float]) -> None:
        """The student's servers hold the weights behind ``version`` optimizer steps once ``arrival`` is done."""
        self.ahead.weights_changed(version, arrival)
        self.heldout.weights_changed(version)

    def _readable(self, step: int, sample: Sample) -> dict[str, Any]:
        rollout, decode = sample.rollout, self._vocabulary.decode
        problem = self._train.problems[rollout.prompt_index]
        reward: dict[str, Any] = (
            {} if math.isnan(sample.reward) else {"reward": sample.reward, "advantage": sample.advantage}
        )
        facts: dict[str, Any] = {
            "step": step + 1,
            "id": problem.id,
            "written_by": rollout.author,
            "weight_version": rollout.newest_version if rollout.author == "student" else None,
            "stop_reason": rollout.stop_reason,
            "prompt": decode(rollout.prompt_ids),
            "response": decode(rollout.response_ids),
            "answer": problem.answer,
        }
        if rollout.version_spans:
            facts["version_spans"] = rollout.version_spans
        if sample.reward_parts:
            reward["reward_parts"] = dict(sample.reward_parts)
        return facts | reward | by_token(sample, decode, self._config.rollouts.temperature)

    def close(self) -> None:
        """End the judges, the threads and the connections."""
        judges = (*self._rewards.values(), *self._judges.values())
        for part in (self.beside, self.ahead, *judges, self.student, self._teacher_client, self._teacher):
            close = getattr(part, "close", None)
            if close is not None:
                close()


class _TimedClient(SGLangClient):
    """A client whose time with its servers is recorded, whoever asks: source, teacher or evaluation."""

    def __init__(self, *args: Any, busy: Callable[[], AbstractContextManager[None]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._busy = busy

    def generate(self, *args: Any, **kwargs: Any) -> list[Generation]:
        with self._busy():
            return super().generate(*args, **kwargs)

    def score(self, *args: Any, **kwargs: Any) -> Any:
        with self._busy():
            return super().score(*args, **kwargs)

    def hidden_states(self, *args: Any, **kwargs: Any) -> Any:
        with self._busy():
            return super().hidden_states(*args, **kwargs)


def check_functions(config: RunConfig) -> None:
    """Look up every function that a run's leader will call, so that a bad one is told before servers start.

    Raises:
        ConfigError: for the first name that stands for nothing, or for a function that cannot be called so.
    """
    _environment(config)
    _make_source(config)
    rewards = [one.settings.reward for one in load_sets(config)]
    if config.rl.weight:
        rewards += [name for name, _ in weights_of(config.rl).values()]
    for name in dict.fromkeys(rewards):
        load_reward(name, config.rl.reward_timeout_s).close()
    if config.distill.weight and not config.teacher.in_trainer:
        _make_teacher(config)
    load_components(config)


def _environment(config: RunConfig) -> Environment:
    arguments = ("problem", "prompt_ids", "turns")
    return load_function(config.rollouts.environment, ENVIRONMENTS, "rollouts.environment", arguments)


def _make_source(config: RunConfig) -> MakeSource:
    return load_function(config.rollouts.source, SOURCES, "rollouts.source", ("context",))


def _make_teacher(config: RunConfig) -> MakeTeacher:
    return load_function(config.teacher.transport, TRANSPORTS, "teacher.transport", ("context",))


def _teacher(
    config: RunConfig, train: PromptSet, vocabulary: Vocabulary, client: SGLangClient | None
) -> Teacher | None:
    """Who scores responses; None if nobody is asked."""
    if not config.distill.weight or config.teacher.in_trainer:
        return None
    context = TeacherContext(config, train.problems, vocabulary.size, vocabulary.stop_token_ids, client)
    teacher = _make_teacher(config)(context)
    prompts = teacher_prompts(config, train.problems, vocabulary.tokenizer)
    return PrivilegedTeacher(teacher, prompts) if prompts is not None else teacher


def _teacher_sampler(config: RunConfig, client: SGLangClient | None) -> Sampler | None:
    """Who writes the teacher's responses, behind the disk cache if there is one."""
    if not config.teacher_writes or client is None:
        return None
    if not config.teacher.cache_dir:
        return client
    identity = served_identity(config)
    return CachedSampler(client, Path(config.teacher.cache_dir), identity=identity)
