"""What the Makefile's commands would do, asked of make itself; nothing is done."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands(*arguments: str) -> str:
    """Of a target, as make would run them when typed in a shell, whichever make runs the tests."""
    shell = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=shell, capture_output=True, text=True, check=True).stdout


def test_clean_leaves_the_runs() -> None:
    """What took minutes to install goes, what took days to train stays."""
    assert commands("clean").split() == ["rm", "-rf", ".venv", "site"]


def test_lock_installs_nothing_by_the_constraints_that_it_replaces() -> None:
    """A bound that was just raised in pyproject.toml is one that they refuse."""
    told = commands("--what-if=pyproject.toml", "lock")
    assert "tools/lock.py" in told and "pip install" not in told
    assert "pip install" in commands("--what-if=pyproject.toml", "check")
