"""NeMo RL's distillation loss by another engine, with a tail bucket: the same call, for a teacher's top-k log-probabilities.

    loss_fn = TailBucketDistillationLoss({"kl_type": "mixed", "mixed_kl_weight": 0.2}, vocab_size=151_936)

The call is that of NeMo RL at 005a098; newer versions hand their losses other arguments.

NeMo RL's `mixed_kl_weight` weights the *forward* KL. Its loss renormalises both models over the K tokens (or drops the rest);
here the rest is one more outcome. Pass the teacher's log-probabilities, not its logits: K logits alone do not say how much
probability they hold.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_distill.losses import distill_kl_topk


class TailBucketDistillationLoss:
    """A token-level loss, called as NeMo RL calls `DistillationLossFn`.

    Args:
        config: `kl_type` ("forward", "reverse" or "mixed") and, for "mixed", `mixed_kl_weight`.
        vocab_size: of the tokenizer; columns beyond it are Megatron's padding. None: all columns are tokens.
    """

    def __init__(self, config: dict[str, Any], vocab_size: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.reverse_kl_weight = {"forward": 0.0, "reverse": 1.0}.get(
            config["kl_type"], 1.0 - config.get("mixed_kl_weight", 0.5)
        )

    def __call__(
        self,
        next_token_logits: Tensor,
        data: dict[str, Tensor],
        global_valid_seqs: Tensor | None,
        global_valid_toks: Tensor,
        vocab_parallel_rank: int | None = None,
        vocab_parallel_group: dist.ProcessGroup | None = None,
        context_parallel_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of the batch over all replicas' tokens, and metrics.

        Args:
            next_token_logits: `[batch, sequence, V / tp]`.
            data: `teacher_topk_logprobs` and `teacher_topk_indices` `[batch, sequence, K]`, `token_mask` `[batch, sequence]`,
                `sample_mask` `[batch]`.
            global_valid_toks: counted tokens over all replicas, which divides.
            vocab_parallel_group: that the columns are sharded over.
            context_parallel_group: of one rank: the data are whole sequences, and so must the logits be.
            global_valid_seqs, vocab_parallel_rank: not needed.

        Raises:
            ValueError: sequences are cut over ranks.
        """
        if context_parallel_group is not None and context_parallel_group.size() > 1:
            raise ValueError(
                "context_parallel_group = of several ranks: gather the sequences' logits first, as NeMo RL does."
            )
        terms = distill_kl_topk(
            next_token_logits[:, :-1],
            data["teacher_topk_indices"][:, :-1],
            data["teacher_topk_logprobs"][:, :-1],
            reverse_kl_weight=self.reverse_kl_weight,
            tp_group=vocab_parallel_group,
            vocab_size=self.vocab_size,
        )
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        loss = torch.where(mask > 0, terms.loss * mask, 0.0).sum() / global_valid_toks
        return loss, {"loss": loss.item(), "num_valid_samples": data["sample_mask"].sum().item()}
