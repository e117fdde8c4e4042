"""Who does the arithmetic over the vocabulary: one set of kernels, four ways to run it, chosen by where the logits are.

| backend | what runs | chosen for |
|---|---|---|
| ``triton`` | ``triton_kernels``, one read of the logits per pass | CUDA tensors in bf16, fp16 or fp32 |
| ``cpp`` | ``cpu_kernels.cpp``, built at its first use with the system's C++ compiler | CPU tensors in bf16, fp16 or fp32 |
| ``inductor`` | the source of ``kernels``, compiled by Inductor | when asked for by name |
| ``eager`` | the source of ``kernels``, operation by operation | float64, and wherever the others cannot run |

All four are equal to rounding and each is deterministic. Callers do not choose: ``kernels_for`` does. A loss's ``backend``
argument names one anyway, to compare them.
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from megatron_distill.errors import BuildError, LossError
from megatron_distill.losses import kernels

Backend = Literal["triton", "cpp", "inductor", "eager"]

NATIVE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Kernels(NamedTuple):
    """One implementation of the arithmetic; the functions of ``kernels`` say what each must compute.

    Args:
        backend: its name.
        whole_batch: True if intermediates stay in registers or a cache, so that all tokens are one chunk.
    """

    backend: Backend
    whole_batch: bool
    kl_statistics: Callable[..., Tensor]
    kl_gradient_: Callable[..., None]
    mixture_statistics: Callable[..., Tensor]
    mixture_gradient_: Callable[..., None]
    softmax_statistics: Callable[..., Tensor]
    softmax_gradient_: Callable[..., None]
    rest_statistics: Callable[..., Tensor]
    rest_gradient_: Callable[..., None]

    def chunks(self, logits_TV: Tensor, chunk_tokens: int | None) -> list[slice]:
        """Slices that cover the tokens, at least one: ``chunk_tokens`` each, or else as these kernels like it."""
        num_tokens, num_columns = logits_TV.shape
        fitting = num_tokens if self.whole_batch else kernels.default_chunk_tokens(num_columns, logits_TV.device)
        chunk = max(1, chunk_tokens or fitting)
        return [slice(start, min(start + chunk, num_tokens)) for start in range(0, max(1, num_tokens), chunk)]


def kernels_for(logits: Tensor, backend: Backend | None) -> Kernels:
    """The kernels to run on ``logits``: those of ``backend``, or the fastest that this device and dtype have.

    Raises:
        LossError: ``backend`` is unknown, or cannot run on these logits here.
    """
    name = backend or _fastest(logits)
    if name not in get_args(Backend):
        raise LossError(
            f"backend = {name!r}: must be one of {', '.join(map(repr, get_args(Backend)))}, or None. It names who does the "
            "arithmetic. Use None: it picks by device."
        )
    if name in ("triton", "cpp") and logits.dtype not in NATIVE_DTYPES:
        raise LossError(
            f"backend = {name!r}: needs bf16, fp16 or fp32 logits, not {logits.dtype}. Its arithmetic is fp32. Use "
            "backend='eager' for float64."
        )
    if name == "cpp" and logits.device.type != "cpu":
        raise LossError(
            f"backend = 'cpp': needs CPU tensors, not {logits.device.type}. It reads memory itself. Use backend=None: it picks "
            "by device."
        )
    try:
        return _load(name)
    except (BuildError, ImportError) as error:
        raise LossError(f"backend = {name!r}: cannot run here: {error} Use backend=None: it picks what can.") from error


def _fastest(logits: Tensor) -> Backend:
    if logits.dtype in NATIVE_DTYPES:
        if logits.device.type == "cuda" and _has_triton():
            return "triton"
        if logits.device.type == "cpu" and _has_compiler():
            return "cpp"
    return "eager"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _has_compiler() -> bool:
    """True if the C++ kernels are there; False, said once, where they cannot be built."""
    from megatron_distill.losses import cpu_kernels

    try:
        cpu_kernels.library()
    except BuildError as error:
        warnings.warn(
            f"{error} Until then the losses run eagerly: the same results, several times slower.", stacklevel=2
        )
        return False
    return True


@cache
def _load(name: Backend) -> Kernels:
    functions: Any
    if name == "triton":
        from megatron_distill.losses import triton_launch as functions
    elif name == "cpp":
        from megatron_distill.losses import cpu_kernels as functions

        functions.library()
    else:
        functions = kernels
    names = Kernels._fields[2:]
    found = {field: getattr(functions, field) for field in names}
    if name == "inductor":
        found |= {field: kernels.compiled_kernel(found[field]) for field in names if not field.startswith("rest_")}
        found["rest_statistics"] = kernels.compiled_rest_statistics
    return Kernels(name, name != "eager", **found)
