"""How a response comes about: one call of the sampler, or a conversation with tools, games, critics.

In: a problem and its prompt ids, and ``Turns``, through which the author's model is asked. Out: an ``Episode``. An
environment is a function; ``rollouts.environment`` names one: ``single_turn``, or ``path/to/file.py:function``.

    def ask_twice(problem: Problem, prompt_ids: list[int], turns: Turns) -> Episode:
        first = turns.generate(prompt_ids)
        hint = turns.tokenizer.encode("Check your work.", add_special_tokens=False)
        second = turns.generate([*prompt_ids, *first.response_ids, *hint])
        return join([first, hint, second])

Every response is a function of (seed, step, place): a turn's seed comes of the response's own and the turn's number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_distill.errors import DataError
from megatron_distill.rollouts.order import sampling_seed
from megatron_distill.types import (
    Generation,
    Problem,
    Sampler,
    SamplingParams,
    StopReason,
    VersionSpan,
    WantedVersion,
)


@dataclass(frozen=True, eq=False)
class Episode:
    """A finished response, whoever took part in it.

    Attributes:
        response_ids: [R], all that follows the prompt.
        sampler_logprobs: [R] float32, see ``Generation``; nan at what the environment said.
        is_learnt: [R] bool, what the model said; None if that is all of it.
        stop_reason: why the last turn ended.
        version_spans: which weights drew which tokens, in order; what the environment said belongs to none.
    """

    response_ids: list[int]
    sampler_logprobs: npt.NDArray[np.float32]
    is_learnt: npt.NDArray[np.bool_] | None
    stop_reason: StopReason
    version_spans: tuple[VersionSpan, ...]


class Turns:
    """The author's model, as an environment may ask it: one response at a time, all within one horizon."""

    def __init__(
        self,
        sampler: Sampler,
        *,
        sampling: SamplingParams,
        seed: int,
        num_prompt_tokens: int,
        weight_version: WantedVersion,
        tokenizer: Any,
    ) -> None:
        """Ask nothing yet.

        Args:
            sampler: of the response's author.
            sampling: of every turn; its ``max_new_tokens`` caps the whole response.
            seed: of the response, 31 bits; turns derive theirs from it.
            num_prompt_tokens: P; what follows the prompt counts against the cap.
            weight_version: see ``Sampler``.
            tokenizer: the shared one.
        """
        self.tokenizer = tokenizer
        self._sampler, self._sampling, self._seed = sampler, sampling, seed
        self._num_prompt_tokens, self._weight_version = num_prompt_tokens, weight_version
        self._num_turns = 0

    def room(self, token_ids: Sequence[int]) -> int:
        """Tokens that a turn after ``token_ids`` (prompt included) may still have."""
        return self._sampling.max_new_tokens - (len(token_ids) - self._num_prompt_tokens)

    def generate(self, token_ids: Sequence[int]) -> Generation:
        """The model's continuation of ``token_ids``, which begin with the prompt.

        Raises:
            DataError: nothing is left of the horizon; ask ``room`` first.
        """
        room = self.room(token_ids)
        if room < 1:
            raise DataError(
                f"environment: {len(token_ids) - self._num_prompt_tokens} tokens follow the prompt: none is left of a horizon "
                f"of {self._sampling.max_new_tokens}. End the episode when turns.room(...) is 0."
            )
        # The first turn's seed is the response's own, so that one turn is what a bare sampler draws.
        seed = sampling_seed(self._seed, self._num_turns) if self._num_turns else self._seed
        self._num_turns += 1
        [generation] = self._sampler.generate(
            [list(token_ids)],
            sampling=replace(self._sampling, max_new_tokens=room),
            seeds=[seed],
            weight_version=self._weight_version,
        )
        return generation


class Environment(Protocol):
    """Brings about one response. Called from many threads at once, one response each."""

    def __call__(self, problem: Problem, prompt_ids: list[int], turns: Turns, /) -> Episode:
        """The response to one prompt."""


def single_turn(problem: Problem, prompt_ids: list[int], turns: Turns, /) -> Episode:
    """The built-in environment: the model answers once."""
    return join([turns.generate(prompt_ids)])


def join(parts: Sequence[Generation | Sequence[int]]) -> Episode:
    """An episode of what the model said (``Generation``) and what the environment did (token ids), in order.

    Raises:
        DataError: the model said nothing.
    """
    said = [part for part in parts if isinstance(part, Generation)]
    if not said:
        raise DataError(
            "environment.join = no Generation: there is nothing to learn from. Ask turns.generate at least once."
        )
    ids = [list(part.response_ids if isinstance(part, Generation) else part) for part in parts]
    logprobs = [
        part.sampler_logprobs if isinstance(part, Generation) else np.full(len(part), np.nan, np.float32)
        for part in parts
    ]
    is_learnt = np.repeat([isinstance(part, Generation) for part in parts], [len(part) for part in ids])
    return Episode(
        response_ids=[token for part in ids for token in part],
        sampler_logprobs=np.concatenate(logprobs),
        is_learnt=None if is_learnt.all() else is_learnt,
        stop_reason=said[-1].stop_reason,
        version_spans=_spans(parts),
    )


def _spans(parts: Sequence[Generation | Sequence[int]]) -> tuple[VersionSpan, ...]:
    """Of every turn, counted from the first token of the response."""
    spans: list[VersionSpan] = []
    start = 0
    for part in parts:
        if isinstance(part, Generation):
            end = start + len(part.response_ids)
            own = part.version_spans or (VersionSpan(part.weight_version, 0, end - start),)
            spans += [VersionSpan(version, start + first, start + last) for version, first, last in own]
            start = end
        else:
            start += len(part)
    return tuple(spans)
