"""How the Triton kernels cut a row: columns of a block and warps that share it.

A small fixed set, all of it compiled ahead of time by a test for every supported GPU: 8 columns a thread, which is 16-byte
loads of bf16 wherever a row is so aligned, and no spilled register. Which of it a kernel runs with on a GPU is written down
in ``TUNED``, never measured during a run: the order of a statistic's sum depends on the block, so a choice by stopwatch
would let two runs, or two ranks, differ in the last bit. ``python -m megatron_distill.losses.triton_tune`` measures and
prints the entry for its GPU.
"""

from typing import NamedTuple

import torch
import triton


class Config(NamedTuple):
    """Columns of a block, and warps of the program that works on it."""

    block: int
    num_warps: int


CONFIGS = (Config(1024, 4), Config(2048, 8), Config(4096, 16))
DEFAULT = CONFIGS[1]

# Compute capability, such as 90 -> kernel -> its fastest. A GPU or kernel that is not here runs with DEFAULT.
TUNED: dict[int, dict[str, Config]] = {}


def capability_of(device: torch.device) -> int:
    """Of the device's GPU, such as 90; 0 for a CPU, where Triton's interpreter runs."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def config_for(kernel_name: str, num_columns: int, device: torch.device) -> Config:
    """What ``kernel_name`` runs with on rows of this width: a narrow row gets a block of its size."""
    block, num_warps = TUNED.get(capability_of(device), {}).get(kernel_name, DEFAULT)
    block = min(block, max(128, triton.next_power_of_2(num_columns)))
    return Config(block, max(1, min(num_warps, block // 256)))
