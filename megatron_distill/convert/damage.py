"""Whether a ``torch_dist`` checkpoint is whole: every file there, as long as it must be, every checksum right.

In: an iteration's directory. Out: what is wrong with it, or nothing. Each chunk of a ``.distcp`` file is a zip archive that
``torch.save`` wrote, with a CRC-32 of every member: so any checkpoint can be verified, with no list kept beside it that a kill
could prevent.
"""

import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_distill.config.json_files import json_of
from megatron_distill.convert.metadata_pickle import read_metadata
from megatron_distill.errors import CheckpointError

_THREADS = 8  # zlib's checksum runs outside Python's lock


def damage_of(directory: Path) -> str:
    """What is wrong with the checkpoint in ``directory``: its first damaged file and how; empty if it is whole."""
    try:
        description = json_of(directory / "metadata.json")
        if description.get("sharded_backend") != "torch_dist":
            return f"{directory / 'metadata.json'}: names no torch_dist checkpoint"
        metadata = read_metadata(directory)
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError, AttributeError) as error:
        return f"{directory / 'metadata.json'}: cannot be read ({error})"
    places = sorted((metadata.storage_data or {}).values(), key=lambda place: (place.relative_path, place.offset))
    if not places:
        return f"{directory / '.metadata'}: lists no tensor"
    if problem := _first_broken_file(directory, places):
        return problem
    with ThreadPoolExecutor(_THREADS) as pool:
        return next(
            (problem for problem in pool.map(lambda place: _chunk_damage(directory, place), places) if problem), ""
        )


def _first_broken_file(directory: Path, places: list[_StorageInfo]) -> str:
    """The first file that its chunks do not fill, one after the other from its first byte to its last.

    Entries may share a chunk: those of Megatron's extra states, which are all empty, do in converted checkpoints.
    """
    ends: dict[str, int] = {}
    for name, offset, length in sorted({(place.relative_path, place.offset, place.length) for place in places}):
        end = ends.get(name, 0)
        if offset != end:
            return f"{directory / '.metadata'}: no chunk of {name} begins at byte {end}"
        ends[name] = end + length
    for name, end in ends.items():
        file = directory / name
        if Path(name).name != name:
            return f"{directory / '.metadata'}: names a file outside its directory, {name!r}"
        if not file.is_file():
            return f"{file}: is missing"
        if file.stat().st_size != end:
            return f"{file}: has {file.stat().st_size} bytes, must have {end}"
    return ""


def _chunk_damage(directory: Path, place: _StorageInfo) -> str:
    """What is wrong with one chunk."""
    file = directory / place.relative_path
    try:
        with file.open("rb") as stream, zipfile.ZipFile(_Part(stream, place.offset, place.length)) as archive:
            broken = archive.testzip()
    except Exception as error:  # a damaged archive raises many kinds
        return f"{file}: bytes {place.offset} to {place.offset + place.length} are damaged ({error})"
    return f"{file}: the checksum of {broken} at byte {place.offset} is wrong" if broken else ""


class _Part(io.RawIOBase):
    """A part of a file as a file, so that a chunk of any size is checked without a copy."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        self._stream.seek(self._start + self._at)
        data = self._stream.read(wanted)
        self._at += len(data)
        return data
