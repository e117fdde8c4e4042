"""Accuracy on held-out problems: Avg@k, Pass@k and maj@k with intervals, length, truncation, entropy.

In: problems with answers, a client of the model under test, a reward. Out: an ``Evaluation``, written to the run
folder's ``eval/``. Used before, during and after training and by ``megatron-distill eval``: one way to measure.

    problem -> k responses -> reward above 0.5 -> per-problem accuracy -> means and bootstrap intervals
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_distill.config import EvalConfig
from megatron_distill.rewards.base import Answered, Reward
from megatron_distill.rewards.math_verifier import clean_answer, last_boxed
from megatron_distill.rollouts.order import sampling_of, sampling_seed
from megatron_distill.rollouts.prompts import PromptSet
from megatron_distill.rollouts.summary import is_repetitive
from megatron_distill.runs.run_folder import write_json
from megatron_distill.types import Sampler, TopKSignal

ENTROPY_TOP_K = 64  # of a large vocabulary; the rest counts as one outcome, and what that may hide is reported
EXACT_VOCAB_SIZE = 512  # up to which the whole vocabulary is asked for; a large one's would be gigabytes a page of text
BOOTSTRAP_RESAMPLES = 2000


class Model(Sampler, Protocol):
    """The model under test: an SGLang client."""

    vocab_size: int

    def score(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        /,
        *,
        top_k: int,
        weight_version: str | None = None,
    ) -> list[TopKSignal | None]: ...


@dataclass(frozen=True)
class Summary:
    """One evaluation in numbers.

    Attributes:
        step: optimizer steps behind the weights.
        num_problems: evaluated.
        k: samples of each.
        avg_at_k: mean accuracy over samples and problems, in [0, 1].
        avg_at_k_low: lower end of its 95% interval, by bootstrap over problems.
        avg_at_k_high: upper end.
        pass_at_k: share of problems that any of k samples solves (unbiased estimator).
        pass_at_k_low: lower end of its 95% interval.
        pass_at_k_high: upper end.
        maj_at_k: share of problems whose most frequent answer among k is right; of a tie, the right share of those tied.
        maj_at_k_low: lower end of its 95% interval.
        maj_at_k_high: upper end.
        response_tokens: mean length, stop token included.
        truncated_frac: share of responses cut at the cap.
        repetition_frac: share of responses that end in a loop.
        entropy_nats: predictive entropy at temperature 1, mean over tokens of the model's own responses; a lower bound
            where the vocabulary exceeds 512, exact otherwise.
        entropy_gap_nats: how much larger the entropy can be at most.
        stop_reasons: responses by what ended them: a stop token's id, or "length".
    """

    step: int
    num_problems: int
    k: int
    avg_at_k: float
    avg_at_k_low: float
    avg_at_k_high: float
    pass_at_k: float
    pass_at_k_low: float
    pass_at_k_high: float
    maj_at_k: float
    maj_at_k_low: float
    maj_at_k_high: float
    response_tokens: float
    truncated_frac: float
    repetition_frac: float
    entropy_nats: float
    entropy_gap_nats: float
    stop_reasons: dict[str, int]


@dataclass(frozen=True)
class Evaluation:
    """A summary and the responses behind it (one record each: problem id, answer, response, correct, length)."""

    summary: Summary
    responses: list[dict[str, Any]]

    def save(self, path: Path) -> None:
        """Write all of it to one JSON file, and the folders above it if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"summary": asdict(self.summary), "responses": self.responses})


