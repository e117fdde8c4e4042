"""pyproject.toml names every package that is imported, and does not rely on what another one happens to bring."""

import ast
import functools
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BROUGHT = {"triton"}  # by torch, which pins the one it was built with


owners = functools.cache(importlib.metadata.packages_distributions)  # reads the records of all that is installed


def imported(folder: str) -> Iterator[tuple[str, str]]:
    """(package, file) of every import below a folder."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            yield from ((name.partition(".")[0], str(path.relative_to(ROOT))) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("megatron_distill", set(EXTRAS) - {"dev"}),
        ("recipes", set()),
        ("tests", set(EXTRAS)),
        ("tools", {"dev"}),
        ("benchmarks", {"dev"}),
    ],
)
def test_what_is_imported_is_declared(folder: str, extras: set[str]) -> None:
    """Whatever is installed here and imported there; what is not installed is imported for those who have it."""
    needs = [*PROJECT["dependencies"], *(need for extra in extras for need in EXTRAS[extra])]
    declared = {canonicalize_name(Requirement(need).name) for need in needs} | {"megatron-distill"} | BROUGHT
    missing = {
        name: file
        for name, file in imported(folder)
        if name not in sys.stdlib_module_names
        and name in owners()
        and not {canonicalize_name(owner) for owner in owners()[name]} & declared
    }
    assert missing == {}
