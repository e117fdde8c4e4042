"""What samples.jsonl says of each token: whole characters, and the gap between who drew it and the teacher."""

import numpy as np
import pytest

from megatron_distill.rollouts.readable import MOST_TOKENS, by_token
from megatron_distill.types import Rollout, Sample, TopKSignal


def decode(ids: list[int]) -> str:
    """A tokenizer of bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def sample(text: str, student: list[float], teacher: list[float]) -> Sample:
    ids = list(text.encode())
    nothing = np.zeros((len(ids), 0), np.float32)
    signal = TopKSignal(np.array(teacher, np.float32), nothing.astype(np.int32), nothing, nothing)
    return Sample(Rollout(0, [1], ids, np.array(student, np.float32), "student", 0, 0, "stop"), signal)


def test_pieces_are_whole_characters_with_the_sum_of_their_tokens_gaps() -> None:
    """Joined, the pieces are the response; a character of several tokens is one piece."""
    made = by_token(sample("a\u20ac!", [-1.0, -2.0, -2.0, -2.0, -0.5], [-3.0, -1.0, -1.5, -2.0, -0.5]), decode, 1.0)
    assert made["pieces"] == ["a", "\u20ac", "!"]
    assert made["gap_nats"] == [pytest.approx(2.0), pytest.approx(-1.5), 0.0]


def test_unknown_gaps_are_absent_and_long_responses_cut() -> None:
    """Without a teacher's and a sampler's log-probs at one temperature there is nothing to say; a long response is cut, not its
    file's readers."""
    whole = sample("abc", [-1.0, -1.0, np.nan], [-1.0, -1.0, -1.0])
    assert by_token(whole, decode, 1.0) == {}
    assert by_token(Sample(whole.rollout), decode, 1.0) == {}
    long = sample("x" * 1500, [-1.0] * 1500, [-1.0] * 1500)
    assert len(by_token(long, decode, 1.0)["pieces"]) == MOST_TOKENS
    assert by_token(long, decode, 0.7) == {}
