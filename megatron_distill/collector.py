"""Everything a replica's leader needs outside Megatron: prompts, servers, teacher, verifier.

In: a run's config, the servers' addresses. Out: samples for a step, evaluations, and servers that hold new weights.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_distill.batches import Sample
from megatron_distill.config import RunConfig
from megatron_distill.convert.hf_config import HfConfig
from megatron_distill.errors import ServerError
from megatron_distill.evaluate import Evaluation, evaluate
from megatron_distill.prompts import encode_prompt, load_problems
from megatron_distill.rewards import MathVerifier
from megatron_distill.rollouts import Share, StepRequest, Stopwatch, collect_rollouts, score_rollouts
from megatron_distill.run_folder import RunFolder, append
from megatron_distill.sglang.client import SGLangClient
from megatron_distill.sglang.server import answers
from megatron_distill.teacher import SGLangTopKTeacher
from megatron_distill.types import SamplingParams
from megatron_distill.vocabulary import Vocabulary

SAMPLES_PER_STEP = 2  # rollouts of each step that samples.jsonl keeps


@dataclass(frozen=True)
class Endpoints:
    """Where the servers of a run listen.

    Attributes:
        student: URLs of the student's replicas.
        teacher: URLs of the teacher's replicas; empty if no server is needed.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]


@dataclass(frozen=True)
class Collected:
    """What a leader brings back for one step: its replica's samples, and the seconds each phase took."""

    samples: list[Sample]
    seconds: dict[str, float]


class Collector:
    """A leader's connections. Building it reads the data and touches no server."""

    def __init__(self, config: RunConfig, folder: RunFolder, endpoints: Endpoints, vocabulary: Vocabulary) -> None:
        """Read problems and prepare clients.

        Raises:
            DataError: for problems that cannot be read.
        """
        self._config, self._folder, self._vocabulary = config, folder, vocabulary
        data = config.data
        read = {"prompt_key": data.prompt_key, "answer_key": data.answer_key}
        self._train = load_problems(data.train_path, **read)
        self._heldout = load_problems(data.heldout_path, **read)
        self._train_prompts = [encode_prompt(vocabulary.tokenizer, problem) for problem in self._train]
        self._heldout_prompts = [encode_prompt(vocabulary.tokenizer, problem) for problem in self._heldout]
        self._endpoints = endpoints
        self.student = self._client(endpoints.student, "student", config.student.path)
        self.teacher_client = (
            self._client(endpoints.teacher, "teacher", config.teacher.path) if endpoints.teacher else None
        )
        self._teacher = (
            SGLangTopKTeacher(self.teacher_client, top_k=config.teacher.top_k, stop_token_ids=vocabulary.stop_token_ids)
            if config.teacher.transport == "sglang_topk" and self.teacher_client is not None
            else None
        )
        self._verifier = MathVerifier()

    def _client(self, urls: Sequence[str], role: str, path: str) -> SGLangClient:
        servers = self._config.servers
        return SGLangClient(
            urls,
            vocab_size=HfConfig.from_dir(path).vocab_size,
            context_length=server_context_length(self._config),
            num_connections=servers.requests_per_replica,
            timeout_s=servers.request_timeout_s,
            log_files={url: self._folder.logs / f"{role}-{index}.log" for index, url in enumerate(urls)},
        )

    def wait_ready(self, progress: Callable[[str], None]) -> None:
        """Wait until every server answers.

        Raises:
            ServerError: if one does not within ``servers.startup_timeout_s``, or its role reported a failure.
        """
        began = time.monotonic()
        next_report = 5.0
        for role, url in [("student", url) for url in self._endpoints.student] + [
            ("teacher", url) for url in self._endpoints.teacher
        ]:
            while not answers(url):
                waited = time.monotonic() - began
                failure = self._folder.first_failure()
                if failure is not None:
                    raise ServerError(failure["message"])
                if waited > self._config.servers.startup_timeout_s:
                    raise ServerError(
                        f"servers.startup_timeout_s = {self._config.servers.startup_timeout_s:.0f}: the {role} server "
                        f"at {url} did not become ready in time. See its log in {self._folder.logs}, or raise the limit."
                    )
                if waited > next_report:
                    progress(f"waiting for the {role} server")
                    next_report = waited + 10.0
                time.sleep(0.5)

    def collect(self, step: int, share: Share, horizon_tokens: int) -> Collected:
        """Sample and score this replica's rollouts of ``step``.

        Raises:
            ServerError: if a server is lost.
            TeacherError: if too many scores are missing.
        """
        config, watch = self._config, Stopwatch()
        rollouts_config = config.rollouts
        request = StepRequest(
            step=step,
            prompts_per_step=rollouts_config.prompts_per_step,
            rollouts_per_prompt=rollouts_config.rollouts_per_prompt,
            student_prefix_frac=rollouts_config.student_prefix_frac.at(step),
            sampling=SamplingParams(
                max_new_tokens=horizon_tokens,
                temperature=rollouts_config.temperature,
                top_p=rollouts_config.top_p,
                top_k=rollouts_config.top_k,
                stop_token_ids=self._vocabulary.stop_token_ids,
            ),
            seed=config.seed,
        )
        rollouts = collect_rollouts(self._train_prompts, request, share, self.student, self.teacher_client)
        watch.lap("rollout_s")
        samples = score_rollouts(rollouts, self._teacher, config.teacher.max_missing_frac)
        watch.lap("score_s")
        if share.rank == 0:
            for sample in samples[:SAMPLES_PER_STEP]:
                append(self._folder.samples, self._readable(step, sample))
        return Collected(samples, watch.seconds)

    def _readable(self, step: int, sample: Sample) -> dict[str, Any]:
        rollout, decode = sample.rollout, self._vocabulary.decode
        problem = self._train[rollout.prompt_index]
        return {
            "step": step + 1,
            "id": problem.id,
            "written_by": "student" if rollout.weight_version >= 0 else "teacher",
            "weight_version": rollout.weight_version,
            "stop_reason": rollout.stop_reason,
            "prompt": decode(rollout.prompt_ids),
            "response": decode(rollout.response_ids),
            "answer": problem.answer,
        }

    def evaluate(self, step: int) -> Evaluation:
        """Measure the weights that the student's servers hold, and write the result to the run folder."""
        evaluation = evaluate(
            self._heldout,
            self._heldout_prompts,
            self.student,
            self._verifier,
            self._config.evaluation,
            stop_token_ids=self._vocabulary.stop_token_ids,
            decode=self._vocabulary.decode,
            seed=self._config.seed,
            step=step,
        )
        evaluation.save(self._folder.evals)
        return evaluation

    def load_weights(self, path: Path, version: int) -> None:
        """Make every student server load ``path`` and prove that it did.

        Raises:
            ServerError: naming the replica that refused.
        """
        self.student.update_weights_from_disk(path, str(version))

    def close(self) -> None:
        """End the verifier's process and the connections."""
        self._verifier.close()
        self.student.close()
        if self.teacher_client is not None:
            self.teacher_client.close()


def server_context_length(config: RunConfig) -> int:
    """Tokens that a server must hold: the longest sequence, and the 8 places that SGLang keeps for itself."""
    return config.max_sequence_tokens + 8
