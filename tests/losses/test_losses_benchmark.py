"""The benchmark of the losses, and the page that shows its numbers."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def maker():
    """docs/figures/losses_speed.py, which makes the page's tables."""
    spec = importlib.util.spec_from_file_location("losses_speed", ROOT / "docs/figures/losses_speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_committed_run(maker) -> None:
    """Every number under Speed is one of docs/figures/losses_speed.json, and none was typed or forgotten."""
    result = json.loads((ROOT / "docs/figures/losses_speed.json").read_text())
    page = (ROOT / "docs/losses.md").read_text()
    assert maker.rewrite(page, result) == page


@pytest.mark.long
def test_every_part_runs_and_fills_its_table(maker, tmp_path) -> None:
    """One command measures all parts; small tensors here. Wrong compositions show in their gradient error alone."""
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.losses", "--quick", "--json", str(file)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=900)
    result = json.loads(file.read_text())
    rows = {(row["part"], row["variant"]): row for row in result["rows"]}
    assert all(rows["fp32-tp2", name]["collectives"] == [count, 0] for name, count in (("mixed KL", 1), ("JSD", 2)))
    for part in ("errors-tp2", "errors-tp4"):
        assert (
            rows[part, "mixed KL"]["gradient_error"]
            < 1e-5
            < 0.1
            < rows[part, "KL: differentiable all-reduce"]["gradient_error"]
        )
    texts = maker.texts(result)
    assert all(heading in texts["one rank"] + texts["two"] for heading in maker.COLUMNS.values())
