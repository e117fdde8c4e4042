"""Convert whole checkpoints on disk, one tensor at a time: no GPU, no process group, no Megatron import.

In: a Hugging Face directory or a Megatron ``torch_dist`` checkpoint. Out: the other one, complete or not there at all.
Memory holds about one tensor (and its packed copy), whatever the model's size.

Names to know: ``hf_to_megatron``, ``megatron_to_hf``, ``companion_of``.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_distill.convert.hf_files import (
    DEFAULT_FILE_BYTES,
    HfDirectory,
    HfDirectoryWriter,
    atomic_directory,
    check_free_space,
    copy_companions,
    name_end_tokens,
    write_config,
)
from megatron_distill.convert.layout import hf_of_shards, shard_of_hf
from megatron_distill.convert.megatron_files import HF_COMPANION, MegatronCheckpoint, MegatronCheckpointWriter
from megatron_distill.errors import CheckpointError
from megatron_distill.models.families import Rule, tensor_rules
from megatron_distill.models.hf_config import VOCAB_DIVISOR, HfConfig, padded_vocab_size
from megatron_distill.models.megatron_gpt import megatron_arguments

ARGUMENTS_FILE = "megatron_arguments.txt"
_OVERHEAD_BYTES = 16 << 20  # headers, table of contents, tokenizer


def hf_to_megatron(
    source: str | Path,
    target: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    make_vocab_size_divisible_by: int = VOCAB_DIVISOR,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a ``torch_dist`` checkpoint that ``megatron.training --load`` takes, at any tp and pp.

    Beside the weights it holds the Hugging Face companions (``hf/``) and ``megatron_arguments.txt``, the flags that
    describe the architecture.

    Args:
        source: Hugging Face directory.
        target: directory to create.
        tp: tensor-parallel size that the job will start with: it is checked, recorded, and decides the vocabulary padding.
            Other sizes load too.
        pp: pipeline-parallel size, checked and recorded.
        ep: expert-parallel size, checked and recorded.
        make_vocab_size_divisible_by: as in ``megatron.training``.
        max_file_bytes: a file is closed once it holds this many bytes.
        overwrite: replace an existing target once the new one is complete.

    Raises:
        CheckpointError: the source is incomplete, corrupt, or not understood, the layout does not fit the architecture,
            or the disk is too small. The source is only ever read.
    """
    config = HfConfig.from_dir(source)
    reader = HfDirectory(source)
    reader.check(config)
    _check_layout(config, tp, pp, ep)
    padded = padded_vocab_size(config.vocab_size, make_vocab_size_divisible_by, tp)
    with atomic_directory(target, overwrite=overwrite, sources=[source]) as partial:
        padding_rows = (padded - config.vocab_size) * (1 if config.tie_word_embeddings else 2)
        padding_bytes = padding_rows * config.hidden_size * 4
        check_free_space(partial, reader.num_bytes + padding_bytes + _OVERHEAD_BYTES)
        with MegatronCheckpointWriter(partial, config, max_file_bytes) as writer:
            for rule in _progress(tensor_rules(config), config, "Hugging Face -> Megatron"):
                writer.write(rule, shard_of_hf(rule, config, reader, padded_vocab_size=padded))
            writer.finish(_checkpoint_arguments(config, tp, pp, ep, padded))
        companion = partial / HF_COMPANION
        companion.mkdir()
        copy_companions(source, companion)
        write_config(config, companion)
        flags = [*megatron_arguments(config), f"--make-vocab-size-divisible-by={make_vocab_size_divisible_by}"]
        (partial / ARGUMENTS_FILE).write_text("\n".join(flags) + "\n", encoding="utf-8")


