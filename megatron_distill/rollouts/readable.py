"""A response as a person reads it, token by token: pieces of text, and by how much student and teacher differed at each.

In: a ``Sample``. Out: plain values for ``samples.jsonl``.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from megatron_distill.types import Sample

MOST_TOKENS = 1000  # of a response: what a person looks at, and what keeps the file small


def by_token(sample: Sample, decode: Callable[[Sequence[int]], str], sampling_temperature: float) -> dict[str, Any]:
    """``pieces`` of the response's text, and ``gap_nats`` of each: log q(token) - log p(token), sampler against teacher.

    Its mean over tokens that the student drew estimates the reverse KL. Tokens that only together make a character are one
    piece, with the sum of their gaps; beyond ``MOST_TOKENS`` the rest is left out.

    Args:
        sample: a rollout with what the teacher said.
        decode: ids to text.
        sampling_temperature: at which the sampler's log-probs were taken; the teacher's are at 1.

    Returns:
        Nothing where either side's log-probs at temperature 1 are unknown: another sampling temperature, data's responses, a
        missing score, a teacher inside the trainer.
    """
    if sampling_temperature != 1 or sample.signal is None or not np.isfinite(sample.rollout.sampler_logprobs).all():
        return {}
    gaps = sample.rollout.sampler_logprobs - sample.signal.token_logprobs
    pieces: list[str] = []
    sums: list[float] = []
    start = 0
    for text, count in whole_characters(sample.rollout.response_ids[:MOST_TOKENS], decode):
        pieces.append(text)
        sums.append(round(float(gaps[start : start + count].sum(dtype=np.float64)), 3))
        start += count
    return {"pieces": pieces, "gap_nats": sums}


def whole_characters(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Iterator[tuple[str, int]]:
    """The text of each token, and 1; tokens that only together make a character come as one text, and how many they are."""
    pending: list[int] = []
    for token_id in ids:
        pending.append(token_id)
        text = decode(pending)
        if not text.endswith("\ufffd") or len(pending) == 4:  # no character is longer than four bytes
            yield text, len(pending)
            pending = []
    if pending:
        yield decode(pending), len(pending)
