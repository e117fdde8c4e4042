"""Move weights between a Hugging Face directory and live, sharded Megatron parameters.

In: a model built by ``megatron_distill.models.megatron_gpt.build_gpt_model`` (bare, wrapped in Float16Module or DDP,
or a list of virtual-pipeline chunks), sharded over tp, pp and ep. Out: Hugging Face tensors, whole, on global rank 0 only.

::

    owners of the shards          one message per owner and bucket          global rank 0
    (replica 0 of each)  ───────────────────────────────────────────>  cat, unpack, (name, tensor)

Names to know: ``load_hf_weights``, ``stream_hf_tensors``, ``save_hf``.

The process groups are read off the model (``pg_collection``), so nothing here imports Megatron. Replicas (dp, cp) send
nothing. Under tensor parallelism every other rank allocates only what it sends, one bucket at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
from megatron_distill.errors import CheckpointError, DistillError
from megatron_distill.models.families import EMBEDDING, OUTPUT_LAYER, Rule, canonical_name, tensor_rules
from megatron_distill.models.hf_config import HfConfig

type Model = nn.Module | Sequence[nn.Module]

DEFAULT_BUCKET_BYTES = 512 << 20
RECEIVER = 0  # the global rank that gets every tensor; Megatron puts rank 0 of tp, pp, ep and dp there

_ALIGNMENT = 16  # bytes; a shard inside a message starts where any dtype may be viewed


@torch.no_grad()
def load_hf_weights(model: Model, hf_dir: str | Path) -> HfConfig:
    """Fill a live model's parameters from a Hugging Face directory; each rank reads only its own shards.

    Call it before the optimizer is built, or call the optimizer's ``reload_model_params()`` afterwards: its fp32 main
    copies do not notice.

    Args:
        model: the model, or its list of virtual-pipeline chunks.
        hf_dir: a directory with ``config.json`` and safetensors of the architecture that ``model`` was built for.

    Returns:
        The config that was read.

    Raises:
        CheckpointError: the directory is incomplete or holds anything we would drop, or the model has other shapes.
    """
    config = HfConfig.from_dir(hf_dir)
    source = HfDirectory(hf_dir)
    source.check(config)
    rules = {rule.megatron: rule for rule in tensor_rules(config)}
    if config.tie_word_embeddings:
        rules[OUTPUT_LAYER] = rules[EMBEDDING]  # the copy that the last pipeline stage holds
    for name, param, group in _local_parameters(model, config):
        rule = _rule_of(name, rules, config)
        size = group.size() if rule.tp_dim is not None else 1
        shard = shard_of_hf(rule, config, source, rank=group.rank(), size=size, padded_vocab_size=param.shape[0] * size)
        if shard.shape != param.shape:
            raise CheckpointError(
                f"{name} = {list(param.shape)} on this rank: must be {list(shard.shape)}, as {hf_dir} has it. The model "
                "was built for another architecture. Build it from this directory's config.json."
            )
        param.copy_(shard)
    return config


def stream_hf_tensors(
    model: Model,
    hf_config: HfConfig,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    names_group: dist.ProcessGroup | None = None,
) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the model's Hugging Face tensors, whole, in buckets; collective over the job's default process group.

    Every rank must iterate to the end, in step with the others; only global rank 0 is given tensors, the others get as
    many empty buckets. Before the first bucket all ranks prove that the shards add up to exactly the tensor names of
    ``hf_config`` (with tied embeddings the matrix comes once, as ``model.embed_tokens.weight``).

    Args:
        model: the model, or its list of virtual-pipeline chunks.
        hf_config: the architecture it was built for.
        bucket_bytes: a bucket holds at most this many bytes (or one larger parameter).
        names_group: of all ranks, over which names travel: a gloo group spares them the way through GPU memory. None is the
            default group, which tensors take in any case.

    Yields:
        ``[(hf_name, tensor), ...]`` in the parameters' dtype and device. A tensor may be a view of a live parameter or of
        the bucket's buffer: use it before asking for the next bucket, and copy what must outlive it.

    Raises:
        CheckpointError: on every rank alike, if a parameter has no place in the table or one is missing.
    """
    entries, local = _gather_plan(model, hf_config, names_group)
    yield from _stream(entries, local, hf_config, bucket_bytes)


