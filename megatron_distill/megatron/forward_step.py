"""The function that Megatron's loop calls on each micro-batch: the student's hidden states, then the loss.

``make_forward_step`` returns a ``forward_step(data_iterator, model)`` for ``megatron.training.pretrain`` or for any
script that drives Megatron's schedules; the iterator must yield ``StepBatch``es.

    batch -> model -> response tokens' hidden rows [T, H] -> chunks of logits -> objective -> one number, and metrics
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megatron_distill.rollouts.batches import MicroBatch
from megatron_distill.training.chunked_head import ChunkedHead, HiddenTensors
from megatron_distill.training.feed import StepBatch

FrozenModel = Callable[[MicroBatch], HiddenTensors]
"""What a model that does not learn says of a batch's response tokens, wherever it runs."""

FrozenTeacher = Callable[[MicroBatch], HiddenTensors | None]
"""The same of a teacher; None where it said nothing of the batch."""


def run_model(model: Any, batch: MicroBatch, *, packed_kernels: bool) -> torch.Tensor | HiddenTensors:
    """The model's output for a micro-batch: on the last pipeline stage, hidden states of response tokens, and the head.

    Only rows that predict a response token leave the model (Megatron's ``output_processor``), in its dtype: the losses compute
    in fp32 whatever they are given.

    Args:
        model: a Megatron ``GPTModel``, wrapped or not.
        batch: on the model's device.
        packed_kernels: attention goes to packed sequences by their lengths, over one long row [1, R * L]; Megatron's local
            attention takes the rows and a block-diagonal mask.
    """
    options: dict[str, Any] = {"output_processor": _response_rows, "output_processor_context": batch.logits_index_T}
    if _is_half(model):
        options["fp32_output"] = False
    if not packed_kernels:
        return model(batch.tokens_RL, batch.position_ids_RL, batch.attention_mask, **options)
    packed = packed_sequences(batch.sequence_starts, batch.max_sequence_tokens)
    tokens, positions = batch.tokens_RL.view(1, -1), batch.position_ids_RL.view(1, -1)
    return model(tokens, positions, None, packed_seq_params=packed, **options)


def packed_sequences(sequence_starts: torch.Tensor, max_sequence_tokens: int) -> Any:
    """Megatron's ``PackedSeqParams``, of which kernels learn where the sequences of a row lie."""
    from megatron.core.packed_seq_params import PackedSeqParams

    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=sequence_starts,
        cu_seqlens_kv=sequence_starts,
        # Context parallelism pads each sequence, and its padding counts as its own: no gaps between sequences, so that
        # Transformer Engine need not compare.
        cu_seqlens_q_padded=sequence_starts,
        cu_seqlens_kv_padded=sequence_starts,
        pad_between_seqs=False,
        max_seqlen_q=max_sequence_tokens,
        max_seqlen_kv=max_sequence_tokens,
    )


def _response_rows(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    context: torch.Tensor,
    **_: Any,
) -> HiddenTensors:
    """The rows ``context`` [T] of the hidden states [L, R, H], or [L / tp, R, H] of every tp rank; and the output matrix.

    The rows' gradient will be that of this rank's columns: the backward of either mapping adds up the ranks'.
    """
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    is_sequence_parallel = output_layer.sequence_parallel
    if is_sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states)
    rows = hidden_states.transpose(0, 1).reshape(-1, hidden_states.shape[-1]).index_select(0, context)
    if not is_sequence_parallel:
        rows = copy_to_tensor_model_parallel_region(rows)
    with torch.no_grad():
        # Of no rows, for the sake of the layer's hooks: one waits for its weights under --overlap-param-gather.
        output_layer.sequence_parallel = False
        output_layer(rows[:0].unsqueeze(1), weight=output_weight)
        output_layer.sequence_parallel = is_sequence_parallel
    weight = output_layer.weight if output_weight is None else output_weight
    adds_itself = output_layer.gradient_accumulation_fusion and hasattr(weight, "main_grad")
    return HiddenTensors(rows, weight, partial(_into_main_grad, weight) if adds_itself else None)


def _into_main_grad(head_VH: torch.Tensor, grad_VH: torch.Tensor) -> torch.Tensor:
    """Add the head's gradient to Megatron's fp32 one, as its linear layers do under ``gradient_accumulation_fusion``.

    What autograd then has of it only runs the hooks. Where an embedding is the head as well, that is added to the embedding's
    own part, and must be zero.
    """
    head: Any = head_VH
    head.main_grad.add_(grad_VH)
    head.grad_added_to_main_grad = True
    return torch.zeros_like(head_VH) if getattr(head, "zero_out_wgrad", False) else torch.empty_like(head_VH)


def _is_half(model: Any) -> bool:
    """Whether Megatron wrapped the model for bf16; only that wrapper knows ``fp32_output``."""
    from megatron.core.transformer.module import Float16Module

    while model is not None and not isinstance(model, Float16Module):
        model = getattr(model, "module", None)
    return model is not None


def make_forward_step(
    head: ChunkedHead,
    *,
    packed_kernels: bool,
    teacher: FrozenTeacher | None = None,
    reference: FrozenModel | None = None,
    record: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> Callable[[Iterator[StepBatch], Any], tuple[Any, Callable[[HiddenTensors], Any]]]:
    """Build the ``forward_step`` of a run.

    Args:
        head: turns hidden states into a loss and metrics.
        packed_kernels: see ``run_model``.
        teacher: gives the teacher's hidden states and its head; None if its scores travel with the batch.
        reference: RL's reference model; None without one.
        record: takes every micro-batch's {metric: [sum, count]}, e.g. ``StepSums.add``.

    Returns:
        A function of (data_iterator, model) for Megatron's schedules. Its loss function returns, as
        ``--calculate-per-token-loss`` wants, (sum over tokens, number of tokens, {metric: [sum, count]}).
    """

    def forward_step(data_iterator: Iterator[StepBatch], model: Any) -> tuple[Any, Callable[[HiddenTensors], Any]]:
        step_batch = next(data_iterator)
        batch, plan = step_batch.batch, step_batch.plan
        output = run_model(model, batch, packed_kernels=packed_kernels)

        def loss_function(student: HiddenTensors) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            report = head(
                student,
                batch,
                plan,
                teacher=teacher(batch) if teacher is not None else None,
                reference=reference(batch) if reference is not None else None,
            )
            if record is not None:
                record(report.sums)
            num_tokens = torch.tensor(batch.target_ids_T.numel(), dtype=torch.int, device=report.loss.device)
            return report.loss, num_tokens, {"loss": report.sums["loss"]}

        return output, loss_function

    return forward_step
