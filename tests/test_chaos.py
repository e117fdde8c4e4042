"""The chaos test itself, short: a few faults of different kinds, and a run that ends as if there had been none."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.mark.heavy
@pytest.mark.timeout(3000)
def test_broken_runs_end_like_an_unbroken_one(tmp_path: Path) -> None:
    """Everything killed, asked to stop, and a damaged checkpoint: equal to the bit, and nothing left running."""
    spec = importlib.util.spec_from_file_location("chaos", Path(__file__).parents[1] / "tools" / "chaos.py")
    assert spec is not None and spec.loader is not None
    chaos = importlib.util.module_from_spec(spec)

    sys.modules["chaos"] = chaos  # dataclasses look their module up
    spec.loader.exec_module(chaos)
    assert chaos.main([str(tmp_path / "chaos")]) == 0
