"""The teacher as a Megatron model beside the student: its whole distribution, its head sharded like the student's.

In: a Hugging Face directory and the student's parallel layout. Out: hidden states of a batch's response tokens and the head
that makes logits [T, V/tp] of them, without a server, a top-k or a transfer. Costs the teacher's parameters and one forward
pass on the trainer's devices.

In a pipeline its layers lie on the student's stages, and a whole step's micro-batches pass through them before the student's
do; the last stage keeps their hidden states for the step. Without one, each is asked for where the loss needs it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_distill.convert.live import load_hf_weights
from megatron_distill.megatron.backend import Backend
from megatron_distill.megatron.forward_step import run_model
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.models.megatron_gpt import build_gpt_model, transformer_config_kwargs
from megatron_distill.models.pipeline import megatron_layout, stage_layers
from megatron_distill.rollouts.batches import MicroBatch
from megatron_distill.training.chunked_head import HiddenTensors

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


class InProcessTeacher:
    """A frozen model on the student's parallel groups; call it with a micro-batch, on the last stage."""

    def __init__(self, path: str | Path, *, padded_vocab_size: int, backend: Backend, device: torch.device) -> None:
        """Build this rank's part and load its weights. Collective over all ranks; Megatron must be initialised.

        Args:
            path: Hugging Face directory.
            padded_vocab_size: the student's, so that both vocabularies are cut at the same columns.
            backend: the student's.
            device: where the student is, and the teacher goes.
        """
        from megatron.core import mpu
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
            pre_process=mpu.is_pipeline_first_stage(ignore_virtual=True),
            post_process=mpu.is_pipeline_last_stage(ignore_virtual=True),
            vp_stage=0,  # its only one; Megatron asks for a number where the student has several
        ).to(device=device, dtype=student.params_dtype)
        load_hf_weights(self._model, path)
        self._model.requires_grad_(False).eval()
        self._packed_kernels = backend.packed_kernels
        self._read: dict[int, HiddenTensors] = {}

    @torch.no_grad()
    def read(self, batches: Sequence[MicroBatch]) -> None:
        """Pass a step's micro-batches through the pipeline, if there is one. Collective over its stages, outside of a step."""
        from megatron.core import mpu
        from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving

        if mpu.get_pipeline_model_parallel_world_size() == 1:
            return
        said = forward_backward_pipelining_without_interleaving(
            forward_step_func=self._stage,
            data_iterator=iter(batches),
            model=[self._model],
            num_microbatches=len(batches),
            seq_length=1,  # unused: shapes travel with the tensors (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        # Only the last stage has said anything.
        self._read = {id(batch): rows for batch, rows in zip(batches, said, strict=False)}

    def _stage(
        self, batches: Iterator[MicroBatch], model: Any
    ) -> tuple[torch.Tensor, Callable[..., torch.Tensor | HiddenTensors]]:
        """A forward step of Megatron's schedules, which hands on tensors and collects what the last stage says."""
        said = run_model(model, next(batches), packed_kernels=self._packed_kernels)
        return said.hidden_TH if isinstance(said, HiddenTensors) else said, lambda _, non_loss_data: said

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> HiddenTensors:
        """What it says of the batch's response tokens, in the student's dtype."""
        if id(batch) in self._read:
            return self._read.pop(id(batch))
        said = run_model(self._model, batch, packed_kernels=self._packed_kernels)
        assert isinstance(said, HiddenTensors)
        return said


def config_like(student: "TransformerConfig", hf_config: HfConfig, backend: Backend) -> "TransformerConfig":
    """The student's config with another architecture: layout, dtype and kernels, whatever was chosen, are shared.

    Its pipeline has no virtual stages: they save idle time between forward and backward passes, and there are no backward ones.
    Nor is it quantised where the student is (fp8, fp4): what is imitated is the teacher as it is.
    """
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
    quantised = {"fp8": None, "fp4": None}
    quantised |= dict.fromkeys(("moe_router_padding_for_fp8", "moe_router_padding_for_quantization"), False)
    recompute = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
    stages = student.pipeline_model_parallel_size
    pipeline: dict[str, Any] = {
        "pipeline_model_parallel_layout": None,
        "virtual_pipeline_model_parallel_size": None,
        "overlap_p2p_comm": False,
        "batch_p2p_comm": True,
    }
    if hf_config.num_layers % stages:
        pipeline["pipeline_model_parallel_layout"] = megatron_layout(stage_layers(hf_config.num_layers, stages))
    teacher = replace(student, **(experts | quantised | recompute | pipeline | transformer_config_kwargs(hf_config)))
    # Packed rows differ in length; Megatron's own check would refuse it without experts.
    teacher.variable_seq_lengths = stages > 1
    return teacher
