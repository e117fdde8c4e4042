"""Bytes on disk by key, for many writing processes and for processes that are killed: what the teacher caches share.

In: (key, payload) pairs. Out: the payloads of the keys that any process has stored. A directory holds two append-only
files for each process that ever wrote to it:

    <random name>.v1.data     payloads, one after another
    <random name>.v1.index    one 32-byte entry each: key [16], offset u64, length u32, CRC-32 of key and payload u32

No file has two writers, so nothing is locked. An entry is written after its payload, so a killed process leaves at worst
a payload without an entry, which is never looked at, or a torn entry, which is not a whole 32 bytes. Everything else that
can happen to a file (lost pages after a power cut, bit rot) fails the checksum and reads as a miss. Opening reads the
entries alone (a million: 32 MB of disk, 0.3 GB of memory), and later entries of other processes are picked up at every
look-up. To make a cache smaller delete pairs of files, at any time at which no process uses them.
"""

import itertools
import os
import uuid
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from megatron_distill.errors import DataError

KEY_BYTES = 16
_ENTRY = np.dtype([("key", f"V{KEY_BYTES}"), ("offset", "<u8"), ("length", "<u4"), ("crc", "<u4")])


class _Place(NamedTuple):
    """Where a payload lies: the stem of its two files, and the index entry's numbers."""

    shard: str
    offset: int
    length: int
    crc: int


class ShardStore:
    """A directory of shards, read and appended to. For one thread; any number of processes and machines may share it."""

    def __init__(self, directory: Path) -> None:
        """Read every index; a shard of this process' own is made by the first ``put``.

        Args:
            directory: made if it does not exist.

        Raises:
            DataError: if the directory cannot be made.
        """
        self._directory = directory
        self._places: dict[bytes, _Place] = {}
        self._num_read_bytes: dict[str, int] = {}
        self._own: str = uuid.uuid4().hex
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self._data_bytes = 0
        self.num_corrupt = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self._refresh()

    def __len__(self) -> int:
        """Keys known so far."""
        return len(self._places)

    def get(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The payloads of those ``keys`` that are stored, by whatever process, and pass their checksum.

        A payload that fails is forgotten and counted in ``num_corrupt``.
        """
        self._refresh()
        by_shard: dict[str, list[tuple[_Place, bytes]]] = {}
        for key in dict.fromkeys(keys):
            place = self._places.get(key)
            if place is not None:
                by_shard.setdefault(place.shard, []).append((place, key))
        found: dict[bytes, bytes] = {}
        for shard, wanted in by_shard.items():
            for key, payload in self._read(shard, sorted(wanted)).items():
                if zlib.crc32(payload, zlib.crc32(key)) == self._places[key].crc:
                    found[key] = payload
                else:
                    del self._places[key]
                    self.num_corrupt += 1
        return found

    def put(self, payloads: Mapping[bytes, bytes]) -> None:
        """Append payloads to this process' shard; once it returns, the death of the process cannot lose them.

        Raises:
            DataError: if the disk does not take them.
        """
        if not payloads:
            return
        places = {}
        for key, payload in payloads.items():
            assert len(key) == KEY_BYTES, len(key)
            crc = zlib.crc32(payload, zlib.crc32(key))
            places[key] = _Place(self._own, self._data_bytes, len(payload), crc)
            self._data_bytes += len(payload)
        entries = np.array([(key, *place[1:]) for key, place in places.items()], _ENTRY)
        try:
            if self._files is None:
                self._files = self._path(self._own, "data").open("xb"), self._path(self._own, "index").open("xb")
            data, index = self._files
            data.write(b"".join(payloads.values()))
            data.flush()
            index.write(entries.tobytes())
            index.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self._places |= places

    def close(self) -> None:
        """Close this process' shard. A later ``put`` is an error, ``get`` is not."""
        for file in self._files or ():
            file.close()

    def _path(self, shard: str, what: str) -> Path:
        return self._directory / f"{shard}.v1.{what}"

    def _refresh(self) -> None:
        """Read the index entries that other processes have appended since the last look."""
        for file in os.scandir(self._directory):
            shard, dot, _ = file.name.partition(".v1.index")
            known = self._num_read_bytes.get(shard, 0)
            if not dot or shard == self._own or file.stat().st_size < known + _ENTRY.itemsize:
                continue
            with open(file.path, "rb") as index:
                index.seek(known)
                read = index.read()
            entries = np.frombuffer(read[: len(read) // _ENTRY.itemsize * _ENTRY.itemsize], _ENTRY)
            self._num_read_bytes[shard] = known + entries.nbytes
            keys = entries["key"].tolist()
            numbers = (entries[name].tolist() for name in ("offset", "length", "crc"))
            self._places.update(zip(keys, map(_Place, itertools.repeat(shard), *numbers), strict=True))

    def _read(self, shard: str, wanted: list[tuple[_Place, bytes]]) -> dict[bytes, bytes]:
        """Payloads of one shard, in the order of the file; too short, or empty, where the file ends too early."""
        payloads = {}
        try:
            with self._path(shard, "data").open("rb") as data:
                for place, key in wanted:
                    data.seek(place.offset)
                    payloads[key] = data.read(place.length)
        except FileNotFoundError:  # deleted by hand
            return {key: b"" for _, key in wanted}
        return payloads

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"teacher.cache_dir = {self._directory}: cannot be written ({error.strerror}). Free or name another place, or "
            "set teacher.cache_dir= to go on without a cache."
        )
