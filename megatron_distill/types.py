"""The nouns that travel between the stages of a run. numpy only, so that every stage and process may import them.

    Problem --> prompt ids --> Generation --> Rollout --> Signal --> Sample --> batches

Shapes in the docstrings: P tokens of a prompt, R tokens of a response, K top tokens kept of the teacher's distribution,
S stop tokens, H a model's width. All log-probabilities are natural (nats) over the full vocabulary. Token ids are lists of
Python ints: they go out as JSON and come back as JSON, and are never re-tokenised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

StopReason = Literal["stop", "length"]
"""Why a response ended: it drew a stop token, or reached its cap (then it is truncated)."""

Author = Literal["student", "teacher", "data"]
"""Who wrote a response."""


@dataclass(frozen=True, slots=True)  # a run holds millions
class Message:
    """One turn of a chat, as chat templates know it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)  # a run holds millions
class Problem:
    """A prompt with a known answer.

    Attributes:
        id: unique within its file; the record's own, or else its position, counted from 0.
        messages: the chat so far; the last turn is the user's.
        answer: reference answer, as the reward reads it (LaTeX or plain).
        solution: a worked response, if the data has one: a teacher prefix that needs no teacher.
        columns: the whole record, for rewards and teachers that go by more than the answer.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    solution: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn.

    Attributes:
        max_new_tokens: cap of the response's length, >= 1.
        temperature: divisor of the logits, >= 0; 0 is greedy.
        top_p: nucleus mass kept, in (0, 1].
        top_k: number of likeliest tokens kept; -1 keeps all.
        stop_token_ids: tokens that end a response. They are part of it, as its last token. The model's own end-of-text
            token always is one of them.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()


class VersionSpan(NamedTuple):
    """The response tokens ``start`` to ``end - 1`` and the version of the weights that drew them."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class SinceVersion:
    """Weights of this version or of any later one; a response may be drawn by several of them, one after the other."""

    oldest: int


WantedVersion = str | SinceVersion | None
"""Which weights may draw a response: one version for all of its tokens, or any since one; None takes whatever is served."""


@dataclass(frozen=True, eq=False)
class Generation:
    """One sampled response, as the server returned it.

    Example: prompt [5, 9], response [7, 3, 2] with 2 a stop token -> response_ids [7, 3, 2], three log-probs, stop_reason
    "stop", stop_token_id 2.

    Attributes:
        response_ids: [R] the drawn tokens, the stop token included.
        sampler_logprobs: [R] float32, ``log softmax(logits / temperature)`` of each drawn token over the *full* vocabulary:
            top_p and top_k choose the token but do not enter (SGLang's convention). At temperature 0: of ``logits``.
        stop_reason: "stop" or "length".
        stop_token_id: the stop token drawn, or None after "length".
        weight_version: of the weights that drew the last token.
        version_spans: which weights drew which tokens, if the weights changed meanwhile; empty if one version drew all.
    """

    response_ids: list[int]
    sampler_logprobs: npt.NDArray[np.float32]
    stop_reason: StopReason
    stop_token_id: int | None
    weight_version: str
    version_spans: tuple[VersionSpan, ...] = ()


@dataclass(frozen=True, eq=False)
class Rollout:
    """A prompt with one response to it: what the teacher scores and the student learns from.

    Attributes:
        prompt_index: position of the prompt in the prompt set.
        prompt_ids: [P].
        response_ids: [R].
        sampler_logprobs: [R] float32, see ``Generation``; nan where no sampler drew the token.
        author: who wrote it.
        oldest_version: optimizer steps behind the weights that drew its first token; 0 unless the student wrote it.
        newest_version: the same, of its last token.
        stop_reason: "stop" or "length".
        is_learnt: [R] bool, the tokens that losses apply to; None for all. An environment's own words are not learnt.
        version_spans: which weights drew which tokens, if the weights changed meanwhile; empty if one version drew all.
    """

    prompt_index: int
    prompt_ids: list[int]
    response_ids: list[int]
    sampler_logprobs: npt.NDArray[np.float32]
    author: Author
    oldest_version: int
    newest_version: int
    stop_reason: StopReason
    is_learnt: npt.NDArray[np.bool_] | None = None
    version_spans: tuple[VersionSpan, ...] = ()

    @property
    def num_learnt_tokens(self) -> int:
        """Response tokens that losses apply to: what every denominator counts."""
        return len(self.response_ids) if self.is_learnt is None else int(self.is_learnt.sum())


@dataclass(frozen=True, eq=False)
class TopKSignal:
    """What a teacher says along one response: its k likeliest tokens at each place, at temperature 1.

    Row r of each array is the distribution of response token r given the prompt and the response tokens before it.

    Attributes:
        token_logprobs: [R] float32, of the response tokens themselves.
        topk_ids: [R, K] int32, the K likeliest tokens, likeliest first.
        topk_logprobs: [R, K] float32, of those tokens, over the full vocabulary (they sum to less than 1 in probability).
        stop_logprobs: [R, S] float32, of the S stop tokens asked for, in the order asked; S may be 0.
    """

    token_logprobs: npt.NDArray[np.float32]
    topk_ids: npt.NDArray[np.int32]
    topk_logprobs: npt.NDArray[np.float32]
    stop_logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class HiddenSignal:
    """What a teacher's output layer would be given along one response: with that layer's matrix, its whole distribution.

    Row r belongs to response token r given the prompt and the response tokens before it.

    Attributes:
        token_logprobs: [R] float32, of the response tokens, as the server's own output layer gives them.
        hidden: [R, H] the last hidden states, after the final norm: float32 or float16, or bfloat16's bits as uint16, which
            numpy has no name for.
    """

    token_logprobs: npt.NDArray[np.float32]
    hidden: npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]


Signal = TopKSignal | HiddenSignal
"""What a teacher outside the trainer says along one response. All signals of a run are of one kind."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One response with everything that is known of it before the student's forward pass.

    Attributes:
        rollout: the prompt, the response and who wrote it.
        signal: what the teacher said of the response; None if that is missing, and then the distillation loss skips the
            sample and counts it. Always None when the teacher runs in the trainer.
        reward: what the reward gave; nan if none was asked.
        reward_parts: what each of several rewards gave, before its weight; empty for one.
        advantage: of the response, for the policy-gradient component; 0 without it.
        policy_weight: of each of its tokens in that component; 0 leaves the sample out.
    """

    rollout: Rollout
    signal: Signal | None = None
    reward: float = float("nan")
    advantage: float = 0.0
    policy_weight: float = 0.0
    reward_parts: Mapping[str, float] = field(default_factory=dict)


class Sampler(Protocol):
    """Draws responses: an SGLang client of the student or of the teacher, a cache before it, or the data's solutions."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        sampling: SamplingParams,
        seeds: Sequence[int],
        weight_version: WantedVersion = None,
    ) -> list[Generation]:
        """One response to each prompt; the same prompt, parameters, seed and weights give the same response.

        Args:
            prompts: token ids [P] of each.
            sampling: how tokens are drawn, for all of them.
            seeds: one for each prompt.
            weight_version: of the weights that may draw it.
        """
