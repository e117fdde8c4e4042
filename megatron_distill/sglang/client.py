"""The typed client of SGLang: prompts in, responses out; sequences in, a teacher's log-probabilities out; weights in.

    client = SGLangClient([student.url], vocab_size=151936, context_length=4096)
    samples = client.generate(prompts_ids, sampling=SamplingParams(max_new_tokens=128), seeds=range(len(prompts_ids)))
    scores = teacher.score([(prompt_ids, sample.response_ids) ...], top_k=64, stop_token_ids=(151643, 151645))
    client.update_weights_from_disk(export_dir, version="7")

One request carries one sequence, so that a bad one fails alone, and a thread pool keeps many under way. Everything is
validated before it is sent (a server dies of one bad token id) and after it came back; ``wire`` holds those rules and
``transport`` what is retried. Start servers with ``server``.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_distill.errors import ConfigError, DataError
from megatron_distill.sglang import wire
from megatron_distill.sglang.control import ReplicaControl
from megatron_distill.sglang.transport import GaveUp, ReplicaPool
from megatron_distill.types import Generation, HiddenSignal, SamplingParams, TopKSignal, WantedVersion

Ids = Sequence[int]
RequestProgress = Callable[[int, int], None]
"""Receives the number of requests done and their total, after each."""


class SGLangClient(ReplicaControl):
    """Talks to replicas that serve the same weights, choosing the least loaded for each request. Thread-safe."""

    def __init__(
        self,
        urls: Sequence[str],
        vocab_size: int,
        context_length: int,
        *,
        num_connections: int = 32,
        key: str = "",
        timeout_s: float = 300.0,
        min_tokens_per_s: float = 10.0,
        unreachable_s: float = 20.0,
        control_timeout_s: float = 1800.0,
        first_replica: int = 0,
        log_files: Mapping[str, Path] | None = None,
    ) -> None:
        """Open no connection yet.

        Args:
            urls: one URL for each replica; workers themselves, not a router (it drops the top-k flags).
            vocab_size: of the model's config. Not the tokenizer's, which may be smaller.
            context_length: the one the servers were started with, in tokens.
            num_connections: requests under way at once, for each replica.
            key: what the servers ask for; ``SGLangServer.key``.
            timeout_s: longest wait for a reply of no tokens; it is asked for twice more.
            min_tokens_per_s: slowest rate at which a response may be drawn: its limit is longer by its tokens over this.
            unreachable_s: how long no replica may accept connections before the client gives up on all of them. It has to
                cover a server's restart if somebody restarts it.
            control_timeout_s: longest wait for a weight update or a pause.
            first_replica: which one gets the first request, so that several clients of the same servers spread.
            log_files: the servers' logs by URL, to quote from when they die.
        """
        if not urls or vocab_size < 1 or context_length <= wire.RESERVED_TOKENS:
            raise ConfigError(
                f"SGLangClient = {len(urls)} urls, vocab_size {vocab_size}, context_length {context_length}: needs a url, a "
                f"vocabulary and more than {wire.RESERVED_TOKENS} tokens. SGLang keeps those. Pass the servers' own values."
            )
        self.vocab_size = vocab_size
        self.context_length = context_length
        pool = ReplicaPool(
            urls,
            num_connections=num_connections,
            unreachable_s=unreachable_s,
            log_files=log_files or {},
            key=key,
            first_replica=first_replica,
        )
        self._timeout_s, self._min_tokens_per_s = timeout_s, min_tokens_per_s
        super().__init__(pool, control_timeout_s)
        self._threads = ThreadPoolExecutor(num_connections * len(urls), thread_name_prefix="sglang-client")

    @property
    def counters(self) -> Counter[str]:
        """How often since the start: retries, too_old, resets, unreachable, quarantined, missing_scores."""
        return Counter(self._pool.counters)

    def generate(
        self,
        prompts_ids: Sequence[Ids],
        *,
        sampling: SamplingParams,
        seeds: Sequence[int],
        weight_version: WantedVersion = None,
        progress: RequestProgress | None = None,
    ) -> list[Generation]:
        """Sample one response to each prompt. For several to one prompt, repeat it with other seeds.

        Args:
            prompts_ids: prompts of [P] token ids each.
            sampling: how tokens are drawn, for all of them.
            seeds: one for each prompt, in [0, 2**63). On a server started with ``deterministic`` the same prompt, seed and
                weights give the same response, so seeds of one prompt must differ.
            weight_version: of the weights that may draw it: one version, or any since one; None takes any one.
            progress: called after each response.

        Returns:
            One generation for each prompt, in order.

        Raises:
            DataError: a token id, a length or a parameter that the server could not take. Nothing was sent.
            StaleWeightsError: no server that can be reached serves ``weight_version``.
            ServerError: a response could not be got.
        """
        timeout_s = self._timeout_s + sampling.max_new_tokens / self._min_tokens_per_s
        self._check_sampling(sampling)
        if len(seeds) != len(prompts_ids) or any(not 0 <= seed < 2**63 for seed in seeds):
            raise DataError(
                f"generate.seeds = {len(seeds)} seeds for {len(prompts_ids)} prompts: one for each, in [0, 2**63). Equal "
                "prompts with equal seeds get equal responses. Pass for example range(len(prompts_ids))."
            )
        prompts = [
            wire.check_token_ids(f"generate.prompts_ids[{i}]", ids, self.vocab_size)
            for i, ids in enumerate(prompts_ids)
        ]
        for i, prompt in enumerate(prompts):
            num_tokens = len(prompt) + sampling.max_new_tokens
            wire.check_length(f"generate.prompts_ids[{i}] + max_new_tokens", num_tokens, self.context_length)

        def one(prompt: list[int], seed: int, cancelled: threading.Event) -> Generation:
            return self._pool.request(
                wire.generate_request(prompt, sampling, int(seed)),
                lambda reply: wire.read_generation(
                    reply, len(prompt), sampling.max_new_tokens, self.vocab_size, weight_version
                ),
                cancelled,
                timeout_s=timeout_s,
                weight_version=weight_version,
            )

        return self._concurrently(one, list(zip(prompts, seeds, strict=True)), progress)

    def score(
        self,
        sequences: Sequence[tuple[Ids, Ids]],
        *,
        top_k: int,
        stop_token_ids: Sequence[int] = (),
        weight_version: str | None = None,
        progress: RequestProgress | None = None,
    ) -> list[TopKSignal | None]:
        """The served model's log-probs along given responses, with its top k and the stop tokens at each position.

        Args:
            sequences: pairs (prompt_ids [P], response_ids [R]), neither empty.
            top_k: K, in [1, vocab_size].
            stop_token_ids: S tokens whose log-probs are wanted at every position, in or out of the top k.
            weight_version: of the weights that must give them; None takes any.
            progress: called after each sequence.

        Returns:
            One entry for each sequence, in order. None where the score could not be got: a *missing* score must be masked
            out by the caller. It is counted in ``counters["missing_scores"]``.

        Raises:
            DataError: a token id, a length or a number that the server could not take. Nothing was sent.
            StaleWeightsError: no server that can be reached serves ``weight_version``.
            ServerError: no server can be reached, or it refuses the requests.
        """
        if not 1 <= top_k <= self.vocab_size:
            raise DataError(
                f"score.top_k = {top_k}: must lie in [1, vocab_size = {self.vocab_size}]. The server would die of it. "
                "Choose a smaller top_k."
            )
        if stop_token_ids:
            stop_token_ids = wire.check_token_ids("score.stop_token_ids", stop_token_ids, self.vocab_size)

        def read(reply: wire.Json, num_prompt: int, num_response: int) -> TopKSignal:
            return wire.read_scores(reply, num_prompt, num_response, top_k, stop_token_ids, weight_version)

        return self._each_response(
            "score",
            sequences,
            lambda prompt, response: wire.score_request(prompt, response, top_k, stop_token_ids),
            read,
            weight_version,
            progress,
        )

    def hidden_states(
        self,
        sequences: Sequence[tuple[Ids, Ids]],
        *,
        weight_version: str | None = None,
        progress: RequestProgress | None = None,
    ) -> list[HiddenSignal | None]:
        """What the served model's output layer is given along given responses; the server's spec must say that it sends it.

        Args:
            sequences: pairs (prompt_ids [P], response_ids [R]), neither empty.
            weight_version: of the weights that must give them; None takes any.
            progress: called after each sequence.

        Returns:
            One entry for each sequence, in order; None as in ``score``.

        Raises:
            DataError: a token id or a length that the server could not take. Nothing was sent.
            StaleWeightsError: no server that can be reached serves ``weight_version``.
            ServerError: no server can be reached, or it refuses the requests, or does not send hidden states.
        """

        def read(reply: wire.Json, num_prompt: int, num_response: int) -> HiddenSignal:
            return wire.read_hidden_states(reply, num_prompt, num_response, weight_version)

        return self._each_response(
            "hidden_states", sequences, wire.hidden_states_request, read, weight_version, progress
        )

    def _each_response[S](
        self,
        where: str,
        sequences: Sequence[tuple[Ids, Ids]],
        request: Callable[[list[int], list[int]], wire.Json],
        read: Callable[[wire.Json, int, int], S],
        weight_version: str | None,
        progress: RequestProgress | None,
    ) -> list[S | None]:
        """A signal along each response; None, and counted, where it could not be got."""
        pairs: list[tuple[list[int], list[int]]] = []
        for i, (prompt_ids, response_ids) in enumerate(sequences):
            prompt = wire.check_token_ids(f"{where}.sequences[{i}].prompt_ids", prompt_ids, self.vocab_size)
            response = wire.check_token_ids(f"{where}.sequences[{i}].response_ids", response_ids, self.vocab_size)
            wire.check_length(f"{where}.sequences[{i}]", len(prompt) + len(response), self.context_length)
            pairs.append((prompt, response))

        def one(prompt: list[int], response: list[int], cancelled: threading.Event) -> S | None:
            try:
                return self._pool.request(
                    request(prompt, response),
                    lambda reply: read(reply, len(prompt), len(response)),
                    cancelled,
                    timeout_s=self._timeout_s,
                    weight_version=weight_version,
                )
            except GaveUp:
                if not cancelled.is_set():
                    self._pool.count("missing_scores")
                return None

        return self._concurrently(one, pairs, progress)

    def close(self) -> None:
        """Close connections and threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_sampling(self, sampling: SamplingParams) -> None:
        """All problems of the sampling parameters at once."""
        checks = {
            f"max_new_tokens = {sampling.max_new_tokens}: must be >= 1": sampling.max_new_tokens >= 1,
            f"temperature = {sampling.temperature}: must be finite and >= 0": 0 <= sampling.temperature < math.inf,
            f"top_p = {sampling.top_p}: must lie in (0, 1]": 0 < sampling.top_p <= 1,
            f"top_k = {sampling.top_k}: must be -1 (all) or >= 1": sampling.top_k == -1 or sampling.top_k >= 1,
        }
        problems = [problem for problem, holds in checks.items() if not holds]
        if problems:
            raise DataError(
                "generate.sampling." + "; ".join(problems) + ". The server would refuse it. Mend SamplingParams."
            )
        if sampling.stop_token_ids:
            wire.check_token_ids("generate.sampling.stop_token_ids", sampling.stop_token_ids, self.vocab_size)

    def _concurrently[A, B, T](
        self,
        one: Callable[[A, B, threading.Event], T],
        arguments: Sequence[tuple[A, B]],
        progress: RequestProgress | None,
    ) -> list[T]:
        """``one`` for all arguments on the thread pool, in order. The first failure, or Ctrl-C, cancels the rest."""
        cancelled = threading.Event()
        futures = [self._threads.submit(one, *pair, cancelled) for pair in arguments]
        try:
            for num_done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress:
                    progress(num_done, len(futures))
        except BaseException:
            cancelled.set()
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]
