"""Records of whatever holds them, one after another: files, saved data sets, hub data sets that are on this machine.

In: a place, as ``data.train_path`` names it. Out: each record with the words that name where it stands. Nothing is held but
the record at hand, except for a ``.json`` file that is one array.

    train.jsonl  train.json  train.csv  train.parquet     files
    saved/                                                a directory of ``datasets.Dataset.save_to_disk``
    folder/:test                                          the split ``test`` of a directory of data files
    folder/:main/test                                     the same of its configuration ``main``
    owner/name:main/test                                  a hub data set that `megatron-distill fetch` brought here
    train.jsonl[1000:2000]                                rows 1000 to 1999 of any of these
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_distill.config.json_files import without_duplicates
from megatron_distill.errors import DataError
from megatron_distill.models import hub

KINDS = ".jsonl, .json, .csv, .parquet, a saved data set's directory, or a directory of data files with its split"
_PLACE = re.compile(
    r"(?P<path>.+?)(?::(?:(?P<config>[\w.-]+)/)?(?P<split>[\w.-]+))?(?:\[(?P<first>\d*):(?P<end>\d*)\])?", re.DOTALL
)
_SHOWN_CHARS = 80
Record = Mapping[str, Any]


class BadRow(DataError):
    """A row that is no problem. ``reason`` is what rows are counted by where they are dropped: a few words."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def refused(self, *, after_good_ones: bool) -> DataError:
        """What ends a run that keeps no such row: if others were good, it is the row that is odd, not the config."""
        return DataError(f"{self} Or leave such rows out: data.on_bad_rows=drop." if after_good_ones else str(self))


@dataclass(frozen=True)
class Place:
    """Where records are.

    Attributes:
        path: of the file or directory.
        config: of a directory's configurations; None for its only one.
        split: of a directory's splits; None for its only one.
        first: 0-based row to begin with.
        end: row before which to stop; None for all.
    """

    path: str
    config: str | None = None
    split: str | None = None
    first: int = 0
    end: int | None = None


def parse_place(text: str) -> Place:
    """What a path with a split or a slice after it names; a file that is called so comes first."""
    found = _PLACE.fullmatch(text)
    if found is None or os.path.exists(text):
        return Place(text)
    return Place(
        found["path"],
        found["config"],
        found["split"],
        int(found["first"] or 0),
        int(found["end"]) if found["end"] else None,
    )


def read_records(text: str) -> Iterator[tuple[str, Record | BadRow]]:
    """Each record, or why a row is none, with the words that name its place in messages.

    Args:
        text: a place, see the module's docstring.

    Raises:
        DataError: there is no such place, or it cannot be read at all.
    """
    place = parse_place(text)
    if max(place.first, place.end or 0) > sys.maxsize:
        raise DataError(f"{text[:200]}: no file has so many rows. Name fewer, or drop the brackets.")
    return itertools.islice(_records(place), place.first, place.end)


def first_record(text: str) -> dict[str, Any]:
    """The first record, column by column, as it stands there.

    Raises:
        DataError: there is no such place, it cannot be read, or its first row is no record.
    """
    for _, record in read_records(text):
        if isinstance(record, BadRow):
            raise record.refused(after_good_ones=False)
        return dict(record)
    raise DataError(f"{text} = empty: must hold at least one problem. Check the file.")


def _records(place: Place) -> Iterator[tuple[str, Record | BadRow]]:
    path = Path(place.path)
    if path.is_dir():
        return _of_directory(path, place)
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} = a link that leads nowhere: must be a file or a directory. Mend the link.")
    if path.exists() and not path.is_file():
        raise DataError(f"{path} = a pipe or a device: is read more than once. Write it to a file, and name that.")
    if not path.is_file():
        raise DataError(
            f"{path} = missing: no such file or directory. Check the path, and that it is visible here."
            f"{hub.unresolved_remedy(place.path)}{' --dataset' if hub.hub_id(place.path) else ''}"
        )
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(
            f"{path} = {path.suffix or 'no suffix'!r}: problems are read from {KINDS}. Convert the file, or give it the suffix "
            "that says what it holds."
        )
    if place.split:
        raise DataError(f"{path}:{place.split}: a file has no splits. Drop :{place.split}.")
    return readers[path.suffix](path)


