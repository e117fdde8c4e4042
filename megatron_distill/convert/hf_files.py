"""A Hugging Face model directory: sharded safetensors in, an atomic directory out.

``HfDirectory`` reads (slices of) tensors by name from memory-mapped files. ``HfDirectoryWriter`` plans every file's header
before the first byte, then puts each tensor straight into its place: memory holds one tensor, the space needed is known
(and checked) up front, and a directory with a tensor missing cannot come into being. The work happens in
``.NAME.partial`` beside the target and is renamed at the end, so a kill leaves either the old state or the new one.

The safetensors format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON
header ``{name: {dtype, shape, data_offsets}}``, then the tensors' bytes.

Names to know: ``HfDirectory``, ``HfDirectoryWriter``, ``atomic_directory``, ``check_free_space``, ``copy_companions``.
"""

import errno
import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_distill.config.json_files import json_of
from megatron_distill.errors import CheckpointError, DistillError
from megatron_distill.models.families import hf_shapes
from megatron_distill.models.hf_config import HfConfig, eos_ids
from megatron_distill.runs import marks

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GIB = 1 << 30
DEFAULT_FILE_BYTES = 4 * GIB

# safetensors' names of dtypes that a checkpoint to be trained may hold.
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}

# Weights in other formats, version control and caches: everything else in a model directory is carried along.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp"}
_NOT_COPIED = {"config.json", marks.MARK}
_CHAT_TEMPLATES = "additional_chat_templates"

# Buffers that old Llama checkpoints carry; they follow from config.json.
_DERIVED_SUFFIX = ".self_attn.rotary_emb.inv_freq"


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says about one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HfDirectory:
    """Read access to the weights of one Hugging Face directory; nothing is loaded until ``read``."""

    def __init__(self, path: str | Path):
        """Open every safetensors file's header.

        Raises:
            CheckpointError: no safetensors, a file that is missing, truncated or corrupt, or a dtype that is not a
                plain float (a quantised model).
        """
        self.path = Path(path)
        self._files: dict[Path, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._weight_files():
            self._open(file)

    def _weight_files(self) -> list[Path]:
        index = self.path / INDEX
        if index.exists():
            try:
                names = sorted(set(json_of(index)["weight_map"].values()))
                if not all(isinstance(name, str) and Path(name).name == name for name in names):
                    raise ValueError("a weight file that is none beside it")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: not a safetensors index ({error!r}). Download it again.") from error
            files = [self.path / name for name in names]
            missing = [file.name for file in files if not file.exists()]
            if missing:
                raise CheckpointError(
                    f"{self.path}: {len(missing)} of {len(files)} weight files listed in {INDEX} are missing, first "
                    f"{missing[0]}. Download them again."
                )
            return files
        if (self.path / WEIGHTS).exists():
            return [self.path / WEIGHTS]
        others = sorted(file.name for file in self.path.glob("*.bin"))
        hint = f" ({others[0]} is a pickle: load it with transformers and save_pretrained it.)" if others else ""
        raise CheckpointError(f"{self.path}: neither {WEIGHTS} nor {INDEX}: no weights to read here.{hint}")

    def _open(self, file: Path) -> None:
        try:
            if not file.is_file():
                raise OSError("is no regular file")
            handle = safe_open(file, framework="pt")
            entries = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: cannot be read as safetensors ({error}). It is truncated or corrupt. Download it again."
            ) from error
        self._files[file] = handle
        for name, entry in entries:
            if entry.get_dtype() not in _DTYPES:
                raise CheckpointError(
                    f"{file}: {name} has dtype {entry.get_dtype()}: must be one of {', '.join(_DTYPES)}. Quantised "
                    "weights are not trainable weights. Convert the unquantised model."
                )
            self.tensors[name] = TensorInfo(file, tuple(entry.get_shape()), _DTYPES[entry.get_dtype()])

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements ``start:stop`` along ``dim`` of tensor ``name``, in the file's dtype."""
        info = self.tensors[name]
        handle = self._files[info.file]
        if start == 0 and (stop is None or stop == info.shape[dim]):
            return handle.get_tensor(name)
        return handle.get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def num_files(self) -> int:
        """How many weight files it is sharded into."""
        return len(self._files)

    def check(self, config: HfConfig) -> None:
        """Prove that the files hold exactly the tensors of ``config``, each in its shape.

        Raises:
            CheckpointError: naming missing tensors, tensors we would drop, and tensors of another shape, all at once.
        """
        expected = hf_shapes(config)
        extra = {name for name in self.tensors.keys() - expected.keys() if not name.endswith(_DERIVED_SUFFIX)}
        if config.tie_word_embeddings and "lm_head.weight" in extra and self._is_tied_copy("lm_head.weight"):
            extra.discard("lm_head.weight")
        wrong = [
            f"{name} has shape {list(self.tensors[name].shape)}, config.json implies {list(shape)}"
            for name, shape in expected.items()
            if name in self.tensors and self.tensors[name].shape != shape
        ]
        problems = _listed("missing", sorted(expected.keys() - self.tensors.keys()))
        problems += _listed("not understood, would be dropped", sorted(extra))
        problems += _listed("wrong shape", wrong)
        if problems:
            raise CheckpointError(
                f"{self.path}: the weights are not those of the {config.model_type} model that config.json describes:"
                + "".join(problems)
            )

    def check_finite(self) -> None:
        """Read every tensor and prove that it holds numbers.

        Raises:
            CheckpointError: naming the first tensor with a NaN or an infinity.
        """
        for name in self.tensors:
            if not bool(torch.isfinite(self.read(name)).all()):
                raise CheckpointError(
                    f"{self.path}: {name} holds NaN or infinite values. No loss, response or gradient of such a model is a "
                    "number. Take the checkpoint before it diverged, or download it again."
                )

    def _is_tied_copy(self, name: str) -> bool:
        embedding = "model.embed_tokens.weight"
        return embedding in self.tensors and torch.equal(self.read(name), self.read(embedding))


