"""Losses that distil and reinforce, over a vocabulary sharded across tensor-parallel ranks.

Tensors and an optional process group go in; per-token losses with gradients to the student, and detached metrics in nats,
come out. Nothing here imports Megatron, a server or a launcher. Sums, masks and divisions by token counts are the
caller's, so that micro-batching and packing cannot change a result.
"""

from megatron_distill.losses.kl import KLTerms, distill_kl
from megatron_distill.losses.sampled import TokenTerms, vocab_parallel_logprobs
from megatron_distill.losses.topk import TopKTerms, distill_kl_topk, vocab_parallel_topk

__all__ = [
    "KLTerms",
    "TokenTerms",
    "TopKTerms",
    "distill_kl",
    "distill_kl_topk",
    "vocab_parallel_logprobs",
    "vocab_parallel_topk",
]