@torch.no_grad()
def _stream(
    entries: Sequence["_Entry"], local: dict[str, Tensor], hf_config: HfConfig, bucket_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """The buckets, once it is known who holds what."""
    rank = dist.get_rank()
    for bucket in _buckets(entries, bucket_bytes):
        shards = _exchange(bucket, local, rank)
        if rank != RECEIVER:
            yield []
            continue
        tensors: list[tuple[str, Tensor]] = []
        for entry in bucket:
            pieces = [shards[entry.rule.megatron, owner] for owner in entry.owners]
            names = [tensor.name for tensor in entry.rule.hf]
            tensors += zip(names, hf_of_shards(entry.rule, hf_config, pieces), strict=True)
        del shards
        yield tensors


def save_hf(
    model: Model,
    hf_config: HfConfig,
    src_dir: str | Path,
    dst_dir: str | Path,
    *,
    overwrite: bool = False,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    names_group: dist.ProcessGroup | None = None,
    end_token_ids: Sequence[int] = (),
) -> None:
    """Write the live model as a Hugging Face directory that transformers and SGLang load; collective over all ranks.

    The directory appears at once, complete, or not at all; it exists on return on every rank (that shares the file system
    of rank 0).

    Args:
        model: the model, or its list of virtual-pipeline chunks.
        hf_config: the architecture it was built for; written back with the parameters' dtype.
        src_dir: where tokenizer, generation config and chat template are copied from.
        dst_dir: the directory to create.
        overwrite: replace an existing ``dst_dir`` once the new one is complete.
        max_file_bytes: size of one safetensors file.
        bucket_bytes: see ``stream_hf_tensors``.
        names_group: see ``stream_hf_tensors``.
        end_token_ids: end a response, beside those that ``src_dir`` names.

    Raises:
        CheckpointError: on every rank alike: the target exists, the disk is too small, or the model is incomplete.
    """
    entries, local = _gather_plan(model, hf_config, names_group)
    planned = {t.name: (t.shape(hf_config), entry.dtype) for entry in entries for t in entry.rule.hf}
    buckets = _stream(entries, local, hf_config, bucket_bytes)

    def write() -> None:
        with atomic_directory(dst_dir, overwrite=overwrite) as partial:
            writer = HfDirectoryWriter(partial, planned, max_file_bytes)
            check_free_space(partial, writer.num_bytes)
            write_config(hf_config, partial, entries[0].dtype)
            copy_companions(src_dir, partial)
            name_end_tokens(partial, end_token_ids)
            with writer:
                for bucket in buckets:
                    for name, tensor in bucket:
                        writer.write(name, tensor)

    receive(buckets, write, names_group)


def receive(
    buckets: Iterator[list[tuple[str, Tensor]]], use: Callable[[], None], group: dist.ProcessGroup | None = None
) -> None:
    """Let the receiver use the buckets of ``stream_hf_tensors`` while the other ranks send theirs. Collective.

    Args:
        buckets: of this rank.
        use: iterates over them; called on the receiver only.
        group: gloo group of all ranks, over which they agree on how it ended; None is the default group.

    Raises:
        DistillError: what ``use`` raised, as any OSError, on every rank alike, once all buckets are through.
    """
    failure: list[Exception | None] = [None]
    if dist.get_rank() == RECEIVER:
        try:
            use()
        except (DistillError, OSError) as error:
            failure[0] = error
    for _ in buckets:  # the other ranks' part; on the receiver what a failure left, so that nobody is left waiting
        pass
    dist.broadcast_object_list(failure, src=RECEIVER, group=group)
    if failure[0] is not None:
        raise failure[0]


@dataclass(frozen=True)
class _Entry:
    """One Megatron parameter of the whole model and the global ranks that hold its shards, in tp order."""

    rule: Rule
    shape: tuple[int, ...]  # of one shard
    dtype: torch.dtype
    owners: tuple[int, ...]

    @property
    def shard_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _unwrapped(model: nn.Module) -> Any:
    """The GPTModel inside Float16Module, DistributedDataParallel or FSDP wrappers, all of which call it ``module``."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _chunks(model: Model) -> list[Any]:
    return [_unwrapped(chunk) for chunk in ([model] if isinstance(model, nn.Module) else model)]


def _local_parameters(model: Model, config: HfConfig) -> Iterator[tuple[str, nn.Parameter, dist.ProcessGroup]]:
    """This rank's parameters: canonical global name, parameter, and the group that tensor parallelism splits it over."""
    for chunk in _chunks(model):
        groups = chunk.pg_collection
        is_moe = config.num_experts > 0
        first_expert = groups.ep.rank() * config.num_experts // groups.ep.size() if is_moe else 0
        layer_numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]  # Megatron counts from 1
        for name, param in chunk.named_parameters():
            yield (
                _global_name(name, layer_numbers, is_moe, first_expert),
                param,
                (groups.expt_tp if ".experts." in name else groups.tp),
            )


def _global_name(name: str, layer_numbers: Sequence[int], is_moe: bool, first_expert: int) -> str:
    """From a name on this rank, as the layer spec spells it, to the table's."""
    prefix, layers, rest = name.partition("decoder.layers.")
    if prefix or not layers:
        return name
    index, _, in_layer = rest.partition(".")
    in_layer = canonical_name(in_layer, is_moe=is_moe, first_expert=first_expert)
    return f"decoder.layers.{layer_numbers[int(index)]}.{in_layer}"


