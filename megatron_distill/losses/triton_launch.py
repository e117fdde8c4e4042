"""Launches the Triton kernels with the signatures of ``kernels``.

In: CUDA tensors, or CPU tensors in a process that started with TRITON_INTERPRET=1, where Triton's interpreter runs the same
source. Nothing here waits for the device, and nothing depends on data: the launches can be captured in a CUDA graph once
they have run (and been compiled) before.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_distill.errors import LossError
from megatron_distill.losses import triton_kernels
from megatron_distill.losses.kernels import Mixture, floats, readable
from megatron_distill.losses.triton_configs import config_for


def _on_device(tensor: Tensor) -> AbstractContextManager:
    """The tensor's device as the current one, which Triton launches on.

    Raises:
        LossError: a CPU tensor outside the interpreter.
    """
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if not triton.knobs.runtime.interpret:
        raise LossError(
            f"backend = 'triton': needs CUDA tensors, not {tensor.device.type}. Triton compiles for GPUs. Use backend=None, "
            "or set TRITON_INTERPRET=1 before Python starts to run its interpreter."
        )
    return nullcontext()


def _cut(kernel: Any, num_columns: int, device: torch.device) -> dict[str, int]:
    """BLOCK and warps for rows of this width, as keywords of a launch."""
    name: str = kernel.fn.__name__
    config = config_for(name, num_columns, device)
    return {"BLOCK": config.block, "num_warps": config.num_warps}


def _summarise(kernel: Any, width: int, z: Tensor, *arguments: Any, excludes: bool) -> Tensor:
    """One program a row; ``[T, width]``."""
    num_tokens, num_columns = z.shape
    out = z.new_empty(num_tokens, width, dtype=torch.float32)
    if num_tokens:
        with _on_device(z):
            kernel[(num_tokens,)](out, z, *arguments, EXCLUDES=excludes, **_cut(kernel, num_columns, z.device))
    return out


def _write(kernel: Any, out_TV: Tensor, *arguments: Any, strides: tuple[int, ...], scalars: tuple[float, ...]) -> None:
    """One program per row and block; through a buffer where the columns of ``out_TV`` do not lie side by side."""
    direct = readable(out_TV)
    num_tokens, num_columns = direct.shape
    block = _cut(kernel, num_columns, direct.device)
    if num_tokens:
        with _on_device(direct):
            grid = (num_tokens, triton.cdiv(num_columns, block["BLOCK"]))
            kernel[grid](direct, *arguments, direct.stride(0), *strides, num_columns, *scalars, **block)
    if direct is not out_TV:
        out_TV.copy_(direct)


def kl_statistics(z_TV: Tensor, t_TV: Tensor, excluded_V: Tensor | None, inverse_temperature: float) -> Tensor:
    """See ``kernels.kl_statistics``."""
    z, t = readable(z_TV), readable(t_TV)
    excluded = z if excluded_V is None else excluded_V.view(torch.uint8)
    arguments = (t, excluded, z.stride(0), t.stride(0), z.shape[1], inverse_temperature)
    return _summarise(triton_kernels.kl_statistics, 8, z, *arguments, excludes=excluded_V is not None)


def kl_gradient_(
    out_TV: Tensor,
    z_TV: Tensor,
    t_TV: Tensor,
    normalisers_T5: Tensor,
    weight_T: Tensor,
    upstream_T: Tensor,
    inverse_temperature: float,
) -> None:
    """See ``kernels.kl_gradient_``."""
    z, t = readable(z_TV), readable(t_TV)
    rows = (floats(normalisers_T5), floats(weight_T), floats(upstream_T))
    strides = (z.stride(0), t.stride(0))
    _write(triton_kernels.kl_gradient, out_TV, z, t, *rows, strides=strides, scalars=(inverse_temperature,))


def mixture_statistics(
    z_TV: Tensor,
    t_TV: Tensor,
    excluded_V: Tensor | None,
    normalisers_T5: Tensor,
    mixture: Mixture,
    inverse_temperature: float,
) -> Tensor:
    """See ``kernels.mixture_statistics``."""
    z, t = readable(z_TV), readable(t_TV)
    excluded = z if excluded_V is None else excluded_V.view(torch.uint8)
    tensors = (t, excluded, floats(normalisers_T5))
    arguments = (*tensors, z.stride(0), t.stride(0), z.shape[1], inverse_temperature, *map(float, mixture))
    return _summarise(triton_kernels.mixture_statistics, 2, z, *arguments, excludes=excluded_V is not None)


def mixture_gradient_(
    out_TV: Tensor,
    z_TV: Tensor,
    t_TV: Tensor,
    normalisers_T5: Tensor,
    mean_slope_T: Tensor,
    upstream_T: Tensor,
    mixture: Mixture,
    inverse_temperature: float,
) -> None:
    """See ``kernels.mixture_gradient_``."""
    z, t = readable(z_TV), readable(t_TV)
    rows = (floats(normalisers_T5), floats(mean_slope_T), floats(upstream_T))
    scalars = (inverse_temperature, *map(float, mixture))
    strides = (z.stride(0), t.stride(0))
    _write(triton_kernels.mixture_gradient, out_TV, z, t, *rows, strides=strides, scalars=scalars)


def softmax_statistics(z_TV: Tensor, inverse_temperature: float) -> Tensor:
    """See ``kernels.softmax_statistics``."""
    z = readable(z_TV)
    arguments = (z, z.stride(0), 0, z.shape[1], inverse_temperature)
    return _summarise(triton_kernels.softmax_statistics, 3, z, *arguments, excludes=False)


def softmax_gradient_(
    out_TV: Tensor,
    z_TV: Tensor,
    normalisers_T2: Tensor,
    upstream_T: Tensor,
    entropy_upstream_T: Tensor,
    entropy_T: Tensor,
    inverse_temperature: float,
) -> None:
    """See ``kernels.softmax_gradient_``."""
    z = readable(z_TV)
    rows = (floats(normalisers_T2), floats(upstream_T), floats(entropy_upstream_T), floats(entropy_T))
    scalars = (inverse_temperature,)
    _write(triton_kernels.softmax_gradient, out_TV, z, *rows, strides=(z.stride(0),), scalars=scalars)


def rest_statistics(z_TV: Tensor, columns_TN: Tensor, inverse_temperature: float) -> Tensor:
    """See ``kernels.rest_statistics``."""
    z = readable(z_TV)
    # Ascending, with an end mark: a row's blocks pass its chosen columns one after the other.
    ends = columns_TN.new_full((z.shape[0], 1), z.shape[1])
    chosen = torch.cat([columns_TN.sort(dim=1).values, ends], dim=1)
    arguments = (chosen, z.stride(0), chosen.stride(0), z.shape[1], inverse_temperature)
    return _summarise(triton_kernels.softmax_statistics, 3, z, *arguments, excludes=True)


def rest_gradient_(
    out_TV: Tensor,
    z_TV: Tensor,
    columns_TN: Tensor,
    chosen_grad_TN: Tensor,
    rest_T3: Tensor,
    upstream_T: Tensor,
    inverse_temperature: float,
) -> None:
    """See ``kernels.rest_gradient_``."""
    z, columns, upstream = readable(z_TV), columns_TN.contiguous(), floats(upstream_T)
    direct = readable(out_TV)
    scalars = (inverse_temperature,)
    _write(triton_kernels.rest_gradient, direct, z, floats(rest_T3), upstream, strides=(z.stride(0),), scalars=scalars)
    num_tokens, num_chosen = columns.shape
    if num_tokens and num_chosen:
        sizes = (direct.stride(0), z.shape[1], num_chosen, inverse_temperature)
        slots = triton.next_power_of_2(num_chosen)
        with _on_device(z):
            triton_kernels.chosen_gradient[(num_tokens,)](
                direct, columns, floats(chosen_grad_TN), upstream, *sizes, BLOCK=slots, num_warps=1
            )
    if direct is not out_TV:
        out_TV.copy_(direct)
