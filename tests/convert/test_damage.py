"""Damaged, planted and foreign files: named before anything is built on them, run by nobody, deleted by nobody."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_distill.cli.main import main
from megatron_distill.convert.damage import damage_of
from megatron_distill.convert.hf_files import HfDirectory, atomic_directory
from megatron_distill.convert.inspection import inspect_checkpoint
from megatron_distill.convert.offline import hf_to_megatron, megatron_to_hf
from megatron_distill.errors import CheckpointError
from megatron_distill.launch.resume import directory_of, requeued_step, whole_checkpoint
from megatron_distill.runs import marks
from megatron_distill.runs.run_folder import RunFolder


@pytest.fixture
def iteration(hf_dirs: dict[str, Path], tmp_path: Path) -> Path:
    hf_to_megatron(hf_dirs["qwen3"], tmp_path / "megatron", max_file_bytes=60_000)
    return tmp_path / "megatron" / "release"


def test_every_flipped_bit_of_the_data_is_found(iteration: Path) -> None:
    """A whole checkpoint is whole; one bit anywhere in a tensor's bytes, one byte less, a file less, zeros: named by file."""
    assert damage_of(iteration) == ""
    file = iteration / "__0_1.distcp"
    whole = file.read_bytes()
    for place in range(5000, len(whole), len(whole) // 7):
        # Padding between an archive's members, which is in no checksum, does no harm: zeros or the letter Z.
        if whole[place] in (0, ord("Z")):
            continue
        damaged = bytearray(whole)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        assert "__0_1.distcp" in damage_of(iteration), place
    file.write_bytes(bytes(len(whole)))
    assert "are damaged" in damage_of(iteration)
    file.write_bytes(whole[:-1])
    assert f"has {len(whole) - 1} bytes, must have {len(whole)}" in damage_of(iteration)
    file.unlink()
    assert "is missing" in damage_of(iteration)


class Planted:
    """A pickle of it makes a folder when it is opened without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("open_it", [inspect_checkpoint, lambda path: damage_of(path / "release")])
def test_a_planted_command_is_not_run(open_it, iteration: Path, tmp_path: Path) -> None:
    """``.metadata`` that names a function of another module is refused, whoever opens it."""
    (iteration / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    try:
        told = str(open_it(iteration.parent))
    except CheckpointError as error:
        told = str(error)
    assert "mkdir, which no checkpoint needs" in told
    assert not (tmp_path / "ran").exists()


_FLIPS = """
import resource, sys
from pathlib import Path
from megatron_distill.convert.damage import damage_of
from megatron_distill.convert.metadata_pickle import read_metadata
from megatron_distill.errors import CheckpointError

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
directory = Path(sys.argv[1])
file, right = directory / ".metadata", read_metadata(directory)
whole = file.read_bytes()
for place in range(0, len(whole), 59):
    for bit in (1 << place % 8, 128):
        damaged = bytearray(whole)
        damaged[place] ^= bit
        file.write_bytes(damaged)
        if damage_of(directory):
            continue
        found = read_metadata(directory)
        if found.state_dict_metadata.keys() != right.state_dict_metadata.keys():
            continue  # a name of a tensor: Megatron will not find what it looks for
        for name, entry in right.state_dict_metadata.items():
            assert getattr(found.state_dict_metadata[name], "size", None) == getattr(entry, "size", None), (place, name)
        assert found.storage_data == right.storage_data, place
"""


@pytest.mark.slow
def test_any_flipped_bit_in_the_table_of_contents_is_one_message(iteration: Path) -> None:
    """Found as damage, or without consequence for any shape or place; never a crash, and in bounded memory.

    pickle's unpickler in C takes tens of gigabytes for a memo whose index was flipped.
    """
    subprocess.run([sys.executable, "-c", _FLIPS, str(iteration)], check=True)


@pytest.mark.parametrize("garbage", [b"", b"\x80\x04", pickle.dumps([1]), pickle.dumps({"a": 1}), b"not a pickle"])
def test_garbage_for_a_table_of_contents_is_one_message(garbage: bytes, iteration: Path) -> None:
    """Whatever else a file of that name may hold."""
    (iteration / ".metadata").write_bytes(garbage)
    assert "cannot be read" in damage_of(iteration)


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "__0_0.distcp"])
def test_a_pipe_is_not_waited_for(name: str, iteration: Path) -> None:
    """Nobody writes to it: it is named instead."""
    (iteration / name).unlink()
    os.mkfifo(iteration / name)
    assert name in damage_of(iteration)


def test_inspect_fails_where_something_is_wrong(iteration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 means usable: a zeroed data file is found, although the table of contents is whole."""
    assert main(["convert", "inspect", str(iteration.parent)]) == 0
    file = iteration / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    assert main(["convert", "inspect", str(iteration.parent)]) == 1
    assert "__0_0.distcp" in capsys.readouterr().out


def test_weights_that_are_no_numbers_are_named(hf_dirs: dict[str, Path], tmp_path: Path) -> None:
    """One NaN in one tensor."""
    shutil.copytree(hf_dirs["qwen3"], tmp_path / "model")
    HfDirectory(tmp_path / "model").check_finite()
    weights = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()}
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN"):
        HfDirectory(tmp_path / "model").check_finite()
    assert main(["convert", "inspect", str(tmp_path / "model")]) == 1


