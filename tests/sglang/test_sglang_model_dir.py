"""Directories of weights are checked before a server may die of them."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_distill.errors import CheckpointError
from megatron_distill.sglang.model_dir import require_same_tensors, tensor_names


def write(directory: Path, *names: str, file: str = "model.safetensors") -> Path:
    directory.mkdir(exist_ok=True)
    save_file({name: np.ones(3, np.float32) for name in names}, directory / file)
    return directory


def test_names_of_all_shards_are_read(tmp_path: Path) -> None:
    """A directory's tensors are those of all its files."""
    write(tmp_path, "a", "b", file="model-00001-of-00002.safetensors")
    write(tmp_path, "c", file="model-00002-of-00002.safetensors")
    assert tensor_names(tmp_path) == {"a", "b", "c"}


@pytest.mark.parametrize("names", [("a",), ("a", "b", "typo")], ids=["missing", "unknown"])
def test_other_tensors_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    """A missing or an unknown tensor is refused: the server would report success and keep its old values."""
    with pytest.raises(CheckpointError, match="'b'" if "b" not in names else "'typo'"):
        require_same_tensors(write(tmp_path, *names), {"a", "b"})


def test_tied_head_may_be_left_out(tmp_path: Path) -> None:
    """An output layer tied to the embeddings may be written or not."""
    require_same_tensors(write(tmp_path, "a"), {"a", "lm_head.weight"})


def test_empty_and_truncated_are_refused(tmp_path: Path) -> None:
    """A directory without weights, or with a file cut short, is refused by name."""
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        tensor_names(tmp_path)
    file = write(tmp_path, "a") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        tensor_names(tmp_path)
