"""Read a ``torch_dist`` checkpoint's ``.metadata``, which is a pickle, without letting it run anything.

A pickle may name any function of any module and have it called. The ones that PyTorch's distributed checkpoints write name a
handful of dataclasses; an unpickler that knows these and nothing else is as safe as a parser, and says of a damaged file
that it is damaged. It is pickle's own in Python: the one in C lets a single flipped bit ask for tens of gigabytes (the index of
a memo, the length of a bytearray), and takes them before it looks whether the file goes on.
"""

import io
import math
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_distill.config.json_files import require_regular
from megatron_distill.errors import CheckpointError

_ALLOWED = {
    "collections": {"OrderedDict"},
    "torch": {"Size"},  # and its dtypes
    "torch.serialization": {"_get_layout"},  # a look-up by name
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class _Forbidden(pickle.UnpicklingError):
    pass


# What a pickle of such dataclasses is made of. (Protocol 5 adds out-of-band buffers, older ones calls by name.)
_OPCODES = (
    "PROTO FRAME STOP MARK MEMOIZE BINPUT BINGET LONG_BINPUT LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 "
    "BINFLOAT SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND "
    "APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL NEWOBJ REDUCE BUILD"
)


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if "." in name or not (is_dtype or name in _ALLOWED.get(module, ())):
            raise _Forbidden(f"{module}.{name}")
        return super().find_class(module, name)


def read_metadata(directory: Path) -> Metadata:
    """The table of contents of one iteration's directory.

    Raises:
        CheckpointError: it is missing or damaged, or names what no checkpoint of PyTorch names.
    """
    path = directory / ".metadata"
    try:
        require_regular(path)
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"holds a {type(metadata).__name__}")
        for entry in (metadata.storage_data or {}).values():
            if not (isinstance(entry.relative_path, str) and entry.offset >= 0 and entry.length >= 0):
                raise ValueError("a chunk without a place")
        _check_sums(metadata)
    except _Forbidden as error:
        raise CheckpointError(
            f"{path}: names {error}, which no checkpoint needs. Such a file can run commands when it is opened by other "
            "programs. It was not run. Do not use this checkpoint."
        ) from error
    except Exception as error:  # flipped bits make a pickle raise anything
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {str(error)[:200]}). The checkpoint is incomplete or corrupt. "
            "Use an older iteration, or save it again."
        ) from error
    return metadata


def _check_sums(metadata: Metadata) -> None:
    """Refuse what contradicts itself: chunks that do not fill their tensor, or that the files hold no bytes for.

    Raises:
        ValueError: says which tensor.
    """
    places = {(index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()}
    named = Counter(name for name, _ in places)
    for name, entry in metadata.state_dict_metadata.items():
        chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else []
        if named.pop(name, 0) != (len(chunks) or 1):
            raise ValueError(f"{name} has not one place a chunk")
        if not isinstance(entry, TensorStorageMetadata):
            continue
        for chunk in chunks:
            within = len(chunk.offsets) == len(chunk.sizes) == len(entry.size) and all(
                start >= 0 and width > 0 and start + width <= size
                for start, width, size in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            )
            place = places.get((name, tuple(chunk.offsets)))
            if not within or place is None or place.length < math.prod(chunk.sizes) * entry.properties.dtype.itemsize:
                raise ValueError(f"{name} has a chunk that does not fit it")
        distinct = {tuple(chunk.offsets): math.prod(chunk.sizes) for chunk in chunks}
        if len(distinct) != len(chunks) or sum(distinct.values()) != math.prod(entry.size):
            raise ValueError(f"{name} is not filled by its chunks")
    if named:
        raise ValueError(f"{next(iter(named))} has a place and no entry")
