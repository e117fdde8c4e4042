"""A config as plain values: JSON files, dotted overrides, and the fields' types and kinds as a reader sees them.

In: a ``RunConfig``, or what should become one. Out: the other; reading is strict and reports all problems at once.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_distill.config.curricula import EntropyGated, FixedHorizon, Ladder, Progressive
from megatron_distill.config.json_files import parsed, text_of, without_duplicates, write_whole
from megatron_distill.config.loading import absolute_name
from megatron_distill.config.rules import problems_of
from megatron_distill.config.schedules import Schedule, constant
from megatron_distill.config.schema import RunConfig, all_fields
from megatron_distill.errors import ConfigError

_KINDS: dict[str, dict[str, type]] = {
    "curriculum": {cls().kind: cls for cls in (FixedHorizon, Ladder, Progressive, EntropyGated)}
}
"""Sections that have a type for each kind, the default first."""
_WRITABLE = "must be text that a file can hold: no NUL, and no half of a surrogate pair. Type it again."


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain JSON values; ``from_dict`` is the inverse."""
    return {spec.name: plain_value(getattr(config, spec.name)) for spec in dataclasses.fields(config)}


def plain_value(value: Any) -> Any:
    """A field's value, or a section, as JSON holds it."""
    if isinstance(value, Schedule):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [plain_value(one) for one in value] if isinstance(value, tuple) else value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's JSON as {dotted field name: plain value}; a schedule is one value."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and "points" not in value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def from_dict(data: Mapping[str, Any], check_rules: bool = True) -> RunConfig:
    """Build and validate a ``RunConfig`` from plain values.

    Args:
        data: as ``to_dict`` gives it; what is left out takes its default.
        check_rules: also hold the values to ``problems_of``; without, only keys and types are checked.

    Raises:
        ConfigError: listing every unknown key, every wrong type and every broken rule at once.
    """
    problems: list[str] = []
    config = _build(RunConfig, data, "", problems)
    if check_rules and not problems:
        problems = problems_of(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def with_overrides(config: RunConfig, overrides: Sequence[str], check_rules: bool = True) -> RunConfig:
    """Apply ``section.field=value`` overrides (values are JSON, or else strings) and validate the result.

    Raises:
        ConfigError: for a malformed or unknown override, or a rule broken by the outcome.
    """
    data = to_dict(config)
    _with_chosen_kinds(data, overrides)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override = {override!r}: must read section.field=value, e.g. num_steps=10.")
        *sections, leaf = key.split(".")
        node = data
        for section in sections:
            # An unknown section becomes an unknown key, which from_dict reports with a suggestion.
            child = node.setdefault(section, {})
            node = child if isinstance(child, dict) else node.setdefault(f"{section}.{leaf}", {})
        try:
            node[leaf] = parsed(text, without_duplicates)
        except json.JSONDecodeError:
            node[leaf] = text
        except ValueError as error:
            raise ConfigError(
                f"override = {override[:80]!r}: its value cannot be read ({error}). Write it anew."
            ) from error
    return from_dict(data, check_rules)


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved config as JSON: a start that is killed leaves all of it or none."""
    write_whole(path, (json.dumps(to_dict(config), indent=2) + "\n").encode())


def load(path: Path) -> RunConfig:
    """Read what ``save`` wrote.

    Raises:
        ConfigError: if the file is missing, is no JSON, or does not hold a sound config.
    """
    try:
        data = parsed(text_of(path), without_duplicates)
    except FileNotFoundError as error:
        raise ConfigError(f"config = {path}: no such file. Name a run folder of `megatron-distill train`.") from error
    except OSError as error:
        raise ConfigError(f"config = {path}: cannot be read ({error.strerror}). Name a file that can.") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise ConfigError(f"config = {path}: not JSON ({error}). Restore the file, or start a new run.") from error
    return from_dict(data)


def field_type(spec: "dataclasses.Field[Any]") -> str:
    """A field's type as a reader sees it: ``int``, ``a|b``, ``list of str``, ``schedule``."""
    if typing.get_origin(spec.type) is Literal:
        return "|".join(_all_kinds() if spec.name == "kind" else typing.get_args(spec.type))
    if typing.get_origin(spec.type) is tuple:
        item = typing.get_args(spec.type)[0]
        return f"list of {'object' if dataclasses.is_dataclass(item) else item.__name__}"
    if typing.get_origin(spec.type) is dict:
        return "object"
    if typing.get_origin(spec.type) is types.UnionType:
        return " or ".join("null" if one is type(None) else one.__name__ for one in typing.get_args(spec.type))
    return typing.cast(type, spec.type).__name__.lower()


def kinds_of(where: str) -> list[str]:
    """The kinds that a field belongs to; empty if it belongs to every config."""
    section, _, name = where.rpartition(".")
    owners = _owners(section, name)
    return owners if len(owners) < len(_KINDS.get(section, {})) else []


def _owners(section: str, name: str) -> list[str]:
    """The kinds of a section that have a field of this name; empty also for a section without kinds."""
    kinds = _KINDS.get(section, {})
    return [kind for kind, cls in kinds.items() if name in {spec.name for spec in dataclasses.fields(cls)}]


def _all_kinds() -> tuple[str, ...]:
    return tuple(kind for kinds in _KINDS.values() for kind in kinds)


def _build(cls: type, data: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(data, Mapping):
        problems.append(f"{where.rstrip('.')} = {data!r}: must be a section with fields of its own.")
        return cls()
    specs = {spec.name: spec for spec in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in specs:
            told = _of_other_kind(where, key, data) or f"unknown key. {_hint(where, key, list(specs))}"
            problems.append(f"{where}{key} = {value!r}: {told}")
        elif typing.get_origin(specs[key].type) is types.UnionType and key in _KINDS:
            values[key] = _build_kind(key, value, problems)
        elif dataclasses.is_dataclass(specs[key].type) and specs[key].type is not Schedule:
            values[key] = _build(typing.cast(type, specs[key].type), value, f"{where}{key}.", problems)
        else:
            values[key] = _coerce(specs[key].type, value, f"{where}{key}", problems)
            if specs[key].metadata.get("function"):
                values[key] = _absolute(values[key])
    return cls(**values)


def _build_kind(section: str, data: Any, problems: list[str]) -> Any:
    """A section that has a type for each kind: its ``kind`` decides which."""
    kinds = _KINDS[section]
    first = next(iter(kinds))
    kind = data.get("kind", first) if isinstance(data, Mapping) else first
    if not isinstance(kind, str) or kind not in kinds:
        problems.append(f"{section}.kind = {kind!r}: must be one of {', '.join(map(repr, kinds))}.")
        return kinds[first]()
    return _build(kinds[kind], data, f"{section}.", problems)


def _of_other_kind(where: str, key: str, data: Mapping[str, Any]) -> str:
    """Whose field an unknown key of a section with kinds is; empty if it is nobody's."""
    section = where.rstrip(".")
    owners = _owners(section, key)
    if not owners:
        return ""
    kind = data.get("kind", next(iter(_KINDS[section])))
    return f"belongs to {section}.kind={' or '.join(owners)}, and the kind is {kind}. Set the kind, or drop it."


def _with_chosen_kinds(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Drop what a recipe says of a section's kind if an override chooses another: its fields would be unknown keys."""
    for section, kinds in _KINDS.items():
        for override in overrides:
            kind = override.removeprefix(f"{section}.kind=").strip('"')
            if kind != override and kind in kinds:
                kept = {spec.name for spec in dataclasses.fields(kinds[kind])}
                data[section] = {key: value for key, value in data[section].items() if key in kept}


def _hint(where: str, key: str, known: Sequence[str]) -> str:
    """What may have been meant by an unknown key: a field of the same name elsewhere, or a similar one here."""
    same = [name for name in all_fields() if name.rpartition(".")[2] == key]
    inside = [name for name in same if name.startswith(where)]
    close = difflib.get_close_matches(key, known, n=1)
    if inside or (same and not close):
        return f"Did you mean {' or '.join(inside or same)}?"
    return f"Did you mean {where}{close[0]}?" if close else f"Known: {', '.join(known)}."


def _absolute(names: Any) -> Any:
    """A function's name, or several, such that other working directories find the same; what is no name stays."""
    if isinstance(names, tuple):
        return tuple(map(_absolute, names))
    if isinstance(names, dict):
        return {_absolute(name): value for name, value in names.items()}
    return absolute_name(names) if isinstance(names, str) else names


def _coerce(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """``value`` as the field's type, or a line in ``problems``."""
    origin = typing.get_origin(kind)
    if kind is Schedule:
        try:
            return Schedule.from_json(value)
        except ValueError as error:
            problems.append(f"{where} = {value!r}: {error}.")
            return constant(0)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            problems.append(f"{where} = {value!r}: must be one of {', '.join(map(repr, choices))}.")
        return value
    if origin is types.UnionType:
        kinds = typing.get_args(kind)
        return None if value is None and type(None) in kinds else _coerce(kinds[0], value, where, problems)
    if origin is tuple:
        item_kind = typing.get_args(kind)[0]
        if isinstance(value, list | tuple) and dataclasses.is_dataclass(item_kind):
            return tuple(
                _build(typing.cast(type, item_kind), item, f"{where}[{number}].", problems)
                for number, item in enumerate(value)
            )
        if isinstance(value, list | tuple):
            return tuple(_coerce(item_kind, item, where, problems) for item in value)
        problems.append(f'{where} = {value!r}: must be a list, e.g. ["a", "b"].')
        return ()
    if origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f'{where} = {value!r}: must be an object, e.g. {{"name": true}}.')
            return {}
        if not _can_be_written(value):
            problems.append(f"{where} = {value!r}: {_WRITABLE}")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            problems.append(f"{where} = {str(value)[:20]}...: is larger than a float can be. Type a smaller number.")
            return 0.0
    if type(value) is not kind:
        hint = f" Type {value.lower()}." if kind is bool and str(value).lower() in ("true", "false") else ""
        problems.append(f"{where} = {value!r}: must be of type {kind.__name__}, not {type(value).__name__}.{hint}")
    elif kind is str and not _can_be_written(value):
        problems.append(f"{where} = {value!r}: {_WRITABLE}")
    return value


def _can_be_written(value: Any) -> bool:
    """Whether every text in ``value`` is sound Unicode without NUL: what a path, a tokenizer and ``config.json`` all take."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        return "\\u0000" not in text and bool(text.encode())
    except UnicodeEncodeError:
        return False
