"""What the project may overwrite or delete: what it wrote itself, told by a mark that it leaves in each of its directories.

In: a directory or file that a command is about to write. Out: nothing, or a refusal that names what is there.

    runs/NAME/.megatron-distill.json   {"kind": "run"}        a run folder
    MODEL/.megatron-distill.json       {"kind": "model", "files": [...]}   a directory that is replaced as a whole

A folder without the mark is a user's, whatever its files are called.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

from megatron_distill.config.json_files import json_of
from megatron_distill.errors import DistillError

MARK = ".megatron-distill.json"
GENERATOR = '<meta name="generator" content="megatron-distill">'
"""Stands in the head of every page that the project writes."""

Kind = Literal["run", "study", "model"]

_SHOWN = 4


def kind_of(directory: Path) -> str:
    """What kind of directory of ours it is; empty if it bears no mark."""
    try:
        mark = json_of(directory / MARK)
    except (OSError, ValueError):
        return ""
    return str(mark.get("kind", "")) if isinstance(mark, dict) else ""


def check_claim(directory: Path, kind: Kind, where: str) -> None:
    """Refuse a directory that is neither new, nor empty, nor marked as ours of this kind. Changes nothing.

    Args:
        directory: that a command is to write in.
        kind: of directory.
        where: how the message calls it, e.g. "run folder".

    Raises:
        DistillError: naming what is there instead.
    """
    told = f"{where} = {directory}"
    try:
        around = Path(os.path.realpath(directory)).parents if kind == "run" else ()
        if outer := next((one for one in around if kind_of(one) == "run"), None):
            raise DistillError(
                f"{told}: lies in {outer}, which another run deletes parts of. Name a folder outside of it."
            )
        if not directory.exists():
            _check_parent(directory, told)
            return
        if not directory.is_dir():
            raise DistillError(f"{told}: is a file. Name a folder that is new or empty.")
        if kind_of(directory) == kind:
            if not os.access(directory, os.W_OK | os.X_OK):
                raise DistillError(f"{told}: may not be written to. Change its permissions, or name another folder.")
            return
        present = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise DistillError(f"{told}: {error.strerror}. Name a folder that can be read and written.") from error
    if present:
        more = ", ..." if len(present) > _SHOWN else ""
        raise DistillError(
            f"{told}: holds {', '.join(present[:_SHOWN])}{more} and no {MARK}, so it is not a {kind} folder of this project, "
            "which deletes nothing that it did not write. Name a folder that is new or empty."
        )


def _check_parent(directory: Path, told: str) -> None:
    for ancestor in (directory, *directory.parents):
        if ancestor.is_symlink() and not ancestor.exists():
            raise DistillError(
                f"{told}: {ancestor} is a link that leads nowhere. Name another folder, or mend the link."
            )
        if ancestor != directory and ancestor.exists():
            break
    if not ancestor.is_dir():
        raise DistillError(f"{told}: {ancestor} is a file. Name a folder below a folder.")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise DistillError(f"{told}: {ancestor} may not be written to. Name a folder elsewhere.")


def claim(directory: Path, kind: Kind, where: str, **facts: Any) -> None:
    """Make ``directory`` if need be and mark it as ours.

    Raises:
        DistillError: see ``check_claim``.
    """
    check_claim(directory, kind, where)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / MARK).exists():
            temporary = directory / f"{MARK}.tmp"
            temporary.write_text(json.dumps({"kind": kind, **facts}) + "\n", encoding="utf-8")
            temporary.replace(directory / MARK)
    except OSError as error:
        raise DistillError(f"{where} = {directory}: {error.strerror}. Name a folder that can be written.") from error


def mark_model(directory: Path) -> None:
    """Mark a complete model directory with the list of its files, so that it may be replaced while nothing else is in it."""
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())
    (directory / MARK).write_text(json.dumps({"kind": "model", "files": files}) + "\n", encoding="utf-8")


def check_replaceable(directory: Path, where: str) -> None:
    """Refuse to replace a directory that holds anything the project did not write. Nothing there, or nothing in it, is fine.

    Raises:
        DistillError: naming a file that would be lost.
    """
    told = f"{where} = {directory}"
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise DistillError(
            f"{told}: is a {'link' if directory.is_symlink() else 'file'}, not a directory. Name a new one."
        )
    if not directory.exists():
        return
    present = {
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    if not present:
        return
    ours: set[str] = set()
    if kind_of(directory) == "model":
        ours = {MARK, *json_of(directory / MARK).get("files", [])}
    foreign = sorted(present - ours)
    if foreign:
        raise DistillError(
            f"{told}: holds {foreign[0]}{f' and {len(foreign) - 1} more' if len(foreign) > 1 else ''}, which this project did "
            "not write and so does not delete. Name a new directory, or move those files away."
        )


def check_replaceable_leftover(directory: Path, where: str) -> None:
    """Refuse to remove what looks like the leftover of a killed write, but bears no mark of one.

    Raises:
        DistillError: naming it.
    """
    is_plain = directory.is_dir() and not directory.is_symlink()
    if is_plain and (kind_of(directory) == "model" or not any(directory.iterdir())):
        return
    if directory.is_symlink() or directory.exists():
        raise DistillError(f"{where} = {directory}: is in the way, and this project did not write it. Move it away.")


def check_page(path: Path, where: str) -> None:
    """Refuse to write a page over a file that is none of ours.

    Raises:
        DistillError: if there is such a file, or no file can be written there.
    """
    told = f"{where} = {path}"
    if path.is_dir():
        raise DistillError(f"{told}: is a folder. Name a file, e.g. {path / 'page.html'}.")
    try:
        if path.exists() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise DistillError(
                f"{told}: exists and is no page of this project. Name another file; it is not overwritten."
            )
    except OSError as error:
        raise DistillError(f"{told}: {error.strerror}. Name a file that can be written.") from error
    check_parent_writable(path, where)


def check_parent_writable(path: Path, where: str) -> None:
    """Refuse a file whose folder is none, or may not be written to.

    Raises:
        DistillError: naming the folder.
    """
    _check_parent(path, f"{where} = {path}")
