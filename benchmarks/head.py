"""What the head costs a run: time and memory from hidden states to gradients, over whole logits and chunk by chunk.

    python -m benchmarks.head                          # Qwen3's vocabulary and 0.6B's width, fp32 and bf16: some minutes
    python -m benchmarks.head --tokens 96 --vocab 4096 # a look
    python -m benchmarks.head --device cuda --tokens 4096

Every row computes loss, gradients to hidden states and head, and a run's metrics (the fused function: its own five), from the
same tensors. "logits" is the largest sum of tensors as wide as the vocabulary with a row a token, as a multiple of one fp32
[T, V]; "peak" is all memory beyond the inputs at its height, the head's gradient included. Times are of one run after one to
warm up.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from megatron_distill.config import DistillConfig
from megatron_distill.losses import fused_linear_distill_kl
from megatron_distill.rollouts.batches import MicroBatch, TopKTensors
from megatron_distill.training.chunked_head import ChunkedHead, HiddenTensors
from megatron_distill.training.components import Distill, LogitTensors, Shards, StepPlan
from megatron_distill.training.objective import Objective

WEIGHT, TOP_K = 0.2, 64
Loss = Callable[[], Tensor]
Way = tuple[str, Loss, list[Tensor]]


def micro_batch(tokens: int, vocab: int, device: str, top_k: int = 0) -> MicroBatch:
    """One response of the student's; nothing but its tokens matters here."""
    ids_T = torch.arange(tokens, device=device) % vocab
    zeros_T, true_T = torch.zeros(tokens, device=device), torch.ones(tokens, dtype=torch.bool, device=device)
    signal = None
    if top_k:
        ids_TK = torch.stack([(ids_T * 7 + k * 11) % vocab for k in range(top_k)], 1)
        logprobs_TK = torch.full((tokens, top_k), 0.9 / top_k, device=device).log()
        signal = TopKTensors(zeros_T - 3, ids_TK, logprobs_TK, torch.full((tokens, 1), -9.0, device=device))
    return MicroBatch(
        tokens_RL=ids_T[None],
        position_ids_RL=ids_T[None],
        attention_mask=None,
        sequence_starts=torch.tensor([0, tokens], dtype=torch.int32),
        max_sequence_tokens=tokens,
        logits_index_T=ids_T,
        target_ids_T=ids_T,
        response_quarter_T=ids_T % 4,
        response_share_T=zeros_T + 1 / tokens,
        sampler_logprobs_T=zeros_T - 3,
        is_scored_T=true_T,
        is_student_T=true_T,
        is_stale_T=~true_T,
        advantages_T=zeros_T,
        policy_weights_T=zeros_T,
        signal=signal,
    )


def rows_of(tokens: int, vocab: int, features: int, dtype: torch.dtype, device: str) -> Iterator[Way]:
    """(name, forward, what gets gradients) of every way."""
    torch.manual_seed(1)
    shapes = ((tokens, features), (vocab, features)) * 2
    made = [(torch.randn(shape, device=device) / features**0.25).to(dtype) for shape in shapes]
    student = HiddenTensors(made[0].requires_grad_(), made[1].requires_grad_())
    teacher = HiddenTensors(made[2], made[3])
    objective = Objective([Distill(DistillConfig(), "bucket")], Shards(None, vocab))
    plan = StepPlan(0, WEIGHT, float(tokens), {"distill": float(tokens)})

    def whole(batch: MicroBatch, beside: HiddenTensors | None) -> Tensor:
        signal = None if beside is None else LogitTensors(beside.logits())
        return objective(student.logits(), batch, plan, signal).loss

    def chunked(batch: MicroBatch, beside: HiddenTensors | None, chunk_tokens: int) -> Tensor:
        return ChunkedHead(objective, chunk_tokens)(student, batch, plan, teacher=beside).loss

    def fused() -> Tensor:
        pairs = (student.hidden_TH, student.head_VH, teacher.hidden_TH, teacher.head_VH)
        return fused_linear_distill_kl(*pairs, reverse_kl_weight=WEIGHT).loss.sum()

    leaves = [student.hidden_TH, student.head_VH]
    for of_teacher, batch, beside in (
        ("teacher in the trainer", micro_batch(tokens, vocab, device), teacher),
        (f"top-{TOP_K}", micro_batch(tokens, vocab, device, TOP_K), None),
    ):
        yield f"{of_teacher}: whole logits, kept for autograd", partial(whole, batch, beside), leaves
        yield f"{of_teacher}: one chunk", partial(chunked, batch, beside, tokens), leaves
        yield f"{of_teacher}: chunks", partial(chunked, batch, beside, 0), leaves
        if beside is not None:
            yield "fused_linear_distill_kl", fused, leaves


def peaks(run: Callable[[], object], vocab: int, features: int, element: int) -> tuple[int, int]:
    """Bytes at the height: of tensors as wide as the vocabulary with a row a token, and of all."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    heads = {vocab * features * size for size in (2, 4)}
    held = [0, 0]
    highest = [0, 0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        size = abs(event.nbytes())
        is_wide = size >= vocab * element and size % (vocab * element) == 0 and size not in heads
        for which in (0, 1) if is_wide else (1,):
            held[which] += event.nbytes()
            highest[which] = max(highest[which], held[which])
    return highest[0], highest[1]


def clocked(function: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main() -> None:
    """Print a table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.dtypes:
        dtype = getattr(torch, name)
        print(f"\n{name}: {given.tokens} tokens, {given.vocab:,} columns, {given.features:,} features\n")
        print("| | forward, s | backward, s | logits, of fp32 [T, V] | peak, MiB |")
        print("|---|---|---|---|---|")
        for row, forward, leaves in rows_of(given.tokens, given.vocab, given.features, dtype, given.device):

            def once(forward: Loss = forward, leaves: list[Tensor] = leaves) -> tuple[Tensor, ...]:
                return torch.autograd.grad(forward(), leaves)

            wide, every = peaks(once, given.vocab, given.features, dtype.itemsize)
            seconds, loss = clocked(forward, given.device)
            back, _ = clocked(lambda loss=loss, leaves=leaves: torch.autograd.grad(loss, leaves)[0], given.device)  # type: ignore[misc]
            share = wide / (4 * given.tokens * given.vocab)
            print(f"| {row} | {seconds:.2f} | {back:.2f} | {share:.2f} | {every / 2**20:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
