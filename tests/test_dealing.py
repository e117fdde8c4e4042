"""How samples are dealt to replicas and micro-batches: everything once, evenly, within the limit, whatever the lengths."""

from collections.abc import Sequence

import numpy as np
import pytest

from megatron_distill.rollouts.dealing import Hand, by_count, by_tokens, deal, num_hands_of


def held(hands: Sequence[Hand], lengths: Sequence[int]) -> list[int]:
    """Tokens of each hand."""
    return [sum(lengths[place] for place in hand) for hand in hands]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [1, 40, 100, 10_000])
def test_no_hand_holds_more_than_the_limit_and_fewer_would(seed: int, limit: int) -> None:
    """Every sample is in one hand; a hand over the limit holds a single sample, which is longer; none is empty."""
    lengths = np.random.default_rng(seed).integers(2, 60, 24).tolist()
    for multiple in (1, 4):
        number = num_hands_of(lengths, limit, multiple)
        hands = by_tokens(lengths, number)
        assert number % multiple == 0 and sorted(place for hand in hands for place in hand) == list(range(24))
        assert all(hands) and max(held(hands, lengths)) <= max(limit, *lengths)
        fewer = number - multiple
        assert not fewer or max(held(by_tokens(lengths, fewer), lengths)) > max(limit, *lengths)


def test_hands_by_tokens_weigh_the_same_to_within_their_shortest_samples() -> None:
    """One long sample is set against many short ones, where hands of equal count cannot."""
    lengths = [60] + [5] * 12
    assert held(by_tokens(lengths, 2), lengths) == [60, 60]
    by_six = held(by_count(lengths[:12], 6), lengths)
    assert max(by_six) - min(by_six) >= 50


@pytest.mark.parametrize("num_replicas", [1, 2, 4, 8])
@pytest.mark.parametrize("how", [{"rollouts": 1}, {"rollouts": 4}, {"rollouts": None, "max_tokens": 3000}])
def test_replicas_get_as_many_hands_and_about_as_many_tokens(num_replicas: int, how: dict[str, int | None]) -> None:
    """Everything is dealt once. Lengths with a long tail, by which replicas would differ by a third if each kept what it drew,
    differ by less than a twentieth."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(6.9, 0.7, 16 * num_replicas), 4096).astype(int).tolist()
    dealt = deal(lengths, num_replicas, **how)
    assert sorted(place for hands in dealt for hand in hands for place in hand) == list(range(len(lengths)))
    assert len({len(hands) for hands in dealt}) == 1 and all(hand for hands in dealt for hand in hands)
    tokens = [sum(held(hands, lengths)) for hands in dealt]
    assert max(tokens) < 1.05 * sum(lengths) / num_replicas
    if num_replicas == 8:
        drawn = np.array(lengths).reshape(num_replicas, -1).sum(1)
        assert drawn.max() > 1.2 * drawn.mean()
