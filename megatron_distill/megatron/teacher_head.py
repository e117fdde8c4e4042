"""A served teacher's output layer on the trainer's ranks: with the hidden states that its server sends, its whole distribution.

In: a Hugging Face directory, of which one matrix is read, and micro-batches with ``HiddenSignalTensors``. Out: hidden states
and the head that makes logits [T, V/tp] of them: what an in-process teacher gives, without its other layers. The matrix is
that of tied embeddings too; rows that pad the vocabulary are zeros, which losses leave out.
"""

from pathlib import Path

import torch

from megatron_distill.convert.hf_files import HfDirectory
from megatron_distill.convert.layout import shard_of_hf
from megatron_distill.errors import TeacherError
from megatron_distill.models.families import EMBEDDING, OUTPUT_LAYER, tensor_rules
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.rollouts.batches import HiddenSignalTensors, MicroBatch
from megatron_distill.training.chunked_head import HiddenTensors


class TeacherHead:
    """A frozen [V/tp, H] matrix; call it with a micro-batch.

    Attributes:
        weight_VH: this rank's rows.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        padded_vocab_size: int,
        tp_rank: int,
        tp_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Read this rank's rows.

        Args:
            path: the teacher's Hugging Face directory, which its server serves.
            padded_vocab_size: the student's, so that both vocabularies are cut at the same columns.
            tp_rank: which part of them.
            tp_size: of how many.
            dtype: the student's.
            device: where the student is.

        Raises:
            CheckpointError: the directory does not hold the model that its config describes.
        """
        config, source = HfConfig.from_dir(path), HfDirectory(path)
        source.check(config)
        name = EMBEDDING if config.tie_word_embeddings else OUTPUT_LAYER
        [rule] = [rule for rule in tensor_rules(config) if rule.megatron == name]
        rows = shard_of_hf(rule, config, source, rank=tp_rank, size=tp_size, padded_vocab_size=padded_vocab_size)
        self._path = path
        self.weight_VH = rows.to(device=device, dtype=dtype, copy=True)

    def __call__(self, batch: MicroBatch) -> HiddenTensors | None:
        """What the teacher says of the batch's response tokens; None if it said nothing of any.

        Raises:
            TeacherError: the server serves a model of another width.
        """
        if batch.signal is None:
            return None
        assert isinstance(batch.signal, HiddenSignalTensors), "transport sglang_hidden: the teacher sends hidden states"
        sent_TH, width = batch.signal.hidden_TH, self.weight_VH.shape[1]
        if sent_TH.shape[1] != width:
            raise TeacherError(
                f"teacher.path = {self._path}: its output layer takes {width} features, and the server sent "
                f"{sent_TH.shape[1]}. They are two models. Serve the model of this directory."
            )
        return HiddenTensors(sent_TH.to(self.weight_VH, non_blocking=True), self.weight_VH)
