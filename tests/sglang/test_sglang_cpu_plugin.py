"""The CPU plugin: right where it acts, absent where it must be, and still needed."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch

from megatron_distill.sglang import cpu_plugin, server_kernels
from megatron_distill.sglang.seeded_sampling import murmur_hash32


def murmur3_x86_32(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, of a whole number of 4-byte blocks."""
    mask, h = 0xFFFFFFFF, 0
    for (block,) in struct.iter_unpack("<I", data):
        k = block * 0xCC9E2D51 & mask
        h ^= ((k << 15) | (k >> 17)) * 0x1B873593 & mask
        h = ((h << 13) | (h >> 19)) & mask
        h = (h * 5 + 0xE6546B64) & mask
    h ^= len(data)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & mask
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & mask
    return h ^ (h >> 16)


def test_reference_hash_is_murmur3() -> None:
    """The reference below is the published function: its known value for the bytes of "test"."""
    assert murmur3_x86_32(b"test") == 0xBA6BD213


@pytest.mark.parametrize("are_built", [True, False], ids=["kernel", "torch"])
def test_hash_is_murmur3_of_seed_position_and_token(are_built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensor hash equals MurmurHash3 of the sixteen bytes (seed, position, token), for large seeds and ids too."""
    monkeypatch.setattr(server_kernels, "are_built", lambda: are_built)
    seeds, positions, tokens = [0, 1, 2**31, 2**62 + 12345], [0, 7, 2**20, 2**31 - 1], [0, 1, 319, 151935]
    hash_NV = murmur_hash32(torch.tensor(seeds), torch.tensor(positions), torch.tensor(tokens))
    assert hash_NV.dtype == torch.uint32
    expected = [
        [murmur3_x86_32(struct.pack("<QII", seed, position, token)) for token in tokens]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert hash_NV.tolist() == expected
    unsigned = murmur_hash32(torch.tensor(seeds, dtype=torch.uint64), torch.tensor(positions), torch.tensor(tokens))
    assert unsigned.tolist() == expected


@pytest.mark.parametrize("reason", ["accelerator", "official CPU engine"])
def test_plugin_stays_out_of_the_way(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an accelerator, or with SGLang's official CPU engine, no platform and no hook is offered."""
    if reason == "accelerator":
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    else:
        monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", None)  # importing it would fail
    assert cpu_plugin.activate() is None
    cpu_plugin.register()


def test_plugin_imports_nothing_heavy() -> None:
    """SGLang loads the plugin in each of its processes; loading it brings neither torch nor SGLang."""
    code = "import sys, megatron_distill.sglang.cpu_plugin; print(*{'torch', 'sglang', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


FACTS = """
import inspect, json, torch

def error_of(act):
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def rotary():
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    RotaryEmbedding(16, 16, 64, 10000, True, torch.float32)

def seeded_hash():
    from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32
    murmur_hash32(torch.tensor([1]), torch.tensor([2]), torch.arange(4))

def batch_invariant():
    from sglang.srt.batch_invariant_ops import enable_batch_invariant_mode
    enable_batch_invariant_mode()

from sglang.srt.arg_groups.choices import DETERMINISTIC_ATTENTION_BACKEND_CHOICES as backends
import sglang.srt.entrypoints.engine as engine
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.platforms.cpu import CpuDeviceMixin
print(json.dumps({
    "rotary": error_of(rotary),
    "seeded_hash": error_of(seeded_hash),
    "batch_invariant": error_of(batch_invariant),
    "torch_native_is_deterministic": "torch_native" in backends,
    "walks_sequences": "for seq_idx in range" in inspect.getsource(TorchNativeAttnBackend._run_sdpa_forward_decode),
    "collects_garbage": "gc.collect" in inspect.getsource(CpuDeviceMixin.empty_cache),
    "spawns": 'set_start_method("spawn"' in inspect.getsource(engine._set_envs_and_config),
}))
"""


@pytest.mark.heavy
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the patches act only without an accelerator")
def test_each_patch_is_still_needed() -> None:
    """Plain SGLang, without our plugin, still fails at each point we patch. Where this fails, delete that patch.

    Heavy: importing SGLang takes about 20 s of a core.
    """
    environment = os.environ | {"SGLANG_PLUGINS": "none"}
    out = subprocess.run(
        [sys.executable, "-c", FACTS], env=environment, capture_output=True, text=True, check=True
    ).stdout
    facts = json.loads(out.splitlines()[-1])
    assert "vllm" in (facts["rotary"] or ""), "rotary embeddings run on a CPU: drop the platform"
    assert facts["seeded_hash"], "SGLang hashes seeds on this CPU: drop seeded_sampling.py"
    assert "accelerator" in (facts["batch_invariant"] or ""), "batch-invariant mode runs on a CPU: drop its hook"
    assert not facts["torch_native_is_deterministic"], "torch_native is accepted: drop its registration"
    assert facts["walks_sequences"], (
        "torch_native takes a batch at once: compare it with server_kernels, and drop the slower"
    )
    assert facts["collects_garbage"], "emptying a CPU's cache costs nothing: drop PlainTorchCpuPlatform.empty_cache"
    assert facts["spawns"], "SGLang no longer insists on spawn: look at _fork_workers again"
