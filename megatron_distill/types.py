"""The nouns that travel between the stages of a run. numpy only, so that every stage and process may import them.

    prompts --> Generation --> Rollout --> TeacherScores --> batches

Shapes in the docstrings: P tokens of a prompt, R tokens of a response, K top tokens kept of the teacher's distribution,
S stop tokens. All log-probabilities are natural (nats) over the full vocabulary. Token ids are lists of Python ints: they go
out as JSON and come back as JSON, and are never re-tokenised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

StopReason = Literal["stop", "length"]
"""Why a response ended: it drew a stop token, or reached its cap (then it is truncated)."""


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
        weight_version: the one version of the weights that drew every token.
    """

    response_ids: list[int]
    sampler_logprobs: npt.NDArray[np.float32]
    stop_reason: StopReason
    stop_token_id: int | None
    weight_version: str


@dataclass(frozen=True, eq=False)
class Rollout:
    """A prompt with one response to it: what the teacher scores and the student learns from.

    Attributes:
        prompt_index: position of the prompt in the prompt set.
        prompt_ids: [P].
        response_ids: [R].
        sampler_logprobs: [R] float32, see ``Generation``.
        weight_version: the optimizer step whose weights drew the response; -1 when no student drew it (data, teacher).
        stop_reason: "stop" or "length".
    """

    prompt_index: int
    prompt_ids: list[int]
    response_ids: list[int]
    sampler_logprobs: npt.NDArray[np.float32]
    weight_version: int
    stop_reason: StopReason


@dataclass(frozen=True, eq=False)
class TeacherScores:
    """The teacher's log-probabilities along one response, at temperature 1.

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
