"""Which samples of a step go into which micro-batch of which replica: by their number, or by their tokens.

In: the lengths of all samples of a step, whoever drew them. Out: as many hands for every replica, each of which is packed into
one micro-batch.

    lengths   9 8 7 7 5 4 2 2      hands of two   9+2  8+2  7+4  7+5      two replicas   7+5 8+2 | 9+2 7+4   of 22 tokens

A step ends with its slowest replica, which is why each gets about the same number of tokens. However they are dealt, a step is
the same but for rounding: see the layout tests.
"""

import heapq
from collections.abc import Sequence

from megatron_distill.types import Sample

Hand = list[int]
"""Of one micro-batch: places in the step's lengths."""


def num_tokens(sample: Sample) -> int:
    """Of its prompt and its response."""
    return len(sample.rollout.prompt_ids) + len(sample.rollout.response_ids)


def deal(
    lengths: Sequence[int], num_replicas: int, *, rollouts: int | None, max_tokens: int = 0, count_multiple: int = 1
) -> list[list[Hand]]:
    """Deal a step: everything once, the same number of hands to every replica.

    Args:
        lengths: tokens of each sample of the step.
        num_replicas: that share it; divides the number of samples.
        rollouts: of a micro-batch; None deals by tokens.
        max_tokens: of a micro-batch, if they are dealt by tokens; a longer sample has one to itself.
        count_multiple: a replica's hands are a multiple of it, if they are dealt by tokens.

    Returns:
        The hands of each replica, the heaviest first: replicas whose experts exchange tokens do so hand by hand.
    """
    if rollouts is None:
        hands = by_tokens(lengths, num_hands_of(lengths, max_tokens, num_replicas * count_multiple))
    else:
        hands = by_count(lengths, rollouts)
    return _over_replicas(hands, lengths, num_replicas)


def by_count(lengths: Sequence[int], per_hand: int) -> list[Hand]:
    """Hands of ``per_hand`` samples, which divides their number, and of similar lengths.

    Dealt like cards, back and forth, so that each hand gets long and short ones.
    """
    num_hands = len(lengths) // per_hand
    assert num_hands * per_hand == len(lengths), (len(lengths), per_hand)
    longest_first = _longest_first(lengths)
    hands: list[Hand] = [[] for _ in range(num_hands)]
    for start in range(0, len(lengths), num_hands):
        cards = longest_first[start : start + num_hands]
        for hand, card in zip(hands if start // num_hands % 2 == 0 else reversed(hands), cards, strict=True):
            hand.append(card)
    return hands


def by_tokens(lengths: Sequence[int], num_hands: int) -> list[Hand]:
    """``num_hands`` hands, at most as many as samples, none of them empty, of about as many tokens: longest first, to the
    lightest hand."""
    hands: list[Hand] = [[] for _ in range(num_hands)]
    lightest = [(0, number) for number in range(num_hands)]
    for card in _longest_first(lengths):
        held, number = lightest[0]
        hands[number].append(card)
        heapq.heapreplace(lightest, (held + lengths[card], number))
    return hands


def num_hands_of(lengths: Sequence[int], max_tokens: int, multiple: int = 1) -> int:
    """The fewest hands, a multiple of ``multiple`` and dealt by tokens, of which none holds more than ``max_tokens``; a longer
    sample has one to itself."""
    limit = max(max_tokens, *lengths)
    number = -(-sum(lengths) // (limit * multiple)) * multiple
    while max(_weights(by_tokens(lengths, number), lengths)) > limit:
        number += multiple
    return number


def _over_replicas(hands: Sequence[Hand], lengths: Sequence[int], num_replicas: int) -> list[list[Hand]]:
    """As many hands to each: heaviest first, to the lightest replica that lacks one."""
    per_replica = len(hands) // num_replicas
    assert per_replica * num_replicas == len(hands), (len(hands), num_replicas)
    weights = _weights(hands, lengths)
    dealt: list[list[Hand]] = [[] for _ in range(num_replicas)]
    lightest = [(0, replica) for replica in range(num_replicas)]
    for number in _longest_first(weights):
        held, replica = heapq.heappop(lightest)
        dealt[replica].append(hands[number])
        if len(dealt[replica]) < per_replica:
            heapq.heappush(lightest, (held + weights[number], replica))
    return dealt


def _weights(hands: Sequence[Hand], lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[card] for card in hand) for hand in hands]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
