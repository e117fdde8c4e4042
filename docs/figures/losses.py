"""Draw docs/figures/losses.png: what becomes of the reverse KL when the teacher is asked about k tokens only.

    python docs/figures/losses.py

Random models over 4,096 tokens: the student's logits are steep, the teacher's are the student's plus noise. Both panels
average over 200 tokens; the gradient's cosine is taken token by token.
"""

import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from megatron_distill.losses import distill_kl, distill_kl_topk

TOKENS, VOCAB = 200, 4096
SUPPORTS = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
STYLES = {
    "bucket": ("tab:blue", "tail bucket"),
    "renormalised": ("tab:orange", "renormalised"),
    "dropped": ("tab:red", "dropped"),
}


def curves(student: Tensor, teacher_logprobs: Tensor) -> tuple[float, dict[str, tuple[list[float], list[float]]]]:
    """The full reverse KL, and for each tail its value and its gradient's cosine to the full one, over k."""
    full = distill_kl(student, teacher_logprobs, reverse_kl_weight=1.0).loss
    (full_grad,) = torch.autograd.grad(full.sum(), student)
    results: dict[str, tuple[list[float], list[float]]] = {}
    for tail in STYLES:
        values, cosines = [], []
        for k in SUPPORTS:
            logprobs, ids = teacher_logprobs.topk(k, dim=-1)
            loss = distill_kl_topk(student, ids, logprobs, reverse_kl_weight=1.0, tail=tail).loss
            (grad,) = torch.autograd.grad(loss.sum(), student)
            values.append(loss.mean().item())
            cosines.append(torch.cosine_similarity(grad, full_grad, dim=-1).mean().item())
        results[tail] = (values, cosines)
    return full.mean().item(), results


def main() -> None:
    """Compute and draw."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    student = torch.randn(TOKENS, VOCAB) * 2.5
    teacher_logprobs = (student + 1.5 * torch.randn(TOKENS, VOCAB)).log_softmax(-1)
    full, results = curves(student.requires_grad_(), teacher_logprobs)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    left.axhline(full, color="black", linestyle="--", linewidth=1, label="full vocabulary")
    left.axhline(0, color="gray", linewidth=0.5)
    for tail, (values, cosines) in results.items():
        color, label = STYLES[tail]
        left.plot(SUPPORTS, values, color=color, marker="o", markersize=3, label=label)
        right.plot(SUPPORTS, cosines, color=color, marker="o", markersize=3, label=label)
    for axes, title in ((left, "reverse KL, nats"), (right, "cosine of its gradient to the full one")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("k, tokens asked of the teacher (of 4,096)")
        axes.set_title(title)
    right.legend(frameon=False, loc="lower right")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
