"""JSON that somebody wrote by hand, or damaged: parsed, or refused with a reason, without a wait or an endless read. And how a
small file of ours is written.

In: a path, or text. Out: the value. Every reason not to have it is an ``OSError`` or a ``ValueError``, for a message.
"""

import errno
import json
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Write through a temporary name: a reader sees the old file or the new one, never half, and a kill leaves either."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def text_of(path: Path) -> str:
    """The text of a regular file. A pipe would keep its reader waiting, and a device may never end.

    Raises:
        OSError: there is no such file, it is none, or it cannot be read.
        ValueError: it holds no UTF-8.
    """
    require_regular(path)
    return path.read_text(encoding="utf-8")


def require_regular(path: Path) -> None:
    """Refuse what is no file to be read from beginning to end.

    Raises:
        OSError: there is nothing, or something else.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))


def json_of(path: Path) -> Any:
    """The value in a file.

    Raises:
        OSError: see ``text_of``.
        ValueError: it holds no JSON.
    """
    return parsed(text_of(path))


def parsed(text: str | bytes, make_object: Callable[[Sequence[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a text.

    Args:
        text: of JSON.
        make_object: of an object's pairs; by default a dict, in which the last of equal keys counts.

    Raises:
        ValueError: it is no JSON (a ``JSONDecodeError``), or holds what nobody can read.
    """
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of whose keys none may come twice: which of the two was meant, nobody can tell.

    Raises:
        ValueError: naming the key.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found
