"""Whole checkpoints on disk, both ways: bit-exact, atomic, and refused by name when damaged. No Megatron here."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_distill.cli import convert as command_line
from megatron_distill.convert import offline
from megatron_distill.convert.hf_files import HfDirectory
from megatron_distill.convert.inspection import inspect_checkpoint
from megatron_distill.convert.offline import hf_to_megatron, megatron_to_hf
from megatron_distill.convert.verify import compare_logits, compare_tensors
from megatron_distill.errors import CheckpointError
from tests.support import tiny_models


def _weights(hf_dir: Path) -> dict[str, torch.Tensor]:
    directory = HfDirectory(hf_dir)
    return {name: directory.read(name) for name in directory.tensors}


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _run(*argv: str) -> None:
    parser = argparse.ArgumentParser()
    command_line.configure(parser)
    command_line.run(parser.parse_args(argv))


@pytest.fixture(scope="module")
def megatron_dir(hf_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted Qwen3 in several files. Read only."""
    target = tmp_path_factory.mktemp("megatron") / "qwen3"
    hf_to_megatron(hf_dirs["qwen3"], target, tp=2, max_file_bytes=40_000)
    return target


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_round_trip_is_bit_exact(hf_dirs: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Every family, many small files on both sides: the same names and bits, and the source untouched."""
    before = _bytes_of(hf_dirs[family])
    hf_to_megatron(hf_dirs[family], tmp_path / "megatron", max_file_bytes=30_000)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", max_file_bytes=30_000)
    original, back = _weights(hf_dirs[family]), _weights(tmp_path / "hf")
    assert original.keys() == back.keys()
    assert all(torch.equal(original[name], back[name]) for name in original)
    assert _bytes_of(hf_dirs[family]) == before
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1


def test_bf16_stays_bf16_and_companions_travel(tmp_path: Path) -> None:
    """The dtype of the file is kept and recorded, and tokenizer, chat template and generation config come out again."""
    tiny_models.build_hf_model("qwen3").bfloat16().save_pretrained(tmp_path / "hf")
    companions = {"tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}"}
    for name, text in companions.items():
        (tmp_path / "hf" / name).write_text(text)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert {tensor.dtype for tensor in _weights(tmp_path / "back").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all((tmp_path / "back" / name).read_text() == text for name, text in companions.items())
    assert (tmp_path / "back" / "generation_config.json").exists()


def test_transformers_loads_what_comes_out(hf_dirs: dict[str, Path], megatron_dir: Path, tmp_path: Path) -> None:
    """from_pretrained finds every key of the directory and no other, and computes the same logits to the bit."""
    import transformers

    megatron_to_hf(megatron_dir, tmp_path / "hf", max_file_bytes=30_000)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = torch.load(tiny_models.logits_file(hf_dirs["qwen3"]))
    with torch.no_grad():
        assert torch.equal(model(expected["tokens"]).logits, expected["logits"])


def test_the_checkpoint_is_pytorchs_own_format(megatron_dir: Path) -> None:
    """torch's own reader finds every chunk where the table of contents says, stacked by layer."""
    metadata = FileSystemReader(megatron_dir / "release").read_metadata()
    stacked = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    assert tuple(stacked.size) == (2, 48, 96)
    assert [tuple(chunk.offsets) for chunk in stacked.chunks] == [(0, 0, 0), (1, 0, 0)]
    for index, storage in metadata.storage_data.items():
        with (megatron_dir / "release" / storage.relative_path).open("rb") as stream:
            stream.seek(storage.offset)
            assert len(stream.read(storage.length)) == storage.length, index


@pytest.mark.parametrize(
    ("layout", "named"),
    [({"tp": 3}, "tp = 3 does not divide 4 attention heads"), ({"pp": 3}, "pp = 3 does not divide 2 layers"),
     ({"ep": 2}, "ep = 2 does not divide 0 experts")],
)  # fmt: skip
def test_a_layout_that_does_not_fit_is_refused(
    hf_dirs: dict[str, Path], tmp_path: Path, layout: dict[str, int], named: str
) -> None:
    """Before anything is written."""
    with pytest.raises(CheckpointError, match=named):
        hf_to_megatron(hf_dirs["qwen3"], tmp_path / "megatron", **layout)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_weight_file_is_named_and_nothing_is_left(megatron_dir: Path, tmp_path: Path) -> None:
    """Truncated and missing files of a Megatron checkpoint; the target does not come into being."""
    shutil.copytree(megatron_dir, tmp_path / "megatron")
    file = tmp_path / "megatron" / "release" / "__0_1.distcp"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"__0_1\.distcp: .* cannot be read"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"__0_1\.distcp: .* cannot be read"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["megatron"]


def test_a_checkpoint_of_another_model_is_refused(megatron_dir: Path, hf_dirs: dict[str, Path], tmp_path: Path) -> None:
    """A config of the wrong model: missing tensors, unknown tensors and wrong shapes are named, nothing is dropped."""
    with pytest.raises(CheckpointError, match=r"q_layernorm\.weight is not understood and would be dropped"):
        megatron_to_hf(megatron_dir, tmp_path / "hf", hf_dir=hf_dirs["llama3"])
    with pytest.raises(CheckpointError, match=r"linear_qkv\.bias \(for|linear_qkv\.bias is missing"):
        megatron_to_hf(megatron_dir, tmp_path / "hf", hf_dir=hf_dirs["qwen2"])


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """Both inspect and convert say what they looked for."""
    with pytest.raises(CheckpointError, match="not a Megatron torch_dist checkpoint"):
        megatron_to_hf(tmp_path, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="neither a Hugging Face directory"):
        inspect_checkpoint(tmp_path)


@pytest.mark.slow
def test_a_kill_leaves_no_half_written_target(hf_dirs: dict[str, Path], tmp_path: Path) -> None:
    """SIGKILL in the middle of a conversion: no target, and the same command then succeeds and tidies up."""
    source, target = hf_dirs["qwen3"], tmp_path / "megatron"
    script = f"""
import os, signal
from megatron_distill.convert import offline
write = offline.MegatronCheckpointWriter.write
def write_and_die(self, rule, tensor):
    write(self, rule, tensor)
    if rule.layer == 1:
        os.kill(os.getpid(), signal.SIGKILL)
offline.MegatronCheckpointWriter.write = write_and_die
offline.hf_to_megatron({str(source)!r}, {str(target)!r})
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    assert (tmp_path / ".megatron.partial").exists()
    hf_to_megatron(source, target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["megatron"]


def test_the_disk_is_checked_before_writing(
    hf_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The need is asked for in full, up front, and a refusal leaves nothing behind."""

    def no_space(target: Path, num_bytes: int) -> None:
        assert num_bytes > HfDirectory(hf_dirs["qwen3"]).num_bytes
        raise CheckpointError("no space")

    monkeypatch.setattr(offline, "check_free_space", no_space)
    with pytest.raises(CheckpointError, match="no space"):
        hf_to_megatron(hf_dirs["qwen3"], tmp_path / "megatron")
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_what_both_kinds_are(megatron_dir: Path, hf_dirs: dict[str, Path]) -> None:
    """Architecture, size, completeness and Megatron's flags, the same from either side."""
    hugging_face, megatron = str(inspect_checkpoint(hf_dirs["qwen3"])), str(inspect_checkpoint(megatron_dir))
    for text in (hugging_face, megatron):
        assert "qwen3" in text
        assert "complete: every tensor" in text
        assert "--qk-layernorm" in text
    assert "Hugging Face, 1 file" in hugging_face
    assert "torch_dist, release, weights only" in megatron


def test_inspect_reports_a_missing_tensor_instead_of_failing(hf_dirs: dict[str, Path], tmp_path: Path) -> None:
    """A broken directory can still be looked at."""
    shutil.copytree(hf_dirs["qwen3"], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file({name: tensor.clone() for name, tensor in weights.items()}, tmp_path / "model" / "model.safetensors")
    assert "missing: model.norm.weight" in str(inspect_checkpoint(tmp_path / "model"))


def test_verify_finds_one_changed_element(megatron_dir: Path, hf_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Equal across formats; one element changed is found, named and measured; dtype alone does not count."""
    assert compare_tensors(hf_dirs["qwen3"], megatron_dir).same
    model = tiny_models.build_hf_model("qwen3")
    with torch.no_grad():
        model.model.norm.weight[7] += 0.25
    model.save_pretrained(tmp_path / "changed")
    comparison = compare_tensors(megatron_dir, tmp_path / "changed")
    assert comparison.differing == [("model.norm.weight", 0.25)]
    with pytest.raises(CheckpointError, match="1 tensors differ"):
        _run("verify", str(megatron_dir), str(tmp_path / "changed"))
    with pytest.raises(CheckpointError, match="different architectures"):
        compare_tensors(megatron_dir, hf_dirs["qwen2"])


def test_verify_compares_logits_on_a_text(
    megatron_dir: Path, hf_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converted checkpoint computes the same to the bit; without a tokenizer the message says what to do."""
    with pytest.raises(CheckpointError, match="no tokenizer that makes tokens"):
        compare_logits(hf_dirs["qwen3"], megatron_dir, "1 + 1")
    monkeypatch.setattr("megatron_distill.convert.verify._tokenize", lambda text, directory: torch.tensor([[3, 5, 7]]))
    assert compare_logits(hf_dirs["qwen3"], megatron_dir, "1 + 1") == 0.0


def test_scripts_are_called_by_their_own_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ``--help`` shows can be typed."""
    monkeypatch.setattr("sys.argv", ["tools/convert_hf_to_megatron.py", "--help"])
    with pytest.raises(SystemExit):
        command_line.main("hf-to-megatron")
    assert capsys.readouterr().out.startswith("usage: convert_hf_to_megatron.py [-h] [--tp TP]")


def test_the_command_line_converts_both_ways(
    hf_dirs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of the documentation; the flags to load with are left in a file."""
    _run("hf-to-megatron", str(hf_dirs["qwen2-tied"]), str(tmp_path / "in two"), "--tp", "2", "--pp", "2")
    assert f"--load '{tmp_path}/in two' $(cat '{tmp_path}/in two/megatron_arguments.txt')" in capsys.readouterr().out
    (tmp_path / "in two").rename(tmp_path / "megatron")
    _run("megatron-to-hf", str(tmp_path / "megatron"), str(tmp_path / "hf"))
    _run("verify", str(hf_dirs["qwen2-tied"]), str(tmp_path / "hf"))
    _run("inspect", str(tmp_path / "megatron"))
    output = capsys.readouterr().out
    assert "tensors are equal" in output
    flags = (tmp_path / "megatron" / "megatron_arguments.txt").read_text().split()
    assert "--add-qkv-bias" in flags
    assert "--untie-embeddings-and-output-weights" not in flags
    assert command_line.main("megatron-to-hf", [str(tmp_path / "hf"), str(tmp_path / "x")]) == 1
