"""Attention of a CPU server: equal to a dense one in float64, and each sequence's to the bit whatever is beside it."""

import itertools

import pytest
import torch
from torch import Tensor

from megatron_distill.sglang import server_kernels
from megatron_distill.sglang.server_kernels import attention

LENGTHS, REQUESTS = (17, 1, 150), (3, 1, 7)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def cache(heads: int, width: int, value_width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and the slots of eight requests, scattered as a used cache's are."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2000, heads, width, generator=generator).to(dtype)
    values = torch.randn(2000, heads, value_width, generator=generator).to(dtype)
    slots = torch.randperm(2000, generator=generator)[: 8 * 200].view(8, 200).int()
    return keys, values, slots


def dense(query: Tensor, keys: Tensor, values: Tensor, length: int, scale: float, window: int) -> Tensor:
    """One sequence, in float64: query [n, H, D], keys [length, K, D], values [length, K, E]."""
    shared = query.shape[1] // keys.shape[1]
    q, k, v = (tensor.double().movedim(0, 1) for tensor in (query, keys, values))
    scores = q @ k.repeat_interleave(shared, 0).transpose(1, 2) * scale
    asks = torch.arange(length - len(query), length)[:, None]
    seen = torch.arange(length)[None]
    hidden = (seen > asks) | ((window >= 0) & (seen < asks - window))
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(shared, 0)).movedim(0, 1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("heads", "kv_heads", "width", "value_width"), [(4, 2, 16, 16), (6, 2, 64, 64), (3, 1, 5, 7)])
@pytest.mark.parametrize("new", [(1, 1, 1), (17, 1, 33)], ids=["decode", "extend"])
@pytest.mark.parametrize("window", [-1, 7])
def test_equals_dense_attention(dtype, heads, kv_heads, width, value_width, new, window) -> None:
    """Shared heads, odd widths, a prefix in the cache or not, a window or not, queries that are a slice of something wider."""
    keys, values, slots = cache(kv_heads, width, value_width, dtype)
    query = torch.randn(sum(new), 2 * heads * width).to(dtype)[:, : heads * width].view(-1, heads, width)
    sequences = (torch.tensor(REQUESTS), torch.tensor(LENGTHS), torch.tensor(new))
    out = attention(query, keys, values, slots, *sequences, width**-0.5, window)
    starts = itertools.accumulate(new, initial=0)
    expected = [
        dense(query[start : start + count], keys[row], values[row], length, width**-0.5, window)
        for start, count, length, request in zip(starts, new, LENGTHS, REQUESTS, strict=False)
        for row in [slots[request, :length].long()]
    ]
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=TOLERANCE[dtype], rtol=0)


def test_a_sequence_alone_is_the_same_to_the_bit() -> None:
    """Alone or in a batch, whole or behind a cached prefix, by one thread or three."""
    keys, values, slots = cache(2, 16, 16, torch.float32)
    query = torch.randn(sum(LENGTHS), 4, 16)
    lengths, requests = torch.tensor(LENGTHS), torch.tensor(REQUESTS)
    before, wholes = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            wholes.append(attention(query, keys, values, slots, requests, lengths, lengths, 0.25))
    finally:
        torch.set_num_threads(before)
    last = attention(query[-1:], keys, values, slots, requests[-1:], lengths[-1:], torch.tensor([1]), 0.25)
    assert torch.equal(wholes[0], wholes[1])
    assert torch.equal(wholes[0][-1:], last)


def test_without_a_compiler_sglang_keeps_its_own(monkeypatch, tmp_path, caplog) -> None:
    """Said once, with what to install; a server then starts all the same."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for function in (server_kernels.library, server_kernels.are_built):
        function.cache_clear()
    try:
        assert not server_kernels.are_built()
        assert "Install g++" in caplog.text
    finally:
        for function in (server_kernels.library, server_kernels.are_built):
            function.cache_clear()