def _rule_of(name: str, rules: dict[str, Rule], config: HfConfig) -> Rule:
    if name not in rules:
        raise CheckpointError(
            f"{name}: the model has this parameter, the {config.model_type} table does not. It would be lost in a "
            "Hugging Face checkpoint. Build the model with build_gpt_model from the same config.json."
        )
    return rules[name]


def _gather_plan(
    model: Model, config: HfConfig, names_group: dist.ProcessGroup | None
) -> tuple[list[_Entry], dict[str, Tensor]]:
    """Who holds what, on every rank alike, in the table's order; and this rank's own shards by name.

    One object collective over the job: replica 0 of every shard names it, the other replicas are silent.
    """
    groups = _chunks(model)[0].pg_collection
    is_dense_owner, is_expert_owner = groups.dp_cp.rank() == 0, groups.expt_dp.rank() == 0
    local: dict[str, Tensor] = {}
    mine: list[tuple[str, tuple[int, ...], torch.dtype, int]] = []
    for name, param, tp_group in _local_parameters(model, config):
        if name == OUTPUT_LAYER and config.tie_word_embeddings:
            continue
        if is_expert_owner if ".experts." in name else is_dense_owner:
            local[name] = param.detach()
            mine.append((name, tuple(param.shape), param.dtype, tp_group.rank()))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=names_group)

    holders: dict[str, list[tuple[int, int, tuple[int, ...], torch.dtype]]] = {}
    for rank, named in enumerate(everyone):
        for name, shape, dtype, tp_rank in named:
            holders.setdefault(name, []).append((tp_rank, rank, shape, dtype))
    rules = {rule.megatron: rule for rule in tensor_rules(config)}
    for name in holders:
        _rule_of(name, rules, config)
    missing = sorted(rules.keys() - holders.keys())
    if missing:
        raise CheckpointError(
            f"{missing[0]} and {len(missing) - 1} more: no rank holds them. The model has fewer parameters than the "
            f"{config.model_type} config says. Build it with build_gpt_model from the same config.json."
        )
    return [_entry(rule, holders[rule.megatron]) for rule in rules.values()], local


def _entry(rule: Rule, holders: Iterable[tuple[int, int, tuple[int, ...], torch.dtype]]) -> _Entry:
    ordered = sorted(holders)
    if rule.tp_dim is None:
        ordered = ordered[:1]  # replicated over tp: the first copy stands for all
    _, _, shape, dtype = ordered[0]
    return _Entry(rule, shape, dtype, tuple(rank for _, rank, _, _ in ordered))


def _buckets(entries: Iterable[_Entry], bucket_bytes: int) -> Iterator[list[_Entry]]:
    """Consecutive entries whose whole tensors fit into ``bucket_bytes`` together."""
    bucket: list[_Entry] = []
    filled = 0
    for entry in entries:
        size = entry.shard_bytes * len(entry.owners)
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append(entry)
        filled += size
    if bucket:
        yield bucket


def _exchange(bucket: Sequence[_Entry], local: dict[str, Tensor], rank: int) -> dict[tuple[str, int], Tensor]:
    """Bring the bucket's shards to the receiver: one message from each other owner.

    Returns:
        (parameter name, owner) -> shard on the receiver; nothing elsewhere.
    """
    offsets: dict[tuple[str, int], int] = {}  # of a shard in its owner's message
    lengths: dict[int, int] = {}
    for entry in bucket:
        for owner in entry.owners:
            offsets[entry.rule.megatron, owner] = lengths.get(owner, 0)
            lengths[owner] = lengths.get(owner, 0) + -(-entry.shard_bytes // _ALIGNMENT) * _ALIGNMENT
    device = next(iter(local.values())).device if local else None
    if rank != RECEIVER:
        if rank in lengths:
            message = torch.empty(lengths[rank], dtype=torch.uint8, device=device)
            for entry in bucket:
                if rank in entry.owners:
                    offset = offsets[entry.rule.megatron, rank]
                    _shard_view(message, offset, entry).copy_(local[entry.rule.megatron])
            _wait([dist.P2POp(dist.isend, message, RECEIVER)])
        return {}
    messages = {
        owner: torch.empty(length, dtype=torch.uint8, device=device)
        for owner, length in lengths.items()
        if owner != RECEIVER
    }
    _wait([dist.P2POp(dist.irecv, message, owner) for owner, message in messages.items()])
    return {
        (entry.rule.megatron, owner): local[entry.rule.megatron]
        if owner == RECEIVER
        else _shard_view(messages[owner], offsets[entry.rule.megatron, owner], entry)
        for entry in bucket
        for owner in entry.owners
    }


def _shard_view(message: Tensor, offset: int, entry: _Entry) -> Tensor:
    return message[offset : offset + entry.shard_bytes].view(entry.dtype).view(entry.shape)


def _wait(operations: list[dist.P2POp]) -> None:
    """Run point-to-point transfers to their end. Batched: on NCCL they then share the group's one communicator."""
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
