"""The C++ kernels: built once per machine and processor, called with the signatures of ``kernels``.

In: CPU tensors in bf16, fp16 or fp32. The first use compiles ``cpu_kernels.cpp`` (see ``compiler``). Rows are split over
``torch.get_num_threads()`` threads; a row is always one thread's, so results do not depend on their number.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_distill import compiler
from megatron_distill.losses.kernels import Mixture, floats, readable

SOURCE = Path(__file__).with_suffix(".cpp")
HEADERS = (SOURCE.with_name("cpu_rows.h"), SOURCE.with_name("cpu_vectors.h"))
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of elements, as the C++ numbers them."""


class _Rows(ctypes.Structure):
    """A tensor's rows, as the C++ names them."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("type", ctypes.c_int32))


class _Mixture(ctypes.Structure):
    _fields_ = (("p_weight", ctypes.c_float), ("q_weight", ctypes.c_float), ("p_share", ctypes.c_float))


@cache
def library() -> ctypes.CDLL:
    """The kernels of this machine, built if they are not there yet.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    return build("-march=native")


def build(target: str) -> ctypes.CDLL:
    """The kernels for ``target``, a compiler flag that names the processor.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    return compiler.library(SOURCE, HEADERS, target)


def _rows(tensor: Tensor) -> _Rows:
    return _Rows(tensor.data_ptr(), tensor.stride(0), TYPES[tensor.dtype])


def _call(name: str, *arguments: Any) -> None:
    compiler.call(library(), name, *arguments)


def _write(name: str, out_TV: Tensor, *arguments: Any) -> None:
    """Call a kernel that writes ``out_TV``, through a buffer where its columns do not lie side by side."""
    direct = (
        out_TV
        if out_TV.stride(1) == 1 or out_TV.shape[1] == 1
        else torch.empty_like(out_TV, memory_format=torch.contiguous_format)
    )
    _call(name, _rows(direct), *arguments)
    if direct is not out_TV:
        out_TV.copy_(direct)


def kl_statistics(z_TV: Tensor, t_TV: Tensor, excluded_V: Tensor | None, inverse_temperature: float) -> Tensor:
    """See ``kernels.kl_statistics``."""
    z, t = readable(z_TV), readable(t_TV)
    out_T8 = z.new_empty(z.shape[0], 8, dtype=torch.float32)
    _call("kl_statistics", _rows(z), _rows(t), excluded_V, *z.shape, inverse_temperature, out_T8)
    return out_T8


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
    _write("kl_gradient", out_TV, _rows(z), _rows(t), *z.shape, *rows, inverse_temperature)


def mixture_statistics(
    z_TV: Tensor,
    t_TV: Tensor,
    excluded_V: Tensor | None,
    normalisers_T5: Tensor,
    mixture: Mixture,
    inverse_temperature: float,
) -> Tensor:
    """See ``kernels.mixture_statistics``."""
    z, t, normalisers = readable(z_TV), readable(t_TV), floats(normalisers_T5)
    out_T2 = z.new_empty(z.shape[0], 2, dtype=torch.float32)
    rows = (excluded_V, *z.shape, normalisers, _Mixture(*mixture), inverse_temperature, out_T2)
    _call("mixture_statistics", _rows(z), _rows(t), *rows)
    return out_T2


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
    rows = (floats(normalisers_T5), floats(mean_slope_T), floats(upstream_T), _Mixture(*mixture))
    _write("mixture_gradient", out_TV, _rows(z), _rows(t), *z.shape, *rows, inverse_temperature)


def softmax_statistics(z_TV: Tensor, inverse_temperature: float) -> Tensor:
    """See ``kernels.softmax_statistics``."""
    return rest_statistics(z_TV, torch.empty(z_TV.shape[0], 0, dtype=torch.int64), inverse_temperature)


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
    _write("softmax_gradient", out_TV, _rows(z), *z.shape, *rows, inverse_temperature)


def rest_statistics(z_TV: Tensor, columns_TN: Tensor, inverse_temperature: float) -> Tensor:
    """See ``kernels.rest_statistics``."""
    z, columns = readable(z_TV), columns_TN.contiguous()
    out_T3 = z.new_empty(z.shape[0], 3, dtype=torch.float32)
    _call("softmax_statistics", _rows(z), *z.shape, columns, columns.shape[1], inverse_temperature, out_T3)
    return out_T3


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
    z, columns = readable(z_TV), columns_TN.contiguous()
    chosen = (columns, floats(chosen_grad_TN), columns.shape[1])
    rows = (*z.shape, *chosen, floats(rest_T3), floats(upstream_T), inverse_temperature)
    _write("rest_gradient", out_TV, _rows(z), *rows)