def _listed(what: str, items: list[str], shown: int = 5) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return [f"\n  - {what}: {', '.join(items[:shown])}{more}"]


def check_free_space(target: Path, num_bytes: int) -> None:
    """Refuse to start a write that the disk cannot hold.

    Raises:
        CheckpointError: with what is needed and what is free.
    """
    folder = target.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CheckpointError(
            f"{target}: needs {_size(num_bytes)}, but {folder} has {_size(free)} free. A half-written "
            "model is worse than none. Free some space, or write elsewhere."
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):.1f} MiB"


@contextmanager
def atomic_directory(
    target: str | Path, *, overwrite: bool = False, sources: Iterable[str | Path] = ()
) -> Iterator[Path]:
    """Yield ``.NAME.partial`` beside ``target``, and rename it to ``target`` if the block succeeds.

    A block that raises removes the partial directory; one that is killed leaves it, and the next attempt starts it anew.
    With ``overwrite`` an existing target stays whole until the new one is complete. It may be replaced only while it holds
    nothing but what the project wrote there (see ``runs.marks``).

    Args:
        target: directory to create.
        overwrite: replace an existing one.
        sources: what is read meanwhile, which must not lie in the target.

    Raises:
        CheckpointError: the target exists and ``overwrite`` is False, or it is not ours to replace, or is part of a source; or
            the disk filled up.
    """
    target = Path(target)
    _check_target(target, overwrite, sources)
    partial = target.with_name(f".{target.name}.partial")
    previous = target.with_name(f".{target.name}.previous")
    try:
        if previous.exists() and not target.exists():  # killed between the two renames at the end
            marks.check_replaceable_leftover(previous, "leftover")
            previous.rename(target)
        exists = target.exists() and any(target.iterdir())
        for old in (partial, previous):  # what a kill left
            marks.check_replaceable_leftover(old, "leftover")
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / marks.MARK).write_text('{"kind": "model", "files": []}\n', encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{target}: {error.strerror}. Name a directory that can be written.") from error
    try:
        yield partial
        marks.mark_model(partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"{target}: the disk filled up while it was written. Nothing was kept. Free some space, and start again."
            ) from error
        raise
    if not exists:
        if target.exists():
            target.rmdir()  # an empty directory made ahead by the user
        partial.rename(target)
        return
    target.rename(previous)
    partial.rename(target)
    shutil.rmtree(previous)


def _check_target(target: Path, overwrite: bool, sources: Iterable[str | Path]) -> None:
    where = target.resolve()
    if not where.name:
        raise CheckpointError(f"{target}: is no name for a directory. Give a new path.")
    for source in map(Path, sources):
        if where == source.resolve() or where in source.resolve().parents:
            raise CheckpointError(
                f"{target}: is or holds {source}, which is read. A model is never written over its source. Give a "
                "path outside of it."
            )
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"{target}: exists and is not empty. A model is never written over another by accident. Give a new path, "
            "or overwrite it: --overwrite."
        )
    try:
        marks.check_replaceable(target, "target")
    except DistillError as error:
        raise CheckpointError(str(error)) from error


