"""Losses that distil and reinforce, over a vocabulary sharded across tensor-parallel ranks.

Tensors and an optional process group go in; per-token losses with gradients to the student, and detached metrics in nats,
come out. Nothing here imports Megatron, a server or a launcher. Sums, masks and divisions by token counts are the
caller's, so that micro-batching and packing cannot change a result.
"""

from megatron_distill.losses.backends import Backend
from megatron_distill.losses.fused_linear import fused_linear_distill_kl
from megatron_distill.losses.kl import KLTerms, distill_kl
from megatron_distill.losses.mixture import distill_jsd, distill_skew_kl
from megatron_distill.losses.policy import PolicyTerms, policy_gradient_loss, truncated_importance_weights
from megatron_distill.losses.sampled import (
    SampledTerms,
    TokenTerms,
    log_ratio_reward,
    sampled_kl,
    vocab_parallel_logprobs,
)
from megatron_distill.losses.support import vocab_parallel_gather_logprobs, vocab_parallel_topk
from megatron_distill.losses.topk import TopKTerms, distill_kl_topk

__all__ = [
    "Backend",
    "KLTerms",
    "PolicyTerms",
    "SampledTerms",
    "TokenTerms",
    "TopKTerms",
    "distill_jsd",
    "distill_kl",
    "distill_kl_topk",
    "distill_skew_kl",
    "fused_linear_distill_kl",
    "log_ratio_reward",
    "policy_gradient_loss",
    "sampled_kl",
    "truncated_importance_weights",
    "vocab_parallel_gather_logprobs",
    "vocab_parallel_logprobs",
    "vocab_parallel_topk",
]
