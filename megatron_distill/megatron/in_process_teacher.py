"""The teacher as a Megatron model beside the student: its whole distribution, its head sharded like the student's.

In: a Hugging Face directory and the student's parallel layout. Out: hidden states of a batch's response tokens and the head
that makes logits [T, V/tp] of them, without a server, a top-k or a transfer. Costs the teacher's parameters and one forward
pass on the trainer's devices.

In a pipeline its layers lie on the student's stages. Where it is too large for one replica, each layer lies on the tp ranks of
several, which are ``neighbours``. In either case a whole step's micro-batches pass through it before the student's do, and
their hidden states are kept for the step; else each is asked for where the loss needs it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_distill.convert.live import load_hf_weights
from megatron_distill.megatron.backend import MegatronBackend
from megatron_distill.megatron.forward_step import run_model
from megatron_distill.megatron.neighbours import Neighbours
from megatron_distill.megatron.teacher_head import TeacherHead
from megatron_distill.models.hf_config import VOCAB_DIVISOR, HfConfig
from megatron_distill.models.hf_config import padded_vocab_size as pad_vocabulary
from megatron_distill.models.megatron_gpt import build_gpt_model, transformer_config_kwargs
from megatron_distill.models.pipeline import megatron_layout, stage_layers
from megatron_distill.rollouts.batches import MicroBatch
from megatron_distill.training.chunked_head import HiddenTensors

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


class InProcessTeacher:
    """A frozen model on the student's parallel groups; call it with a micro-batch, on the last stage."""

    def __init__(
        self,
        path: str | Path,
        *,
        padded_vocab_size: int,
        backend: MegatronBackend,
        device: torch.device,
        neighbours: Neighbours | None = None,
    ) -> None:
        """Build this rank's part and load its weights. Collective over all ranks; Megatron must be initialised.

        Args:
            path: Hugging Face directory.
            padded_vocab_size: the student's, so that both vocabularies are cut at the same columns.
            backend: the student's.
            device: where the student is, and the teacher goes.
            neighbours: replicas that share each layer; None shares it as the student's are.
        """
        from megatron.core import mpu
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training import get_args
        from megatron.training.arguments import core_transformer_config_from_args

        hf_config = HfConfig.from_dir(path)
        student = core_transformer_config_from_args(get_args())
        groups, tp, rows = ProcessGroupCollection.use_mpu_process_groups(), None, padded_vocab_size
        if neighbours is not None:
            groups.tp, tp = neighbours.tp_group, neighbours.tp_group.size()
            rows = pad_vocabulary(hf_config.vocab_size, VOCAB_DIVISOR, tp)
        self._model = build_gpt_model(
            hf_config,
            config_like(student, hf_config, backend, tp),
            padded_vocab_size=rows,
            use_transformer_engine=backend.use_transformer_engine,
            packed_attention=backend.packed_kernels,
            pre_process=mpu.is_pipeline_first_stage(ignore_virtual=True),
            post_process=mpu.is_pipeline_last_stage(ignore_virtual=True),
            vp_stage=0,  # its only one; Megatron asks for a number where the student has several
            pg_collection=groups,
        ).to(device=device, dtype=student.params_dtype)
        load_hf_weights(self._model, path)
        self._model.requires_grad_(False).eval()
        self._packed_kernels = backend.packed_kernels
        self._neighbours = neighbours
        self._head_VH = None  # the model's own
        if neighbours is not None and mpu.is_pipeline_last_stage(ignore_virtual=True):
            self._head_VH = TeacherHead(
                path,
                padded_vocab_size=padded_vocab_size,
                tp_rank=mpu.get_tensor_model_parallel_rank(),
                tp_size=mpu.get_tensor_model_parallel_world_size(),
                dtype=student.params_dtype,
                device=device,
            ).weight_VH
        self._own: set[int] = set()
        self._read: dict[int, HiddenTensors] = {}

    @torch.no_grad()
    def read(self, batches: Sequence[MicroBatch]) -> None:
        """Pass a step's micro-batches through it, if a pipeline's stages or neighbours must do so together with this rank.

        Collective over them, outside of a step.
        """
        from megatron.core import mpu
        from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving

        is_pipeline = mpu.get_pipeline_model_parallel_world_size() > 1
        if self._neighbours is None and not is_pipeline:
            return
        self._own, self._read = {id(batch) for batch in batches}, {}
        pooled = batches if self._neighbours is None else self._neighbours.pool(batches)
        passes = iter(pooled)
        if is_pipeline:
            forward_backward_pipelining_without_interleaving(
                forward_step_func=self._pass,
                data_iterator=passes,
                model=[self._model],
                num_microbatches=len(pooled),
                seq_length=1,  # unused: shapes travel with the tensors (variable_seq_lengths)
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        else:
            for _ in pooled:
                self._pass(passes, self._model)

    def _pass(self, batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Callable[..., None]]:
        """A forward step of Megatron's schedules, which hands on tensors; what the last stage says of own batches is kept."""
        batch = next(batches)
        said = run_model(model, batch, packed_kernels=self._packed_kernels)
        if isinstance(said, HiddenTensors):
            if id(batch) in self._own:
                self._read[id(batch)] = said if self._head_VH is None else replace(said, head_VH=self._head_VH)
            said = said.hidden_TH
        return said, lambda _, non_loss_data: None

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> HiddenTensors:
        """What it says of the batch's response tokens, in the student's dtype."""
        if id(batch) in self._read:
            return self._read.pop(id(batch))
        said = run_model(self._model, batch, packed_kernels=self._packed_kernels)
        assert isinstance(said, HiddenTensors)
        return said


def config_like(
    student: "TransformerConfig", hf_config: HfConfig, backend: MegatronBackend, tp: int | None = None
) -> "TransformerConfig":
    """The student's config with another architecture: layout, dtype and kernels, whatever was chosen, are shared.

    Its pipeline has no virtual stages: they save idle time between forward and backward passes, and there are no backward ones.
    Nor is it quantised where the student is (fp8, fp4): what is imitated is the teacher as it is. Over ``tp`` ranks of its own
    its rows need not divide by them: it goes without sequence parallelism, which saves what only a backward pass keeps.
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
        experts |= {"moe_router_dtype": "fp32" if engine else student.moe_router_dtype}
    quantised: dict[str, Any] = {"fp8": None, "fp4": None}
    quantised |= dict.fromkeys(("moe_router_padding_for_fp8", "moe_router_padding_for_quantization"), False)
    recompute = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
    sizes: dict[str, Any] = {}
    if tp is not None:
        sizes = {"tensor_model_parallel_size": tp, "tensor_parallel_num_weight_shards": tp, "sequence_parallel": False}
    stages = student.pipeline_model_parallel_size
    pipeline: dict[str, Any] = {
        "pipeline_model_parallel_layout": None,
        "virtual_pipeline_model_parallel_size": None,
        "overlap_p2p_comm": False,
        "batch_p2p_comm": True,
    }
    if hf_config.num_layers % stages:
        pipeline["pipeline_model_parallel_layout"] = megatron_layout(stage_layers(hf_config.num_layers, stages))
    teacher = replace(
        student, **(experts | quantised | recompute | sizes | pipeline | transformer_config_kwargs(hf_config))
    )
    # Packed rows differ in length; Megatron's own check would refuse it without experts.
    teacher.variable_seq_lengths = stages > 1
    return teacher
