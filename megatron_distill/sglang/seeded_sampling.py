"""SGLang's sampling hash without an accelerator, so that ``sampling_seed`` works on a CPU.

With ``--enable-deterministic-inference`` SGLang draws token ``v`` at position ``i`` by the Gumbel trick: it adds
``-log(-log(u))`` to the log-probability, where ``u`` is a 32-bit hash of (seed, i, v). Its hash is a Triton kernel on
GPUs and, on CPUs, an operator that only the AMX and ARM builds of its kernel library hold. ``murmur_hash32`` returns the
same bits from ordinary integer operations, so a seed names the same random numbers on a CPU and on a GPU: from a C++ kernel,
or in PyTorch where that cannot be built.

Source: MurmurHash3_x86_32 (A. Appleby, public domain) with seed 0 over the 16 bytes
``seed low | seed high | position | token id``, each little-endian.
"""

from __future__ import annotations

import torch

from megatron_distill.sglang import server_kernels

_LOW_32_BITS = 0xFFFFFFFF


def _rotate_left(word: torch.Tensor, num_bits: int) -> torch.Tensor:
    return ((word << num_bits) | (word >> (32 - num_bits))) & _LOW_32_BITS


def _absorb(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Mix one 4-byte block into the hash state (MurmurHash3's body)."""
    block = _rotate_left((block * 0xCC9E2D51) & _LOW_32_BITS, 15)
    block = (block * 0x1B873593) & _LOW_32_BITS
    return (_rotate_left(state ^ block, 13) * 5 + 0xE6546B64) & _LOW_32_BITS


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """Hash every (seed, position) pair with every token id. Drop-in for SGLang's function of this name.

    Args:
        seed: [N] int64 or uint64, one seed per sequence.
        positions: [N] integer, the position of the token to be drawn.
        col_indices: [V] integer, the token ids.

    Returns:
        [N, V] uint32.
    """
    seed_N = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.to(torch.int64)
    hashed = server_kernels.murmur_hash32 if server_kernels.are_built() else in_torch
    return hashed(seed_N, positions.to(torch.int64), col_indices.to(torch.int64))


def in_torch(seed_N: torch.Tensor, positions_N: torch.Tensor, columns_V: torch.Tensor) -> torch.Tensor:
    """The same from PyTorch's operators; all int64.

    Words are held in int64 and masked after each step: a product of two 32-bit words overflows int64, but two's
    complement keeps the low 32 bits, which are all that is read.
    """
    state_N = torch.zeros_like(seed_N)
    for block_N in (seed_N, seed_N >> 32, positions_N):
        state_N = _absorb(state_N, block_N & _LOW_32_BITS)
    hash_NV = _absorb(state_N[:, None], (columns_V & _LOW_32_BITS)[None, :])
    hash_NV ^= 16  # the number of bytes hashed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hash_NV ^= hash_NV >> shift
        hash_NV = (hash_NV * factor) & _LOW_32_BITS
    hash_NV ^= hash_NV >> 16
    return hash_NV.to(torch.uint32)
