"""Find what a user names: a recipe, a cluster profile, a reward, a loss component and whatever else a run can be given.

In: a name as it is typed. Out: the function that it stands for, or what that function returns.

    a name                      stands for
    math                        something built in: load_function(name, builtins, where)
    tiny.quickstart             a function of the package ``recipes``: load_made(name, RunConfig, where)
    path/to/file.py:function    a function in any file, for either

A user's file is run once, under a module name of its own; its folder is searched last for what it imports, so that it may
lie beside files of its own. Names in a config are made absolute when the config is built (see ``absolute_name``): the
processes of a run may start in other working directories and on other machines than the command did.
"""

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_distill.config.schema import RunConfig
from megatron_distill.errors import ConfigError, DistillError

_FORM = "path/to/file.py:function"
_LOADING = threading.RLock()  # trackers are loaded by a thread each, and may lie in one file


def load_function[T](name: str, builtins: Mapping[str, T], where: str, arguments: Sequence[str] = ()) -> T:
    """The function that a name in a config stands for.

    Args:
        name: one of ``builtins``, or ``path/to/file.py:function``.
        builtins: what the library itself offers under this field, by name.
        where: the field, for errors, e.g. ``rl.reward``.
        arguments: what the function will be called with, by position; a file's function that cannot be is refused.

    Raises:
        ConfigError: there is no such name, file or function, or the file fails.
    """
    if name in builtins:
        return builtins[name]
    if ":" not in name and not name.endswith(".py"):
        hint = _close(name, builtins) or f"Known: {', '.join(builtins)}, or {_FORM}."
        raise ConfigError(f"{where} = {name!r}: unknown. {hint}")
    function = _attribute_of_file(name, where, lambda value: _why_not_callable(value, arguments))
    if reason := _why_not_callable(function, arguments):
        raise ConfigError(f"{where} = {name!r}: {reason}.")
    return function


def load_recipe(name: str) -> RunConfig:
    """The config that the named recipe returns, not yet validated.

    Raises:
        ConfigError: if there is no such recipe.
    """
    return load_made(name, RunConfig, "recipe")


def load_made[T](name: str, kind: type[T], where: str) -> T:
    """What the named function returns: a run's config, a pipeline, a study, a cluster profile.

    Args:
        name: ``module.function`` of ``recipes``, or ``path/to/file.py:function``. It need not be annotated.
        kind: what it must return.
        where: what was asked for, for errors, e.g. ``recipe``.

    Raises:
        ConfigError: there is no such function, or it fails, or it returns something else.
    """

    def why_not(value: Any) -> str | None:
        return _why_not_maker(value, kind)

    if ":" in name or name.endswith(".py"):
        function = _attribute_of_file(name, where, why_not)
    else:
        function = _attribute_of_recipes(name, kind, where)
    if not callable(function) or isinstance(function, type) or _required(function):
        raise ConfigError(
            f"{where} = {name!r}: {why_not(function)}. It must be a function without arguments that returns a {kind.__name__}."
        )
    code = getattr(inspect.unwrap(function), "__code__", None)
    with _blamed(f"{where} = {name!r}", code.co_filename if code else ""):
        made = function()
    if not isinstance(made, kind):
        raise ConfigError(f"{where} = {name!r}: returned a {type(made).__name__}, and must return a {kind.__name__}.")
    return made


def all_recipes() -> dict[str, Callable[[], RunConfig]]:
    """Every recipe of the ``recipes`` package by ``module.function``."""
    return every(RunConfig)


def every[T](kind: type[T]) -> dict[str, Callable[[], T]]:
    """Every public function of the ``recipes`` package that is annotated to return a ``kind``, by ``module.function``."""
    return {
        f"{info.name}.{name}": function
        for info in pkgutil.iter_modules(recipes_package().__path__)
        for name, function in _defined_in(_recipes_module(info.name)).items()
        if _returns(function) is kind and _why_not_maker(function, kind) is None
    }


def recipes_package() -> ModuleType:
    """The package of the recipes that come with the library: the one place that knows where it is."""
    return importlib.import_module("megatron_distill.recipes")


def absolute_name(name: str) -> str:
    """A name with its file's path made absolute, so that it holds in any working directory; built-in names as they are."""
    path, colon, function = name.rpartition(":")
    return f"{os.path.abspath(os.path.expanduser(path))}:{function}" if colon and path else name


def module_at(path: Path, where: str) -> ModuleType:
    """Run the Python file at ``path``, once for each content that it has had.

    Args:
        path: of the file.
        where: what named it, for errors, as ``field = value``.

    Raises:
        ConfigError: there is no such file, or it fails.
    """
    path = Path(os.path.abspath(path.expanduser()))
    if not path.is_file():
        raise ConfigError(f"{where}: {path} is no file. Give {_FORM}.")
    if path.suffix != ".py":
        raise ConfigError(f"{where}: {path.name} is no Python file. Give {_FORM}.")
    with _LOADING, _blamed(where, str(path)):
        # Under a name of its own, since two files may have the same one; dataclasses look their module up by it.
        name = f"{path.stem}_{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


