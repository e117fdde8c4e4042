"""Find a recipe: a function without arguments that returns a ``RunConfig``.

In: its name as a user types it, ``module.function`` below ``recipes`` or ``path/to/file.py:function``. Out: its config.
Importing a recipe starts nothing.
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from megatron_distill.config import RunConfig
from megatron_distill.errors import ConfigError


def load_recipe(name: str) -> RunConfig:
    """The config that the named recipe returns, not yet validated.

    Raises:
        ConfigError: if there is no such recipe.
    """
    if ":" in name:
        path, _, function = name.rpartition(":")
        recipes = functions_returning(module_at(Path(path)), RunConfig)
        if function not in recipes:
            raise ConfigError(f"recipe = {name!r}: {path} has no such recipe. It has: {', '.join(recipes) or 'none'}.")
        return recipes[function]()
    recipes = all_recipes()
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(recipes)}, or path/to/file.py:function."
        raise ConfigError(f"recipe = {name!r}: unknown. {hint}")
    return recipes[name]()


def all_recipes() -> dict[str, Callable[[], RunConfig]]:
    """Every recipe of the ``recipes`` package by ``module.function``."""
    import recipes as package

    found: dict[str, Callable[[], RunConfig]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"recipes.{info.name}")
        found |= {f"{info.name}.{name}": function for name, function in functions_returning(module, RunConfig).items()}
    return found


def functions_returning[T](module: ModuleType, kind: type[T]) -> dict[str, Callable[[], T]]:
    """The public functions that a module itself defines without arguments and annotates to return a ``kind``."""
    return {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and function.__module__ == module.__name__
        and function.__annotations__ == {"return": kind}
    }


def module_at(path: Path) -> ModuleType:
    """Import the Python file at ``path``.

    Raises:
        ConfigError: if there is no such file.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Give path/to/file.py:function.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
