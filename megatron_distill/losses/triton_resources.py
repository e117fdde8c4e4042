"""What the GPU kernels need of each GPU: compiles them ahead of time, which takes no GPU, and reads the cubins.

    python -m megatron_distill.losses.triton_resources            # sm_80, sm_90, sm_100; bf16 and fp32

Registers decide how many programs share a multiprocessor; stack or local memory means that registers were spilled.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_distill.errors import LossError
from megatron_distill.losses import triton_kernels as kernels
from megatron_distill.losses.triton_configs import CONFIGS, Config

ARCHITECTURES = (80, 90, 100)
DTYPES = ("bf16", "fp32")
KERNELS = (
    kernels.kl_statistics,
    kernels.kl_gradient,
    kernels.mixture_statistics,
    kernels.mixture_gradient,
    kernels.softmax_statistics,
    kernels.softmax_gradient,
    kernels.rest_gradient,
    kernels.chosen_gradient,
)
CHOSEN = Config(64, 1)  # the only config of `chosen_gradient`, for 64 chosen columns
_TYPES = {"excluded": "*u8", "chosen": "*i64"}
_SCALARS = ("scale", "p_weight", "q_weight", "p_share")


class Resources(NamedTuple):
    """Of one compiled kernel: registers per thread, spilled bytes per thread, and its 16-byte loads."""

    registers: int
    spilled_bytes: int
    wide_loads: int


def _type(kernel: Any, name: str, dtype: str) -> str:
    """Triton's name for the type of an argument."""
    if name.isupper():
        return "constexpr"
    if name in ("z", "t") or (name == "out" and "gradient" in kernel.__name__):
        return f"*{dtype}"
    if name.endswith("stride") or name.startswith("num_"):
        return "i32"
    return "fp32" if name in _SCALARS else _TYPES.get(name, "*fp32")


def configs_of(kernel: Any) -> tuple[Config, ...]:
    """All configs that ``triton_launch`` may run the kernel with on a wide vocabulary."""
    return (CHOSEN,) if kernel is kernels.chosen_gradient else CONFIGS


def compiled_resources(kernel: Any, architecture: int, dtype: str, config: Config) -> Resources:
    """Compile one kernel for rows of any width that begin 16 columns or a multiple of it apart, and read what it needs.

    Args:
        kernel: one of ``KERNELS``.
        architecture: compute capability, such as 90.
        dtype: of the logits, Triton's name.
        config: one of ``configs_of(kernel)``.

    Raises:
        LossError: the cubin could not be read.
    """
    types = {name: _type(kernel, name, dtype) for name in kernel.arg_names}
    constants = {name: config.block if name == "BLOCK" else True for name, kind in types.items() if kind == "constexpr"}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name.endswith("stride")
    }
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": config.num_warps},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        listed = subprocess.run([tool, "-res-usage", cubin.name], check=False, capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listed.stdout + listed.stderr)
    if found is None:
        raise LossError(
            f"cuobjdump = {tool}: reported no registers for {kernel.__name__}. {listed.stderr.strip()} Use the Triton that "
            "came with this torch."
        )
    registers, stack, local = map(int, found.groups())
    return Resources(registers, stack + local, compiled.asm["ptx"].count("ld.global.v4"))


def main() -> None:
    """Print a row per kernel."""
    print(f"{'registers (spilled bytes)':<22}" + "".join(f"{f'sm_{a} {d}':>16}" for a in ARCHITECTURES for d in DTYPES))
    for kernel in KERNELS:
        for config in configs_of(kernel):
            cells = [compiled_resources(kernel, a, d, config) for a in ARCHITECTURES for d in DTYPES]
            label = f"{kernel.__name__} {config.block}"
            print(
                f"{label:<25}" + "".join(f"{f'{cell.registers} ({cell.spilled_bytes})':>16}" for cell in cells),
                flush=True,
            )


if __name__ == "__main__":
    main()
