"""The teacher as a Megatron model beside the student: its whole distribution, its head sharded like the student's.

In: a Hugging Face directory and the student's parallel layout. Out: hidden states of a batch's response tokens and the head
that makes logits [T, V/tp] of them, without a server, a top-k or a transfer. Costs the teacher's parameters and one forward
pass on the trainer's devices.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_distill.convert.live import load_hf_weights
from megatron_distill.megatron.backend import Backend
from megatron_distill.megatron.forward_step import run_model
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.models.megatron_gpt import build_gpt_model, transformer_config_kwargs
from megatron_distill.rollouts.batches import MicroBatch
from megatron_distill.training.chunked_head import HiddenTensors

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


class InProcessTeacher:
    """A frozen model under the student's tensor-parallel groups; call it with a micro-batch."""

    def __init__(self, path: str | Path, *, padded_vocab_size: int, backend: Backend, device: torch.device) -> None:
        """Build it and load its weights. Collective over the tensor-parallel group; Megatron must be initialised.

        Args:
            path: Hugging Face directory.
            padded_vocab_size: the student's, so that both vocabularies are cut at the same columns.
            backend: the student's.
            device: where the student is, and the teacher goes.
        """
        from megatron.training import get_args
        from megatron.training.arguments import core_transformer_config_from_args

        hf_config = HfConfig.from_dir(path)
        student = core_transformer_config_from_args(get_args())
        self._model = build_gpt_model(
            hf_config,
            config_like(student, hf_config, backend),
            padded_vocab_size=padded_vocab_size,
            use_transformer_engine=backend.use_transformer_engine,
            packed_attention=backend.packed_kernels,
        ).to(device=device, dtype=student.params_dtype)
        load_hf_weights(self._model, path)
        self._model.requires_grad_(False).eval()
        self._packed_kernels = backend.packed_kernels

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> HiddenTensors:
        """What it says of the batch's response tokens, in the student's dtype."""
        said = run_model(self._model, batch, packed_kernels=self._packed_kernels)
        assert isinstance(said, HiddenTensors)
        return said


def config_like(student: "TransformerConfig", hf_config: HfConfig, backend: Backend) -> "TransformerConfig":
    """The student's config with another architecture: layout, precision and kernels, whatever was chosen, are shared."""
    experts: dict[str, Any] = {
        "num_moe_experts": None,
        "moe_ffn_hidden_size": None,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": False,
        "expert_model_parallel_size": 1,
    }
    if hf_config.num_experts:
        engine = backend.use_transformer_engine
        experts |= {"expert_model_parallel_size": student.expert_model_parallel_size}
        experts |= {"moe_token_dispatcher_type": "alltoall"}
        experts |= {"moe_grouped_gemm": engine, "moe_permute_fusion": engine}
    recompute = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
    return replace(student, **(experts | recompute | transformer_config_kwargs(hf_config)))