def test_a_model_is_never_written_over_its_source_or_what_holds_it(hf_dirs: dict[str, Path], tmp_path: Path) -> None:
    """``convert P/student P --overwrite`` would delete the source and its siblings."""
    parent = tmp_path / "models"
    shutil.copytree(hf_dirs["qwen3"], parent / "student")
    (parent / "sibling").write_text("x")
    for target in (parent, parent / "student", parent / "student" / ".." / "student"):
        with pytest.raises(CheckpointError, match=r"is or holds|holds .*did not write"):
            hf_to_megatron(parent / "student", target, overwrite=True)
    assert (parent / "sibling").exists() and (parent / "student" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["users folder", "foreign file inside", "file", "link"])
def test_only_what_the_project_wrote_is_overwritten(kind: str, iteration: Path, tmp_path: Path) -> None:
    """``--overwrite`` replaces a model that a conversion wrote, and nothing else; the refusal leaves no trace."""
    target = tmp_path / "target"
    if kind == "users folder":
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    elif kind == "foreign file inside":
        megatron_to_hf(iteration.parent, target)
        megatron_to_hf(iteration.parent, target, overwrite=True)  # ours, and only ours
        (target / "README.md").write_text("a user's")
    elif kind == "file":
        target.write_text("x")
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"did not write|is a file|is a link"):
        megatron_to_hf(iteration.parent, target, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """The model that was to be replaced is put back before a new attempt begins."""
    target = tmp_path / "model"
    with atomic_directory(target) as partial:
        (partial / "weights").write_text("1")
    target.rename(tmp_path / ".model.previous")
    with pytest.raises(RuntimeError), atomic_directory(target, overwrite=True):
        raise RuntimeError
    assert (target / "weights").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def run(iteration: Path, tmp_path: Path) -> RunFolder:
    """A run folder with whole checkpoints of steps 2, 4 and 6."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    for step in (2, 4, 6):
        shutil.copytree(iteration, directory_of(folder, step))
    folder.checkpoint_tracker.write_text("6")
    return folder


def damage(folder: RunFolder, step: int) -> None:
    file = directory_of(folder, step) / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_the_damage_is_named_and_the_checkpoint_before_it_taken_if_allowed(run: RunFolder) -> None:
    """The refusal says which file, which step is whole, and what to type; with leave, the damaged ones are put aside."""
    assert whole_checkpoint(run, may_use_previous=False) == 6
    damage(run, 6)
    damage(run, 4)
    with pytest.raises(CheckpointError, match=r"step 6: .*__0_0\.distcp.*on_damaged_checkpoint=use_previous .*step 2"):
        whole_checkpoint(run, may_use_previous=False)
    assert run.latest_checkpoint_step() == 6
    assert whole_checkpoint(run, may_use_previous=True) == 2 == run.latest_checkpoint_step()
    present = sorted(path.name for path in run.checkpoints.iterdir() if path.is_dir())
    assert present == ["damaged_iter_0000004.1", "damaged_iter_0000006.1", "iter_0000002"]
    damage(run, 2)
    with pytest.raises(CheckpointError, match="no whole one before it"):
        whole_checkpoint(run, may_use_previous=True)


def test_a_requeued_job_verifies_what_no_launcher_did(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm starts the job again by itself: its trainer refuses a damaged checkpoint, or takes the one before it."""
    damage(run, 6)
    assert requeued_step(run, may_use_previous=False) == 6  # a launcher has looked at it
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(CheckpointError, match="step 6"):
        requeued_step(run, may_use_previous=False)
    assert requeued_step(run, may_use_previous=True) == 4


def test_the_mark_does_not_travel(hf_dirs: dict[str, Path], tmp_path: Path) -> None:
    """A copy made from a marked model lists its own files, not those of its source."""
    hf_to_megatron(hf_dirs["qwen3"], tmp_path / "a")
    megatron_to_hf(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "a" / "hf" / marks.MARK).exists()
    marks.check_replaceable(tmp_path / "b", "b")