def megatron_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    hf_dir: str | Path | None = None,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    overwrite: bool = False,
    end_token_ids: Sequence[int] = (),
) -> None:
    """Write a Hugging Face directory from a ``torch_dist`` checkpoint that any tp, pp and ep wrote.

    Args:
        source: the folder that ``--save`` wrote (its latest iteration is taken), or one iteration's folder.
        target: directory to create.
        hf_dir: where ``config.json``, tokenizer and the like come from; by default ``hf/`` in the checkpoint.
        max_file_bytes: size of one safetensors file.
        overwrite: replace an existing target once the new one is complete.
        end_token_ids: end a response, beside those that ``hf_dir`` names.

    Raises:
        CheckpointError: the source is incomplete, corrupt, or holds weights we do not understand, or the disk is too
            small. The source is only ever read.
    """
    checkpoint = MegatronCheckpoint(source)
    companion = companion_of(checkpoint, hf_dir)
    config = HfConfig.from_dir(companion)
    checkpoint.check(config)
    dtype = checkpoint.dtype()
    planned = {tensor.name: (tensor.shape(config), dtype) for rule in tensor_rules(config) for tensor in rule.hf}
    with atomic_directory(target, overwrite=overwrite, sources=[source, companion]) as partial:
        writer = HfDirectoryWriter(partial, planned, max_file_bytes)
        check_free_space(partial, writer.num_bytes + _OVERHEAD_BYTES)
        with writer:
            for rule in _progress(tensor_rules(config), config, "Megatron -> Hugging Face"):
                tensors = hf_of_shards(rule, config, [checkpoint.read(rule, config)])
                for planned_tensor, tensor in zip(rule.hf, tensors, strict=True):
                    writer.write(planned_tensor.name, tensor)
        copy_companions(companion, partial)
        name_end_tokens(partial, end_token_ids)
        write_config(config, partial, dtype)


def companion_of(checkpoint: MegatronCheckpoint, hf_dir: str | Path | None) -> Path:
    """The directory whose config.json describes a Megatron checkpoint.

    Raises:
        CheckpointError: there is none in the checkpoint, and none was given.
    """
    if hf_dir is not None:
        return Path(hf_dir)
    if not (checkpoint.companion / "config.json").exists():
        raise CheckpointError(
            f"{checkpoint.companion}: no config.json. megatron.training saves weights without their Hugging Face "
            "description. Say where it is with --hf MODEL_DIR."
        )
    return checkpoint.companion


def _progress(rules: Iterable[Rule], config: HfConfig, phase: str) -> Iterable[Rule]:
    """The rules behind a progress bar, which shows on a terminal only."""
    listed = list(rules)
    return tqdm(listed, desc=f"{phase} ({config.model_type})", unit=" tensors", disable=None)


def _check_layout(config: HfConfig, tp: int, pp: int, ep: int) -> None:
    problems = [f"{name} = {size} is below 1" for name, size in (("tp", tp), ("pp", pp), ("ep", ep)) if size < 1]
    if problems:
        raise CheckpointError("layout: " + "; ".join(problems) + ". Give positive sizes.")
    if config.num_attention_heads % tp:
        problems.append(f"tp = {tp} does not divide {config.num_attention_heads} attention heads")
    if config.num_query_groups % tp and tp % config.num_query_groups:
        problems.append(f"tp = {tp} and {config.num_query_groups} key/value heads: one must divide the other")
    if config.ffn_hidden_size % tp:
        problems.append(f"tp = {tp} does not divide the MLP's {config.ffn_hidden_size} features")
    if config.num_layers % pp:
        problems.append(f"pp = {pp} does not divide {config.num_layers} layers")
    if ep > 1 and (config.num_experts == 0 or config.num_experts % ep):
        problems.append(f"ep = {ep} does not divide {config.num_experts} experts")
    if problems:
        raise CheckpointError(
            "layout: " + "; ".join(problems) + ". Megatron cuts evenly. Choose sizes that divide the model."
        )


def _checkpoint_arguments(config: HfConfig, tp: int, pp: int, ep: int, padded: int) -> argparse.Namespace:
    """What Megatron reads from a checkpoint's own arguments: ``--use-checkpoint-args``, and its check after loading."""
    arguments = argparse.Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        group_query_attention=True,
        kv_channels=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_base=int(config.rope.theta),
        rotary_percent=1.0,
        rotary_interleaved=False,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        swiglu=True,
        normalization="RMSNorm",
        qk_layernorm=config.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        padded_vocab_size=padded,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
    if config.num_experts:
        arguments.num_experts = config.num_experts
        arguments.moe_ffn_hidden_size = config.expert_ffn_hidden_size
        arguments.moe_router_topk = config.experts_per_token
        arguments.moe_router_pre_softmax = not config.norm_topk_prob
        arguments.moe_layer_freq = 1
    return arguments
