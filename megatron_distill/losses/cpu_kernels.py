"""The C++ kernels: built once per machine and processor, loaded through ctypes, called with the signatures of ``kernels``.

In: CPU tensors in bf16, fp16 or fp32. The first use compiles ``cpu_kernels.cpp`` with the system's C++ compiler (the one that
Inductor would need too; about a second) into the user's cache folder, under a name made of the source, the compiler and
the processor, so that machines which share a home never load each other's instructions. Rows are split over
``torch.get_num_threads()`` threads; a row is always one thread's, so results do not depend on their number.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_distill.errors import LossError
from megatron_distill.losses.kernels import Mixture

SOURCE = Path(__file__).with_suffix(".cpp")
HEADERS = (SOURCE.with_name("cpu_rows.h"), SOURCE.with_name("cpu_vectors.h"))
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Rows(ctypes.Structure):
    """A tensor's rows, as the C++ names them."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("type", ctypes.c_int32))


class _Mixture(ctypes.Structure):
    _fields_ = (("p_weight", ctypes.c_float), ("q_weight", ctypes.c_float), ("p_share", ctypes.c_float))


@cache
def library() -> ctypes.CDLL:
    """The kernels of this machine, built if they are not there yet.

    Raises:
        LossError: there is no compiler, or it failed.
    """
    return build("-march=native")


def build(target: str) -> ctypes.CDLL:
    """Compile for ``target`` (a compiler flag that names the processor) and load; from the cache where it is there.

    Raises:
        LossError: there is no compiler, or it failed.
    """
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise LossError(
            "C++ compiler = none found: the losses' CPU kernels are built at their first use. Install g++ "
            "(apt-get install g++), or set CXX to a compiler."
        )
    key = hashlib.sha256()
    for part in (
        *(file.read_text() for file in (SOURCE, *HEADERS)),
        *FLAGS,
        target,
        os.path.realpath(compiler),
        _processor(),
    ):
        key.update(part.encode())
    key.update(str(os.stat(compiler).st_mtime_ns).encode())
    for folder in _cache_folders():
        built = folder / f"cpu_kernels_{key.hexdigest()[:16]}.so"
        if built.exists() or _compile(compiler, target, built):
            return ctypes.CDLL(str(built))
    raise LossError(
        f"cache folder = {', '.join(map(str, _cache_folders()))}: none can be written to. The losses' CPU kernels are built "
        "there. Set XDG_CACHE_HOME to a folder that can."
    )


def _cache_folders() -> tuple[Path, Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "megatron_distill", Path(tempfile.gettempdir()) / f"megatron_distill_{os.getuid()}"


def _compile(compiler: str, target: str, built: Path) -> bool:
    """Write the library, whole or not at all: several ranks may build at once. False if the folder cannot be written to.

    Raises:
        LossError: the compiler failed.
    """
    try:
        built.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(suffix=".so", dir=built.parent)
    except OSError:
        return False
    os.close(handle)
    command = [compiler, *FLAGS, target, str(SOURCE), "-o", name]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        os.unlink(name)
        raise LossError(
            f"C++ compiler = {compiler}: could not build the losses' CPU kernels. {result.stderr.strip()[-800:]} Set CXX to "
            "GCC 9 or Clang 12, or newer."
        )
    os.replace(name, built)
    return True


def _processor() -> str:
    """What tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return "".join(line for line in dict.fromkeys(lines) if line.startswith(("flags", "Features", "model name")))


def _rows(tensor: Tensor) -> _Rows:
    return _Rows(tensor.data_ptr(), tensor.stride(0), _TYPES[tensor.dtype])


def _readable(tensor: Tensor) -> Tensor:
    """With columns side by side, as the kernels walk them."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _floats(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _call(name: str, *arguments: Any, target: ctypes.CDLL | None = None) -> None:
    """Call a kernel. Tensors go as pointers, whole numbers as int64, floats as float; the number of threads comes last."""
    converted: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, int):
            converted.append(ctypes.c_int64(argument))
        elif isinstance(argument, float):
            converted.append(ctypes.c_float(argument))
        elif isinstance(argument, ctypes.Structure):
            converted.append(ctypes.byref(argument))
        else:
            converted.append(argument)
    getattr(target or library(), name)(*converted, ctypes.c_int32(torch.get_num_threads()))


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
    z, t = _readable(z_TV), _readable(t_TV)
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
    z, t = _readable(z_TV), _readable(t_TV)
    rows = (_floats(normalisers_T5), _floats(weight_T), _floats(upstream_T))
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
    z, t, normalisers = _readable(z_TV), _readable(t_TV), _floats(normalisers_T5)
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
    z, t = _readable(z_TV), _readable(t_TV)
    rows = (_floats(normalisers_T5), _floats(mean_slope_T), _floats(upstream_T), _Mixture(*mixture))
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
    z = _readable(z_TV)
    rows = (_floats(normalisers_T2), _floats(upstream_T), _floats(entropy_upstream_T), _floats(entropy_T))
    _write("softmax_gradient", out_TV, _rows(z), *z.shape, *rows, inverse_temperature)


def rest_statistics(z_TV: Tensor, columns_TN: Tensor, inverse_temperature: float) -> Tensor:
    """See ``kernels.rest_statistics``."""
    z, columns = _readable(z_TV), columns_TN.contiguous()
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
    z, columns = _readable(z_TV), columns_TN.contiguous()
    chosen = (columns, _floats(chosen_grad_TN), columns.shape[1])
    rows = (*z.shape, *chosen, _floats(rest_T3), _floats(upstream_T), inverse_temperature)
    _write("rest_gradient", out_TV, _rows(z), *rows)
