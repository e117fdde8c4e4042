"""A GPU that is not there: Triton's own launch of a kernel on tensors, compiled for an H100, noted, and not run.

What only a launch decides is decided here as on a card: the types and alignments that a kernel is compiled for, which
arguments become constants, the grid, the shared memory it may take.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from megatron_distill.losses import triton_launch
from megatron_distill.losses.triton_resources import KERNELS

MAX_GRID = (2**31 - 1, 65_535, 65_535)  # of CUDA
SHARED_BYTES = 227 << 10  # that a program may take on an H100


class Launch(NamedTuple):
    """One launch of a kernel: its name, its grid, the types that it was compiled for, the warps of a program."""

    name: str
    grid: tuple[int, int, int]
    types: dict[str, str]
    num_warps: int


class PretendedGpu:
    """What Triton asks of a driver."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES}

    def load_binary(self, *_: Any) -> tuple[None, int, int, int, int]:
        return None, 0, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, *_: Any) -> None:
            self.launches.append(Launch(metadata.name, (x, y, z), dict(source.signature), metadata.num_warps))

        return launch


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Kernels are launched on it, with tensors of the CPU; what they would have written stays as it was."""
    gpu = PretendedGpu()
    on_device = patch.object(triton_launch, "_on_device", lambda tensor: nullcontext())
    try:
        with patch.object(driver, "_active", gpu), on_device:
            yield gpu
    finally:
        for kernel in KERNELS:
            kernel.device_caches.clear()