@contextlib.contextmanager
def _blamed(where: str, path: str) -> Iterator[None]:
    """Turn what a user's code raises into one message that names its line; our own errors explain themselves."""
    try:
        yield
    except DistillError:
        raise
    except (Exception, SystemExit) as error:
        lines = []
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == path:
                lines.append(trace.tb_lineno)
            trace = trace.tb_next
        if isinstance(error, SyntaxError) and error.filename == path:
            lines.append(error.lineno or 0)
            error.filename = None  # or the text names file and line once more
        place = f"{path}, line {lines[-1]}" if lines else path
        raise ConfigError(f"{where}: failed at {place}: {type(error).__name__}: {error}. Mend the file.") from error


def _attribute_of_file(name: str, where: str, why_not: Callable[[Any], str | None]) -> Any:
    """What ``path/to/file.py:function`` names; an error lists what is there, and why something is not it."""
    path, colon, function = name.rpartition(":") if ":" in name else (name, "", "")
    module = module_at(Path(path), f"{where} = {name!r}")
    found = {key: value for key, value in _defined_in(module).items() if callable(value)}
    if not colon or not function:
        raise ConfigError(f"{where} = {name!r}: names a file but no function of it. {_told(found, why_not)}")
    if not hasattr(module, function):
        raise ConfigError(
            f"{where} = {name!r}: {path} defines no {function}. {_told(found, why_not)} {_close(function, found)}".rstrip()
        )
    return getattr(module, function)


def _attribute_of_recipes(name: str, kind: type, where: str) -> Any:
    """What ``module.function`` names in ``recipes``."""
    module_name, _, function = name.rpartition(".")
    if module_name in {info.name for info in pkgutil.iter_modules(recipes_package().__path__)}:
        module = _recipes_module(module_name)
        if function in _defined_in(module):
            return getattr(module, function)
    known: Mapping[str, Any] = every(kind)
    hint = _close(name, known) or f"Known: {', '.join(known) or 'none'}, or {_FORM}."
    raise ConfigError(f"{where} = {name!r}: unknown. {hint}")


def _recipes_module(name: str) -> ModuleType:
    full = f"{recipes_package().__name__}.{name}"
    found = importlib.util.find_spec(full)
    with _blamed(f"recipes = {name!r}", (found and found.origin) or ""):
        return importlib.import_module(full)


def _defined_in(module: ModuleType) -> dict[str, Any]:
    """A module's public values, without what it imports; what a decorator made of a function is the module's own."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and not _is_imported(value, module)
    }


def _is_imported(value: Any, module: ModuleType) -> bool:
    home, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if home in (None, module.__name__) or not (inspect.isroutine(value) or isinstance(value, type)):
        return False
    return getattr(sys.modules.get(home), name, None) is value


def _told(found: Mapping[str, Any], why_not: Callable[[Any], str | None]) -> str:
    """E.g. ``It has: quick; prepare (takes path).``"""
    parts = [f"{name} ({reason})" if (reason := why_not(value)) else name for name, value in found.items()]
    return f"It has: {'; '.join(parts)}." if parts else "It defines no public function."


def _close(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]}?" if close else ""


def _why_not_callable(value: Any, arguments: Sequence[str]) -> str | None:
    """Why ``value`` cannot be called with ``arguments``; None if it can, or if there is no telling."""
    if not callable(value):
        return f"is a {type(value).__name__}, not a function"
    if not arguments:
        return None
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*arguments)
    except TypeError:
        return f"takes {signature}, and is called with ({', '.join(arguments)})"
    return None


def _why_not_maker(value: Any, kind: type) -> str | None:
    """Why ``value`` is no function without arguments that returns a ``kind``, as far as can be seen without calling it."""
    if isinstance(value, type) or not callable(value):
        return f"is a {'class' if isinstance(value, type) else type(value).__name__}, not a function"
    if required := _required(value):
        return f"takes {', '.join(required)}"
    returns = _returns(value)
    if returns is None or returns is Any or (isinstance(returns, type) and issubclass(returns, kind)):
        return None
    return f"returns {getattr(returns, '__name__', returns)}"


def _required(function: Callable[..., Any]) -> list[str]:
    """The arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one.name for one in parameters if one.default is one.empty and one.kind not in optional]


def _returns(function: Callable[..., Any]) -> Any:
    """What a function is annotated to return; None if it is not, or if the annotation cannot be resolved."""
    try:
        return typing.get_type_hints(function).get("return")
    except Exception:
        return None
