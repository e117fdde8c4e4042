"""What is installed, what this machine has, and which parts of a run work here.

Out: ``env.json`` of a run (``environment``), and the table of ``megatron-distill doctor`` (``diagnose``), whose imports are
real: each package is imported in a process of its own, since a broken one may end its process. ``deep_doctor`` goes on from
there.
"""

import ctypes.util
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_distill.config import RolloutConfig, RunConfig
from megatron_distill.errors import DistillError
from megatron_distill.launch.threads import num_cores, threads_of
from megatron_distill.megatron import cpu_backend
from megatron_distill.sglang import hidden_states

PACKAGES = {
    "torch": "torch",
    "megatron-core": "megatron.training",
    "sglang": "sglang.srt.server_args",
    "sglang-kernel": "sgl_kernel",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "math-verify": "math_verify",
    "nemo-run": "nemo_run",
    "transformer-engine": "transformer_engine.pytorch",
    "apex": "apex",
}
"""Every package of the design, and the module whose import shows that it works."""

OPTIONAL = {"nemo-run", "transformer-engine", "apex"}
_NEEDS_DRIVER = "libcuda.so.1"
"""What an import names where no driver is installed, as on the machine that builds an image."""


@dataclass(frozen=True)
class Package:
    """One package here.

    Attributes:
        name: as pip knows it.
        version: None if it is not installed.
        problem: why it cannot be imported; empty if it can.
    """

    name: str
    version: str | None
    problem: str = ""

    @property
    def fails(self) -> bool:
        """Whether the import failed of something else than a driver that is not there."""
        return bool(self.problem) and _NEEDS_DRIVER not in self.problem

    def line(self) -> str:
        """For the table."""
        state = self.version or "not installed"
        if self.problem:
            state += f"  FAILED: {self.problem}" if self.fails else "  needs a GPU's driver: not imported here"
        return f"  {self.name:<20} {state}"


def environment() -> dict[str, Any]:
    """Code, versions and hardware, for a run's ``env.json``."""
    import torch

    from megatron_distill import __version__

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "megatron_distill": __version__,
        "commit": commit_of(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "packages": {name: version(name) for name in PACKAGES},
    }


def commit_of(root: Path) -> str:
    """The commit of a git checkout, with ``-dirty`` behind it where a tracked file was changed.

    Args:
        root: of the checkout.

    Returns:
        40 hex digits and the mark; empty where there is no checkout, as in an installed copy, or no git to ask.
    """
    if not ((root / ".git").exists() and shutil.which("git")):
        return ""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()


def packages() -> list[Package]:
    """Every package of the design, imported."""
    installed = {name: version(name) for name in PACKAGES}
    problems = import_problems({name: PACKAGES[name] for name, found in installed.items() if found})
    return [Package(name, found, problems.get(name, "")) for name, found in installed.items()]


