"""C++ kernels for the CPU: built once per machine and processor with the system's compiler, loaded through ctypes.

The compiler is the one that Inductor would need too, and takes a second or two. What it makes stays in the user's cache
folder, under a name made of the source, the compiler and the processor, so that machines which share a home never load each
other's instructions.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_distill.errors import BuildError

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


def library(source: Path, headers: Sequence[Path], target: str = "-march=native") -> ctypes.CDLL:
    """Compile and load; from the cache where it is there.

    Args:
        source: the C++ file.
        headers: what it includes of ours.
        target: compiler flag that names the processor.

    Raises:
        BuildError: there is no compiler, it failed, or there is no folder to build in.
    """
    cxx = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if cxx is None:
        raise BuildError(
            "C++ compiler = none found: CPU kernels are built at their first use. Install g++ (apt-get install g++), or set "
            "CXX to a compiler."
        )
    key = hashlib.sha256()
    for part in (
        *(file.read_text() for file in (source, *headers)),
        *FLAGS,
        target,
        os.path.realpath(cxx),
        _processor(),
    ):
        key.update(part.encode())
    key.update(str(os.stat(cxx).st_mtime_ns).encode())
    for folder in _cache_folders():
        built = folder / f"{source.stem}_{key.hexdigest()[:16]}.so"
        if built.exists() or _compile([cxx, *FLAGS, target, str(source)], built):
            with contextlib.suppress(OSError):  # of a folder from which nothing may be executed
                return ctypes.CDLL(str(built))
    raise BuildError(
        f"cache folder = {', '.join(map(str, _cache_folders()))}: none can be written to, and executed from. CPU kernels are "
        "built there. Set XDG_CACHE_HOME to a folder that can."
    )


def call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    """Call a kernel. Tensors and None go as pointers, whole numbers as int64, floats as float, structures by reference; the
    number of threads comes last."""
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
        elif argument is None:
            converted.append(None)
        else:
            raise TypeError(f"{name}: no kernel takes a {type(argument).__name__}")
    getattr(library, name)(*converted, ctypes.c_int32(torch.get_num_threads()))


def _cache_folders() -> tuple[Path, Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "megatron_distill", Path(tempfile.gettempdir()) / f"megatron_distill_{os.getuid()}"


def _compile(command: list[str], built: Path) -> bool:
    """Write the library, whole or not at all: several processes may build at once. False if its folder cannot be written to.

    Raises:
        BuildError: the compiler failed.
    """
    try:
        built.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(suffix=".so", dir=built.parent)
    except OSError:
        return False
    os.close(handle)
    result = subprocess.run([*command, "-o", name], check=False, capture_output=True, text=True)
    if result.returncode:
        os.unlink(name)
        raise BuildError(
            f"C++ compiler = {command[0]}: could not build {command[-1]}. {result.stderr.strip()[-800:]} Set CXX to GCC 9 or "
            "Clang 12, or newer."
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
