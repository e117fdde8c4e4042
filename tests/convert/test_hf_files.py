"""Hugging Face directories: damaged ones are refused by name, new ones appear whole or not at all."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_distill.convert.hf_files import (
    HfDirectory,
    HfDirectoryWriter,
    atomic_directory,
    check_free_space,
    copy_companions,
)
from megatron_distill.errors import CheckpointError
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.runs.marks import MARK


@pytest.fixture
def hf_dir(hf_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(hf_dirs["qwen3"], tmp_path / "model")
    return tmp_path / "model"


def _edit(hf_dir: Path, **tensors: torch.Tensor | None) -> None:
    file = hf_dir / "model.safetensors"
    content = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for key, tensor in tensors.items():
        name = key.replace("__", ".")
        if tensor is None:
            del content[name]
        else:
            content[name] = tensor
    save_file(content, file)


def _check(hf_dir: Path) -> None:
    HfDirectory(hf_dir).check(HfConfig.from_dir(hf_dir))


def test_a_sound_directory_passes(hf_dir: Path) -> None:
    """What transformers wrote is accepted as it is."""
    _check(hf_dir)


def test_a_truncated_file_is_refused(hf_dir: Path) -> None:
    """The file is named, and nothing is read from it."""
    file = hf_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read.*truncated or corrupt"):
        HfDirectory(hf_dir)


def test_a_corrupt_header_is_refused(hf_dir: Path) -> None:
    """Garbage where the header should be is no reason for a traceback."""
    file = hf_dir / "model.safetensors"
    file.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"?" * 16 + file.read_bytes()[24:])
    with pytest.raises(CheckpointError, match="cannot be read"):
        HfDirectory(hf_dir)


def test_a_missing_tensor_is_named(hf_dir: Path) -> None:
    """Nothing is left at its random initialisation."""
    _edit(hf_dir, model__norm__weight=None)
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight"):
        _check(hf_dir)


def test_an_extra_tensor_is_named(hf_dir: Path) -> None:
    """Nothing that we do not understand is dropped."""
    _edit(hf_dir, model__layers__0__mlp__shortcut__weight=torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"would be dropped: model\.layers\.0\.mlp\.shortcut\.weight"):
        _check(hf_dir)


def test_a_wrong_shape_is_named_with_both_shapes(hf_dir: Path) -> None:
    """The file and config.json are both quoted."""
    _edit(hf_dir, model__norm__weight=torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[3\], config\.json implies \[48\]"):
        _check(hf_dir)


def test_quantised_weights_are_refused(hf_dir: Path) -> None:
    """Integers are not trainable, even where config.json forgot to say so."""
    _edit(hf_dir, model__norm__weight=torch.zeros(48, dtype=torch.int8))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype I8"):
        HfDirectory(hf_dir)


def test_a_missing_file_of_the_index_is_named(hf_dir: Path) -> None:
    """A download that stopped half-way."""
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"missing, first model-00001-of-00002\.safetensors"):
        HfDirectory(hf_dir)


def test_pickled_weights_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """A .bin is a pickle: it is not opened."""
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        HfDirectory(tmp_path)


def test_a_tied_copy_of_the_embedding_may_be_there_but_only_if_equal(hf_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Some files store lm_head.weight beside a tied embedding: a true copy says nothing new, any other would be lost."""
    shutil.copytree(hf_dirs["qwen3-tied"], tmp_path / "model")
    embedding = HfDirectory(tmp_path / "model").read("model.embed_tokens.weight").clone()
    _edit(tmp_path / "model", lm_head__weight=embedding.clone())
    _check(tmp_path / "model")
    _edit(tmp_path / "model", lm_head__weight=embedding + 1)
    with pytest.raises(CheckpointError, match=r"would be dropped: lm_head\.weight"):
        _check(tmp_path / "model")


def test_the_writer_writes_what_safetensors_reads_in_any_order(tmp_path: Path) -> None:
    """Shards, index and bytes are as safetensors has them, whatever the order of writing and the dtype."""
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2),
        "empty": torch.empty(0, 3),
    }
    planned = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with HfDirectoryWriter(tmp_path, planned, max_file_bytes=75) as writer:
        for name in ("c", "empty", "a", "b"):
            writer.write(name, tensors[name])
    directory = HfDirectory(tmp_path)
    assert directory.num_files == 2
    assert directory.tensors.keys() == tensors.keys()
    assert all(torch.equal(directory.read(name), tensor) for name, tensor in tensors.items())
    loaded = {name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def _write_one(folder: Path, planned: dict[str, tuple[tuple[int, ...], torch.dtype]], name: str) -> None:
    with HfDirectoryWriter(folder, planned, 1 << 20) as writer:
        writer.write(name, torch.zeros(2))


def test_the_writer_refuses_to_forget_or_repeat_a_tensor(tmp_path: Path) -> None:
    """A directory with a hole, or a tensor of another dtype than its header says, cannot come into being."""
    planned = {"a": ((2,), torch.float32), "b": ((2,), torch.float32)}
    with pytest.raises(CheckpointError, match="never written, first b"):
        _write_one(tmp_path, planned, "a")
    with HfDirectoryWriter(tmp_path, {"a": planned["a"]}, 1 << 20) as writer:
        writer.write("a", torch.zeros(2))
        for name in ("a", "b"):
            with pytest.raises(CheckpointError, match="planned once"):
                writer.write(name, torch.zeros(2))


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """An error leaves nothing behind; an existing directory is replaced only on request, and only by a complete one."""
    target = tmp_path / "model"
    with pytest.raises(FileNotFoundError), atomic_directory(target) as partial:
        (partial / "half").rename(partial / "no" / "such" / "folder")
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(target) as partial:
        (partial / "first").touch()
        assert not target.exists()
    with pytest.raises(CheckpointError, match="exists and is not empty"), atomic_directory(target):
        pass
    with pytest.raises(RuntimeError), atomic_directory(target, overwrite=True):
        raise RuntimeError
    assert (target / "first").exists()
    with atomic_directory(target, overwrite=True) as partial:
        (partial / "second").touch()
    assert sorted(file.name for file in target.iterdir()) == [MARK, "second"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_too_little_space_is_refused_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is needed and what is free."""
    usage = namedtuple("usage", "total used free")(10 << 30, 9 << 30, 1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_free_space(tmp_path / "new", 1 << 29)
    with pytest.raises(CheckpointError, match=r"needs 2\.00 GiB, but .* has 1\.00 GiB free"):
        check_free_space(tmp_path / "new", 2 << 30)
    usage = namedtuple("usage", "total used free")(10 << 20, 10 << 20, 1 << 19)
    with pytest.raises(CheckpointError, match=r"needs 2\.0 MiB, but .* has 0\.5 MiB free"):
        check_free_space(tmp_path / "new", 2 << 20)


def test_companions_travel_and_weights_do_not(tmp_path: Path) -> None:
    """Tokenizer, chat templates and licence are carried along; weights in any format, indexes and git files are not."""
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    kept = ["tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE", "tokenizer.model"]
    for name in [*kept, "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json",
                 ".gitattributes", "additional_chat_templates/tool.jinja"]:  # fmt: skip
        (source / name).write_text(name)
    copy_companions(source, target)
    copied = {str(file.relative_to(target)) for file in target.rglob("*") if file.is_file()}
    assert copied == {*kept, "additional_chat_templates/tool.jinja"}