def import_problems(modules: dict[str, str]) -> dict[str, str]:
    """Import modules one after the other in a new interpreter.

    Args:
        modules: by the name of their package.

    Returns:
        The last line of the error of each that failed, or the one that names a missing driver. One that ends the
        interpreter is blamed for it, and the others are tried again without it.
    """
    code = f"""
import importlib, json
from megatron_distill.megatron import cpu_backend
cpu_backend.install()
for name, module in {modules!r}.items():
    print(json.dumps(["begins", name, ""]), flush=True)
    try:
        importlib.import_module(module)
        print(json.dumps(["ends", name, ""]), flush=True)
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        text = next((line for line in lines if {_NEEDS_DRIVER!r} in line), lines[-1])
        print(json.dumps(["ends", name, f"{{type(error).__name__}}: {{text}}"]), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('["begins"', '["ends"'))]
    ends = {name: problem for kind, name, problem in records if kind == "ends"}
    problems = {name: problem for name, problem in ends.items() if problem}
    fatal = [name for kind, name, _ in records if kind == "begins" and name not in ends]
    if not records:
        last = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        return dict.fromkeys(modules, last)
    for name in fatal:
        problems[name] = f"ended the interpreter with code {done.returncode}"
        problems |= import_problems({other: m for other, m in modules.items() if other not in ends and other != name})
    return problems


def diagnose() -> str:
    """A table for people: packages, devices, and what follows from them.

    Raises:
        DistillError: there should be a GPU, and torch finds none; or a package that is installed, or must be, cannot be
            imported, and the table is in the message.
    """
    cpu_backend.require_promised_gpu()  # nothing else matters without it, and every import would say so
    facts, found = environment(), packages()
    by_name = {one.name: one for one in found}
    has_gpu = bool(facts["gpus"])
    engine = by_name["transformer-engine"]
    engine_works = bool(engine.version) and not engine.problem
    devices = ", ".join(facts["gpus"]) if has_gpu else f"none; {facts['cpus']} CPU cores"
    lines = [f"megatron_distill {facts['megatron_distill']}, Python {facts['python']}, {facts['platform']}"]
    lines += [one.line() for one in found]
    lines += [
        f"  {'GPUs':<20} {devices}",
        "",
        f"  training             {'NCCL' if has_gpu else 'gloo on CPU, fp32, tp x pp x dp'}",
        f"  layers               {'Transformer Engine in bf16' if has_gpu and engine_works else 'Megatron local'}",
        f"  threads              {_threads()}",
        f"  servers              SGLang on {'GPU' if has_gpu else 'CPU (own platform plugin), float32'}",
        f"  launch               {'NeMo-Run local' if by_name['nemo-run'].version else 'pip install .[launch]'}"
        + (", Slurm" if shutil.which("sbatch") else "; no sbatch on the path"),
    ]
    if not hidden_states.is_installed():
        lines.append("  hidden states        SGLang does not find their hook: install this package again (make setup)")
    if has_gpu and not ctypes.util.find_library("ibverbs"):
        lines.append(
            "  between nodes        NCCL finds no libibverbs and will use TCP: install libibverbs1, ibverbs-providers"
        )
    if has_gpu and (missing := missing_compilers()):
        lines.append(
            f"  compilers            no {' and no '.join(missing)}: SGLang and Triton compile kernels as they run. Install a "
            "C++ compiler and CUDA 13.0's toolkit (CUDA_HOME names it), or use the image in docker/"
        )
    if has_gpu and not engine.version:
        lines.append(
            "  remedy: make setup-gpu, or the image in docker/: bf16 training takes Transformer Engine's layers"
        )
    table = "\n".join(lines)
    broken = [one.name for one in found if one.fails or (not one.version and one.name not in OPTIONAL)]
    if broken:
        raise DistillError(
            f"{table}\ndoctor = {', '.join(broken)}: cannot be imported. Install the versions of constraints.txt, which are "
            "known to work together, or use the image in docker/."
        )
    return table


def missing_compilers() -> list[str]:
    """What kernels are compiled with, and is not here."""
    roots = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    toolkit = any(root and Path(root, "bin/nvcc").exists() for root in roots)
    missing = [] if shutil.which("g++") or shutil.which("clang++") else ["C++ compiler"]
    return missing + ([] if toolkit or shutil.which("nvcc") else ["nvcc"])


def _threads() -> str:
    """What ``cpu_threads`` means here."""
    cores = num_cores()
    shares = [
        f"{threads.rank} a rank and {threads.server} a server {when}"
        for threads, when in (
            (threads_of(RunConfig(cpu_threads=0), cores), "where they take turns"),
            (
                threads_of(RunConfig(cpu_threads=0, rollouts=RolloutConfig(max_staleness_steps=1)), cores),
                "with rollouts.max_staleness_steps",
            ),
        )
    ]
    return f"{cores} cores; 1 a process; cpu_threads=0 gives one rank and two servers {', '.join(shares)}"


def version(name: str) -> str | None:
    """Of an installed package; "installed" where it says none; None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed" if importlib.util.find_spec(name.replace("-", "_")) else None
