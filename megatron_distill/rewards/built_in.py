"""Rewards that need no judge: the form of a response, and its length. Text and ids in, floats out."""

from collections.abc import Sequence

from megatron_distill.rewards.base import Answered
from megatron_distill.rewards.math_verifier import last_boxed


def form(answered: Sequence[Answered]) -> list[float]:
    r"""``format``: 1.0 for a response that ended by itself and holds a closed ``\boxed{}`` with something in it, else 0.0."""
    return [
        float(one.stop_reason == "stop" and bool((boxed := last_boxed(one.text)) and boxed.strip())) for one in answered
    ]


def length(answered: Sequence[Answered]) -> list[float]:
    """``length``: tokens of the response, in thousands; a negative weight asks for short ones."""
    return [len(one.response_ids) / 1000 for one in answered]
