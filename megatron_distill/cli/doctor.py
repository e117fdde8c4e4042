"""``megatron-distill doctor``: what is installed, and what works here."""

import argparse
from pathlib import Path

from megatron_distill.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--deep", action="store_true", help="do, small, what a run does here: kernels, losses, a server; minutes"
    )
    parser.add_argument(
        "--model", type=Path, help="with --deep: Hugging Face directory to serve instead of the tiny student"
    )


def run(options: argparse.Namespace) -> None:
    """Look, and print."""
    if options.deep:
        from megatron_distill.launch.deep_doctor import examine

        examine(options.model)
        return
    if options.model:
        raise ConfigError(f"--model = {options.model}: goes with --deep, which serves it. Add --deep, or leave it out.")
    from megatron_distill.launch.doctor import diagnose

    print(diagnose())