def _json_lines(path: Path) -> Iterator[tuple[str, Record | BadRow]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                yield (
                    where,
                    BadRow("blank line", f"{where} = blank: every line must hold one record. Delete the line."),
                )
                continue
            try:
                record = _parse(line)
            except (ValueError, RecursionError) as error:
                text = line.decode("utf-8", "replace").strip()
                told = f"{where} = {shown(text)}: not JSON ({error}). Mend or delete the line."
                yield where, BadRow("not JSON", told)
                continue
            yield where, _as_record(where, record, "Write one object a line.")


def _json(path: Path) -> Iterator[tuple[str, Record | BadRow]]:
    """An array of records, alone or as the one list of an object; or lines, under a name that does not say so."""
    with path.open("rb") as file:
        first = file.readline()
    try:
        is_lines = isinstance(_parse(first), dict) and path.stat().st_size > len(first)
    except (ValueError, RecursionError):
        is_lines = False
    if is_lines:
        yield from _json_lines(path)
        return
    try:
        whole = _parse(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}). Write the file again, as an array of objects.") from None
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 else [whole]
    if not isinstance(whole, list):
        raise DataError(f"{path} = {shown(whole)}: must be an array of objects. Write the file again.")
    for row, record in enumerate(whole):
        where = f"{path} row {row}"
        yield where, _as_record(where, record, "Write an array of objects.")


def _parse(text: bytes) -> Any:
    value = _DECODER.decode(text.decode("utf-8"))
    if b"\\u" in text:  # which half a character may hide behind, and UTF-8 does not hold
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number, object_pairs_hook=without_duplicates)


def _as_record(where: str, value: Any, remedy: str) -> Record | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow("not an object", f"{where} = {shown(value)}: must be a JSON object. {remedy}")


def _csv(path: Path) -> Iterator[tuple[str, Record | BadRow]]:
    """Every value is text: a reader that guessed types would make 42 of the answer 042."""
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if None in row or None in row.values():
                    told = f"{where}: has another number of cells than the header's {len(rows.fieldnames or ())}. Mend the row."
                    yield where, BadRow("another number of cells", told)
                else:
                    yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}:{rows.line_num}: not CSV ({error}). Write the file again, in UTF-8, texts in double quotes."
            ) from error


def _parquet(path: Path) -> Iterator[tuple[str, Record | BadRow]]:
    import pyarrow.parquet

    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for record in batch.to_pylist():
                yield f"{path} row {row}", record
                row += 1
    except (OSError, pyarrow.lib.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({str(error)[:200]}). Write the file again.") from error


def _of_directory(path: Path, place: Place) -> Iterator[tuple[str, Record | BadRow]]:
    """A saved data set, memory-mapped; or a directory of data files such as the hub's, streamed."""
    import datasets
    import pyarrow.lib

    is_saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    if is_saved and place.config:
        raise DataError(f"{path}:{place.config}: a saved data set has no configurations. Drop {place.config}/.")
    broken = (OSError, ValueError, RuntimeError, pyarrow.lib.ArrowException, datasets.exceptions.DatasetsError)
    try:
        if is_saved:
            opened = datasets.load_from_disk(str(path))
        else:
            opened = datasets.load_dataset(str(path), place.config, streaming=True)
    except broken as error:
        raise DataError(
            f"{path} = not a data set ({_first_line(error)}): a directory must come from "
            "datasets.Dataset.save_to_disk, or hold data files. Name one of its files, or DIRECTORY:CONFIGURATION/SPLIT."
        ) from error
    where, rows = _split_of(opened, path, place)
    row = 0
    try:
        for record in rows:
            yield f"{where} row {row}", record
            row += 1
    except broken as error:
        raise DataError(
            f"{where}: cannot be read from row {row} on ({_first_line(error)}). Write its files again."
        ) from error


def _split_of(opened: Any, path: Path, place: Place) -> tuple[str, Any]:
    """The rows of the split that is named, or of the only one, and words for their place."""
    import datasets

    if not isinstance(opened, datasets.DatasetDict | datasets.IterableDatasetDict):
        if place.split not in (None, str(opened.split)):
            raise DataError(
                f"{path}:{place.split}: a data set that was saved alone has no splits, and this one does not say that it is "
                f"{place.split}. Drop :{place.split}, or name the directory of that split."
            )
        return str(path), opened
    splits = list(opened)
    split = place.split or (splits[0] if len(splits) == 1 else None)
    if split not in splits:
        told = f"{path}:{split} = no such split" if split else f"{path} = several splits: one must be chosen"
        named = ", ".join(f"{path}:{f'{place.config}/' if place.config else ''}{one}" for one in splits)
        raise DataError(f"{told}. Name one of: {named}.")
    return f"{path}:{split}", opened[split]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
