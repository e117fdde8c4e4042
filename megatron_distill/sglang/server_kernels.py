"""What a CPU server computes for a whole batch at once, in C++: attention over SGLang's cache, and the hashes of its sampler.

SGLang's back end for plain PyTorch (``torch_native``, 0.5.23) walks a batch in Python, sequence by sequence, and copies each
one's keys and values on the way; the hash takes some forty passes over the vocabulary. For the quickstart's student, 64
responses of up to 160 tokens, a token took 9.6 ms of a server with these two, and takes 5 with the kernels (idle cores).

The hooks stand in for SGLang's two loops. What they do not know (encoders, cross-attention) goes the old way.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_distill import compiler
from megatron_distill.errors import BuildError
from megatron_distill.losses.cpu_kernels import HEADERS, TYPES

SOURCE = Path(__file__).with_suffix(".cpp")
_BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"


class _Heads(ctypes.Structure):
    """A tensor [rows, heads, width], as the C++ names it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("width", ctypes.c_int64),
    )


@cache
def library() -> ctypes.CDLL:
    """The kernels of this machine, built if they are not there yet.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    return compiler.library(SOURCE, HEADERS)


@cache
def are_built() -> bool:
    """Whether the kernels are there; False, said once, where they cannot be built."""
    try:
        library()
    except BuildError as error:
        logging.getLogger(__name__).warning("%s Until then a CPU server writes several times slower.", error)
        return False
    return True


def register() -> None:
    """Add the hooks to SGLang's registry, unless the kernels cannot be built here: then its own loops stay."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if not are_built():
        return
    HookRegistry.register(f"{_BACKEND}._run_sdpa_forward_decode", _attend, HookType.AROUND)
    HookRegistry.register(f"{_BACKEND}._run_sdpa_forward_extend", _attend, HookType.AROUND)


def attention(
    query_THD: Tensor,
    key_NKD: Tensor,
    value_NKE: Tensor,
    slots: Tensor,
    requests_B: Tensor,
    lengths_B: Tensor,
    new_tokens_B: Tensor,
    scale: float,
    window: int = -1,
    out_THE: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last tokens of some sequences over all of their own tokens in a cache.

    A row's result depends on its own sequence alone, to the bit. Heads of keys are shared by as many heads of queries each.

    Args:
        query_THD: [T, H, D] float32, bfloat16 or float16, sequence after sequence.
        key_NKD: [N, K, D] the cache's keys, of the same dtype.
        value_NKE: [N, K, E] its values.
        slots: [R, L] int32, row of the cache of each request's token at each position.
        requests_B: [B] row of ``slots`` of each sequence.
        lengths_B: [B] tokens of each sequence, new ones counted.
        new_tokens_B: [B] how many of them ask; T in all.
        scale: of the scores.
        window: how many tokens before itself a token sees; all if negative.
        out_THE: where to write; a new tensor by default.

    Returns:
        [T, H, E].
    """
    out = out_THE if out_THE is not None else query_THD.new_empty(*query_THD.shape[:2], value_NKE.shape[2])
    heads = [_heads(tensor) for tensor in (query_THD, key_NKD, value_NKE, out)]
    requests, lengths, new_tokens = (
        tensor.to(torch.int64).contiguous() for tensor in (requests_B, lengths_B, new_tokens_B)
    )
    compiler.call(
        library(),
        "attention",
        *heads,
        TYPES[query_THD.dtype],
        slots,
        slots.stride(0),
        requests,
        lengths,
        new_tokens,
        len(lengths),
        window,
        scale,
    )
    return out


def murmur_hash32(seed_N: Tensor, positions_N: Tensor, columns_V: Tensor) -> Tensor:
    """See ``seeded_sampling.murmur_hash32``; all int64."""
    out_NV = torch.empty(len(seed_N), len(columns_V), dtype=torch.uint32)
    rows = (seed_N.contiguous(), positions_N.contiguous(), columns_V.contiguous())
    compiler.call(library(), "murmur_hash32", *rows, *out_NV.shape, out_NV)
    return out_NV


def _heads(tensor: Tensor) -> _Heads:
    _, heads, width = tensor.shape
    assert tensor.stride(2) == 1 and (heads == 1 or tensor.stride(1) == width), f"strides = {tensor.stride()}"
    return _Heads(tensor.data_ptr(), tensor.stride(0), heads, width)


def _attend(
    original: Callable[..., Tensor],
    backend: object,
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    *lens: Tensor | None,
    **options: Any,
) -> Tensor:
    """Around both loops. ``lens`` are those of an encoder, if any, and in an extension before them those of cached prefixes and
    of what is new; a decoded token is the last of its sequence."""
    *extended, encoder_lens = lens
    arguments = (query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
    is_plain = options["causal"] if extended else not options["is_cross_attn"]
    if encoder_lens is not None or not is_plain or query.dtype != k_cache.dtype:
        return original(backend, *arguments, *lens, **options)
    _, new_tokens = extended or (None, torch.ones_like(seq_lens))
    scale, window = options["scaling"], options["sliding_window_size"]
    return attention(
        *(query, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, new_tokens),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window=-1 if window is None else window,
        out_THE=output,
    )
