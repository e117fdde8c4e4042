"""The fields of what a run minimises: distillation, cross entropy, policy gradient, each with its weight."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_distill.config.fields import function, plain
from megatron_distill.config.schedules import Schedule, constant

REWARDS = ("math", "format", "length")
"""Built-in rewards, of RL and of evaluation."""


@dataclass(frozen=True)
class DistillConfig:
    """The distillation component of the loss: weight * (w KL(student||teacher) + (1 - w) KL(teacher||student))."""

    weight: float = plain(1.0, "weight of the distillation component in the loss", "[0, inf)")
    reverse_kl_weight: Schedule = plain(
        constant(0.2),
        "w in [0, 1]: weight of reverse KL, KL(student||teacher); 1 - w weighs forward KL",
        "[0, 1]",
    )
    temperature: float = plain(
        1.0, "divides both models' logits in the loss; not 1 needs an in_process or sglang_hidden teacher", "(0, inf)"
    )
    divergence: Literal["kl", "jsd", "skew_kl"] = plain(
        "kl",
        "what w (distill.reverse_kl_weight) weighs; kl: w KL(student||teacher) + (1 - w) KL(teacher||student); jsd: "
        "generalised Jensen-Shannon, w KL(teacher||m) + (1 - w) KL(student||m) with m = w teacher + (1 - w) student, like "
        "forward KL for w near 0 and like reverse KL for w near 1; skew_kl: the forward (w = 0) or reverse (w = 1) KL whose "
        "second argument leans towards the first. The latter two need an in_process or sglang_hidden teacher",
    )
    support: Literal["teacher", "student"] = plain(
        "teacher",
        "whose tokens the KL is taken over; teacher: all that its signal holds; student: the student's "
        "teacher.num_logprobs likeliest tokens and the tail, which needs an in_process or sglang_hidden teacher",
    )
    skew: float = plain(0.1, "skew_kl: how far the second argument leans towards the first", "(0, 1)")
    estimator: Literal["distribution", "k1", "k2", "k3"] = plain(
        "distribution",
        "distribution: the KL of the two distributions at each token; k1, k2, k3: its gradient estimated from the one token "
        "that was written, for w = 0 (forward) or 1 (reverse): reverse at the student's tokens k1 (log-ratio reward) or k2, "
        "forward at the student's k3, forward at the teacher's k1 or k3. Stop tokens are then not merged",
    )
    normalisation: Literal["token", "sequence"] = plain(
        "token",
        "token: mean over all scored tokens of the step; sequence: mean over scored responses of their means, so that a long "
        "response weighs no more than a short one",
    )


@dataclass(frozen=True)
class SftConfig:
    """The cross-entropy component: -log q(token), on responses that the student did not write (hard targets)."""

    weight: float = plain(0.0, "weight of the cross-entropy component in the loss", "[0, inf)")


@dataclass(frozen=True)
class RlConfig:
    """The policy-gradient component, on responses that the student wrote, with rewards by math-verify."""

    weight: float = plain(
        0.0, "weight of the policy-gradient component in the loss; 0 is no RL, and no rewards", "[0, inf)"
    )
    reward: str = function(
        "math",
        REWARDS,
        "math: 1 if math-verify finds the answer in the last box, else 0; format: 1 if the response ended and holds a closed "
        "box, else 0; length: its tokens in thousands; or path/to/file.py:function",
    )
    extra_rewards: dict[str, Any] = function(
        {},
        REWARDS,
        'further rewards that are added to rl.reward, each by its weight, e.g. {"format": 0.2, "length": -0.1}; what each gave '
        "is a metric, reward.NAME",
    )
    reward_timeout_s: float = plain(
        300.0,
        "longest time that one call of a reward may take, in training or evaluation",
        "(0, inf)",
    )
    advantage_scale: Literal["group_std", "none"] = plain(
        "group_std", "group_std: (reward - mean) / std of the prompt's group (GRPO); none: reward - mean (Dr. GRPO)"
    )
    normalisation: Literal["token", "sequence"] = plain(
        "token", "token: mean over all tokens of the step (DAPO); sequence: mean over responses of their means (GRPO)"
    )
    drop_zero_signal: bool = plain(
        True, "leave groups whose rewards are all equal out of the denominator, since they carry no gradient (DAPO)"
    )
    clip_low: float = plain(
        0.2, "how far the probability ratio may fall below 1 before its gain stops counting", "[0, 1)"
    )
    clip_high: float = plain(
        0.28, "how far it may rise above 1; larger than clip_low is DAPO's clip-higher", "[0, inf)"
    )
    max_importance_weight: float = plain(
        2.0,
        "cap on the weight that corrects for the gap between SGLang's and Megatron's log-probs",
        "(0, inf)",
    )
    reference_kl_coef: float = plain(
        0.0,
        "weight of the k3 estimate of KL(student||reference); the reference is the student as the run began",
        "[0, inf)",
    )