def evaluate(
    prompt_set: PromptSet,
    model: Model,
    reward: Reward,
    config: EvalConfig,
    *,
    stop_token_ids: tuple[int, ...],
    decode: Callable[[Sequence[int]], str],
    seed: int,
    step: int,
    weight_version: str | None = None,
) -> Evaluation:
    """Sample ``samples_per_problem`` responses to each problem, judge them, and measure the model's entropy.

    Args:
        prompt_set: held-out problems; the first ``config.num_problems`` are used.
        model: answers and scores.
        reward: judges; above 0.5 counts as right.
        config: sampling and sizes.
        stop_token_ids: end a response.
        decode: token ids to text, for the reward.
        seed: evaluations of one run use the same sampling seeds, so that steps differ by their weights alone.
        step: stamped on the summary.
        weight_version: of the weights that must answer; None takes any.
    """
    problems, prompts = prompt_set.problems[: config.num_problems], prompt_set.prompts
    k = config.samples_per_problem
    asked = [index for index in range(len(problems)) for _ in range(k)]
    generations = model.generate(
        [prompts[index] for index in asked],
        sampling=sampling_of(config, config.max_response_tokens, stop_token_ids),
        seeds=[sampling_seed(seed, -1 - serial & 0x7FFFFFFF) for serial in range(len(asked))],
        weight_version=weight_version,
    )
    answered = [
        Answered(problems[index], generation.response_ids, decode(generation.response_ids), generation.stop_reason)
        for index, generation in zip(asked, generations, strict=True)
    ]
    rewards = reward(answered)
    correct_NK = np.asarray(rewards, float).reshape(len(problems), k) > 0.5
    avg, avg_low, avg_high = bootstrap_mean(correct_NK.mean(1))
    passed, passed_low, passed_high = bootstrap_mean(np.array([pass_at_k(k, int(n), k) for n in correct_NK.sum(1)]))
    given = [answer_given(one.text) for one in answered]
    voted, voted_low, voted_high = bootstrap_mean(
        np.array([maj_at_k(given[i * k : (i + 1) * k], correct_NK[i].tolist()) for i in range(len(problems))])
    )
    first_of_each = [(prompts[i], generations[i * k].response_ids) for i in range(len(problems))]
    entropy, gap = entropy_nats(model, first_of_each[: config.entropy_problems], weight_version)
    lengths = [len(generation.response_ids) for generation in generations]
    reasons = [
        "length" if generation.stop_reason == "length" else str(generation.stop_token_id) for generation in generations
    ]
    summary = Summary(
        step=step,
        num_problems=len(problems),
        k=k,
        avg_at_k=avg,
        avg_at_k_low=avg_low,
        avg_at_k_high=avg_high,
        pass_at_k=passed,
        pass_at_k_low=passed_low,
        pass_at_k_high=passed_high,
        maj_at_k=voted,
        maj_at_k_low=voted_low,
        maj_at_k_high=voted_high,
        response_tokens=float(np.mean(lengths)),
        truncated_frac=float(np.mean([generation.stop_reason == "length" for generation in generations])),
        repetition_frac=float(np.mean([is_repetitive(generation.response_ids) for generation in generations])),
        entropy_nats=entropy,
        entropy_gap_nats=gap,
        stop_reasons={reason: reasons.count(reason) for reason in sorted(set(reasons))},
    )
    responses = [
        {
            "id": one.problem.id,
            "answer": one.problem.answer,
            "response": one.text,
            "correct": bool(ok),
            "tokens": len(one.response_ids),
        }
        for one, ok in zip(answered, correct_NK.ravel(), strict=True)
    ]
    return Evaluation(summary, responses)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right) from n samples: 1 - C(n - c, k) / C(n, k).

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", 2021, equation 1.
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent of k answers is right: self-consistency, Wang et al., arXiv 2203.11171.

    All right answers are one answer, however they are written; wrong ones are the same where their text is; None is no vote.

    Returns:
        1 or 0; of several answers that are equally frequent, the share that is right; 0 without a vote.
    """
    votes = Counter(True if right else answer for answer, right in zip(answers, correct, strict=True))
    del votes[None]
    most = max(votes.values(), default=0)
    return (votes[True] == most) / sum(count == most for count in votes.values()) if most else 0.0


def answer_given(text: str) -> str | None:
    """What a response answers: its last box, cleaned; None without one."""
    boxed = last_boxed(text)
    return None if boxed is None else clean_answer(boxed)


def bootstrap_mean(values_N: np.ndarray) -> tuple[float, float, float]:
    """The mean over problems and the ends of its 95% interval, by resampling problems (samples of one are correlated)."""
    draws = np.random.default_rng(0).integers(0, len(values_N), (BOOTSTRAP_RESAMPLES, len(values_N)))
    low, high = np.quantile(values_N[draws].mean(1), [0.025, 0.975])
    return float(values_N.mean()), float(low), float(high)


def entropy_nats(
    model: Model, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], weight_version: str | None = None
) -> tuple[float, float]:
    """Mean predictive entropy over the response tokens of ``sequences``, and how far it can lie below the truth.

    The server reports the k likeliest tokens; the others count as one outcome of mass m, which understates the entropy
    by at most m log(V - k).
    """
    k = model.vocab_size if model.vocab_size <= EXACT_VOCAB_SIZE else ENTROPY_TOP_K
    entropies, gaps = [], []
    for scores in model.score(sequences, top_k=k, weight_version=weight_version):
        if scores is None:
            continue
        probabilities_RK = np.exp(scores.topk_logprobs.astype(np.float64))
        tail_R = np.clip(1.0 - probabilities_RK.sum(1), 0.0, 1.0)
        tail_R[tail_R < 1e-6] = 0.0  # rounding of fp32 log-probs
        tail_term_R = -tail_R * np.log(np.where(tail_R > 0, tail_R, 1.0))
        entropies.append(-(probabilities_RK * scores.topk_logprobs).sum(1) + tail_term_R)
        gaps.append(tail_R * math.log(max(model.vocab_size - k, 1)))
    if not entropies:
        return float("nan"), float("nan")
    return float(np.concatenate(entropies).mean()), float(np.concatenate(gaps).mean())
