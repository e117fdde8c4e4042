"""Write constraints.txt again: every package of the environment and its version, and nothing about where it came from.

    make lock                      # after a change of dependencies in pyproject.toml; what is installed stays as it is

Needs uv beside this interpreter, and a package index.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
FIRST = {  # the packages that a run is about, and why one is pinned where that is not plain
    "torch": "",
    "megatron-core": "",
    "sglang": "",
    "transformers": "",
    "nemo-run": "",
    "leptonai": "nemo-run 0.11.1 imports leptonai.api.v1, which 0.47 removed.",
    "math-verify": "",
    "transformer-engine": "GPU only; its core is the wheel for CUDA 13.",
}
HEADER = """\
# The complete environment that is known to work together on Python 3.12, on CPU and GPU alike: what a run takes, the
# launcher, Transformer Engine, the tools of development and those that the image builds with. `make lock` writes it.
"""
BUILD_TOOLS = "setuptools>=77\nwheel\n"  # that compile Transformer Engine's torch extension in the image


def main() -> None:
    """Resolve everything against what is installed, and write it in reading order."""
    uv = str(Path(sys.executable).with_name("uv"))
    with tempfile.TemporaryDirectory() as folder:
        output, build = Path(folder) / "resolved.txt", Path(folder) / "build.in"
        frozen = subprocess.run(
            [uv, "pip", "freeze", "--python", sys.executable], check=True, capture_output=True, text=True
        )
        output.write_text(  # what uv finds in its output file, it keeps where it can
            "\n".join(line for line in frozen.stdout.splitlines() if re.fullmatch(r"[\w.-]+==\S+", line))
        )
        build.write_text(BUILD_TOOLS)
        command = [uv, "pip", "compile", str(ROOT / "pyproject.toml"), str(build), "--python", sys.executable]
        command += ["--extra", "launch", "--extra", "gpu", "--extra", "dev", "--output-file", str(output)]
        command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        resolved = output.read_text()
    pins = dict(line.split("==") for line in resolved.splitlines() if re.fullmatch(r"[\w.-]+==[\w.+!-]+", line))
    lines = [HEADER]
    for name, why in FIRST.items():
        lines += [f"# {why}\n"] * bool(why) + [f"{name}=={pins.pop(name)}\n"]
    lines += ["\n# What they depend on, and tools.\n", *(f"{name}=={pins[name]}\n" for name in sorted(pins))]
    CONSTRAINTS.write_text("".join(lines))


if __name__ == "__main__":
    main()