def copy_companions(source: str | Path, target: Path) -> None:
    """Copy what makes weights a model: tokenizer, chat templates, generation config, licence. Not ``config.json``."""
    for file in sorted(Path(source).iterdir()):
        is_weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not is_weights and not file.name.startswith(".git") and file.name not in _NOT_COPIED:
            shutil.copyfile(file, target / file.name)  # follows the links of a Hugging Face cache
    templates = Path(source) / _CHAT_TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, target / _CHAT_TEMPLATES)


def name_end_tokens(target: Path, token_ids: Sequence[int]) -> None:
    """Add to what ends a response by ``generation_config.json``: whoever serves the model then stops where its training did."""
    if not token_ids:
        return
    file = target / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    ends = eos_ids(generation)
    if set(token_ids) - set(ends):
        generation["eos_token_id"] = list(dict.fromkeys((*ends, *token_ids)))
        file.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def write_config(config: HfConfig, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` as it was read, with the dtype of the weights beside it if given."""
    raw = dict(config.raw)
    if dtype is not None:
        # transformers 4 wrote torch_dtype, transformers 5 writes dtype and reads both: keep what readers of this file know.
        key = "torch_dtype" if "torch_dtype" in raw else "dtype"
        raw[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


class HfDirectoryWriter:
    """Write the safetensors files of one directory, tensor by tensor, in any order.

    Use as a context manager; leaving the block without an error proves that every planned tensor was written.
    """

    def __init__(
        self, directory: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_file_bytes: int
    ):
        """Lay out the files.

        Args:
            directory: an existing directory, usually from ``atomic_directory``.
            tensors: name -> (shape, dtype) of everything that will be written, in the order of the files.
            max_file_bytes: a file holds at most this many bytes of tensors (or one larger tensor).
        """
        self._directory = directory
        self._expected = dict(tensors)
        self._file_of: dict[str, tuple[int, int]] = {}  # name -> (file number, offset of its bytes)
        self._written: set[str] = set()
        self._files: list[Any] = []
        self._names: list[str] = []
        self.num_bytes = 0
        self._plan(max_file_bytes)

    def _plan(self, max_file_bytes: int) -> None:
        groups: list[dict[str, dict[str, Any]]] = [{}]
        offset = 0
        for name, (shape, dtype) in self._expected.items():
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            if groups[-1] and offset + num_bytes > max_file_bytes:
                groups.append({})
                offset = 0
            groups[-1][name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + num_bytes],
            }
            offset += num_bytes
            self.num_bytes += num_bytes
        self._headers = []
        for number, entries in enumerate(groups):
            header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
            header += b" " * (-len(header) % 8)  # the format asks for data aligned to 8 bytes
            self._headers.append(struct.pack("<Q", len(header)) + header)
            start = len(self._headers[-1])
            self._file_of |= {name: (number, start + entry["data_offsets"][0]) for name, entry in entries.items()}
        total = len(groups)
        self._names = (
            [WEIGHTS] if total == 1 else [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
        )

    def __enter__(self) -> Self:
        for name, header in zip(self._names, self._headers, strict=True):
            file = open(self._directory / name, "wb")
            self._files.append(file)
            file.write(header)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place.

        Raises:
            CheckpointError: a tensor that was not planned, was written before, or has another shape or dtype.
        """
        shape, dtype = self._expected.get(name, ((), None))
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or name in self._written:
            raise CheckpointError(
                f"{self._directory}: {name} {list(tensor.shape)} {tensor.dtype}: planned once as {list(shape)} {dtype}. "
                "The table of names and the model disagree. Nothing was written."
            )
        number, offset = self._file_of[name]
        file = self._files[number]
        file.seek(offset)
        file.write(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
        self._written.add(name)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files:
            file.close()
        if kind is not None:
            return
        missing = sorted(self._expected.keys() - self._written)
        if missing:
            raise CheckpointError(
                f"{self._directory}: {len(missing)} tensors were never written, first {missing[0]}. The model does not "
                "hold all that its config says. Nothing was kept."
            )
        if len(self._names) > 1:
            weight_map = {name: self._names[number] for name, (number, _) in self._file_of.items()}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
