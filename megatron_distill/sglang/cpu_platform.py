"""The platform object SGLang sees on a machine without an accelerator. See ``cpu_plugin`` for when it is chosen.

SGLang 0.5.23 asks its platform which kernels it may call. On a machine without an accelerator its own answer is a base
platform that reaches for CUDA or vLLM kernels (``RotaryEmbedding.__init__`` imports ``vllm._custom_ops``), and its official
CPU platform (``SGLANG_USE_CPU_ENGINE=1``) loads a kernel library that the published wheel does not hold. An *out-of-tree*
platform with the dispatch key ``native`` makes every fused operation take its plain PyTorch body instead: slower than a
kernel, exact, and the same on every CPU.

This module imports SGLang, so it is named by a string (``cpu_plugin.activate``) and imported by SGLang alone.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class PlainTorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU on which only PyTorch's own operators run: no Triton, no graphs, no compiled SGLang kernels."""

    _enum = PlatformEnum.OOT  # "out of tree": what makes SGLang skip its vLLM and CUDA fall-backs
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        """Scaled dot-product attention of PyTorch; the other back ends need a kernel library."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """Picks ``forward_native``, the plain PyTorch body, in every fused operation."""
        return "native"

    def empty_cache(self) -> None:
        """Nothing: there is none. (SGLang's CPU collects garbage here, over its whole heap, twice for each load of weights:
        0.3 s each time.)"""

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """Pinned memory speeds up copies to an accelerator; there is none."""
        return False
