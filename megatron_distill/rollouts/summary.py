"""What rollouts alone tell: lengths, truncation, loops, rewards, staleness, as (sum, count) pairs."""

import itertools
import zlib
from collections.abc import Sequence

import numpy as np

from megatron_distill.rollouts.advantages import STD_FLOOR
from megatron_distill.runs.metrics import Sums
from megatron_distill.types import Sample

REPETITION_WINDOW_TOKENS = 64
REPETITION_RATIO = 0.2


def rollout_sums(samples: Sequence[Sample], step: int, teacher_scores: bool, rollouts_per_prompt: int) -> Sums:
    """(sum, count) of everything that rollouts alone tell; see ``runs.metrics`` for the meanings.

    Args:
        samples: of one replica, prompt-major.
        step: 0-based.
        teacher_scores: whether a teacher was asked for scores, so that some can be missing.
        rollouts_per_prompt: G.
    """
    rollouts = [sample.rollout for sample in samples]
    count = float(len(rollouts))
    own = [rollout for rollout in rollouts if rollout.author == "student"]
    missing = sum(sample.signal is None for sample in samples)
    rewards = [sample.reward for sample in samples if not np.isnan(sample.reward)]
    parts = {name: [sample.reward_parts[name] for sample in samples] for name in samples[0].reward_parts}
    return {
        "reward": (float(sum(rewards)), float(len(rewards))),
        **{f"reward.{name}": (sum(values), float(len(values))) for name, values in parts.items()},
        "zero_signal_frac": _zero_signal(samples, rollouts_per_prompt),
        "response_tokens": (float(sum(len(r.response_ids) for r in rollouts)), count),
        "truncated_frac": (float(sum(r.stop_reason == "length" for r in rollouts)), count),
        "repetition_frac": (float(sum(is_repetitive(r.response_ids) for r in rollouts)), count),
        "student_prefix_frac": (float(len(own)), count),
        "missing_teacher_frac": (float(missing), count if teacher_scores else 0.0),
        "staleness_steps": (float(sum(step - r.oldest_version for r in own)), float(len(own))),
    }


def _zero_signal(samples: Sequence[Sample], rollouts_per_prompt: int) -> tuple[float, float]:
    """(number, of) groups whose responses all got the same reward; a prompt that comes twice in a step has two groups."""
    groups = itertools.batched((sample.reward for sample in samples), rollouts_per_prompt)
    judged = [rewards for group in groups if (rewards := [reward for reward in group if not np.isnan(reward)])]
    return float(sum(np.std(rewards) <= STD_FLOOR for rewards in judged)), float(len(judged))


def is_repetitive(response_ids: Sequence[int]) -> bool:
    """Whether the last 64 tokens compress below a fifth of their size: text does not, loops do."""
    tail = np.asarray(response_ids[-REPETITION_WINDOW_TOKENS:], np.int32).tobytes()
    if len(response_ids) < REPETITION_WINDOW_TOKENS:
        return False
    return len(zlib.compress(tail, 9)) < REPETITION_RATIO * len(tail)
