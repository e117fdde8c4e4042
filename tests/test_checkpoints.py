"""Which checkpoints are kept, how the others go, and what can be made of one: a fork, an export. Files only, no training."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from megatron_distill.recipes import tiny

from megatron_distill import config as config_module
from megatron_distill.cli.main import main
from megatron_distill.config import CheckpointConfig
from megatron_distill.convert.damage import damage_of
from megatron_distill.convert.export import checkpoint_of, export
from megatron_distill.convert.hf_files import HfDirectory
from megatron_distill.convert.offline import hf_to_megatron
from megatron_distill.convert.verify import compare_tensors
from megatron_distill.errors import CheckpointError, DistillError
from megatron_distill.evaluate.command import evaluate_model
from megatron_distill.launch.disk import bytes_to_come, disk
from megatron_distill.launch.fork import fork
from megatron_distill.launch.launch import check_folder
from megatron_distill.launch.memory import num_parameters
from megatron_distill.launch.resume import whole_checkpoint
from megatron_distill.models.hf_config import HfConfig
from megatron_distill.models.vocabulary import end_token_ids
from megatron_distill.runs.checkpoints import (
    Best,
    best_so_far,
    directory_of,
    record_best,
    remove,
    remove_leftovers,
    steps_on_disk,
    steps_to_keep,
)
from megatron_distill.runs.run_folder import HELDOUT, RunFolder, append, read_json, read_lines, write_json
from megatron_distill.training.kept import Kept

STEPS = (10, 20, 30, 40)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of the quickstart with a whole checkpoint at each of ``STEPS``, all of the untrained student."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    config_module.save(tiny.quickstart(), folder.config)
    hf_to_megatron(tiny.MODELS / "student", tmp_path / "megatron")
    for step in STEPS:
        shutil.copytree(tmp_path / "megatron" / "release", directory_of(folder, step))
        append(folder.metrics, {"step": step})
    folder.checkpoint_tracker.write_text(str(STEPS[-1]))
    return folder


@pytest.mark.parametrize(
    ("settings", "latest", "best", "kept"),
    [
        ({}, 40, None, {10, 20, 30, 40}),
        ({"keep_last": 1}, 40, None, {40}),
        ({"keep_last": 2}, 40, None, {30, 40}),
        ({"keep_last": 9}, 40, None, {10, 20, 30, 40}),
        ({"keep_last": 1, "keep_every_steps": 20}, 40, None, {20, 40}),
        ({"keep_last": 1}, 40, Best(10, "avg_at_k", 0.5), {10, 40}),
        ({"keep_last": 1}, 40, Best(15, "avg_at_k", 0.5), {40}),
        ({"keep_last": 1}, 30, None, {30, 40}),  # 40 is still being written
    ],
)
def test_what_is_kept(settings: dict[str, int], latest: int, best: Best | None, kept: set[int]) -> None:
    """The last so many, multiples, the best one's; never less than the latest and what is newer."""
    assert steps_to_keep(STEPS, latest, CheckpointConfig(**settings), best) == kept


class Alone:
    """The only rank of a job."""

    rank = 0

    def gather(self, value: object) -> list[object]:
        return [value]


def kept(folder: RunFolder, saved: list[Path] | None = None, **settings: object) -> Kept:
    overrides = [f"checkpoints.{k}={v}" for k, v in settings.items()]
    config = config_module.with_overrides(tiny.quickstart(), ["save_every_steps=10", *overrides])
    return Kept(config, folder, Alone(), saved.append if saved is not None else lambda directory: None)  # type: ignore[arg-type]


def test_what_a_kill_left_undone_after_a_checkpoint_is_done_by_the_next_start(folder: RunFolder) -> None:
    """The checkpoint and the evaluation of a step are there, and its student is neither exported nor told the best: a start
    that stands at that step does both, and the next one does not take it for better than itself."""
    record_best(folder, Best(10, "avg_at_k", 0.5))
    write_json(folder.evaluation(HELDOUT, 20), {"summary": {"avg_at_k": 0.75}})
    saved: list[Path] = []
    kept(folder, saved, keep_best="avg_at_k", export_hf="true").after_step(20)
    assert saved == [folder.hf_best, folder.hf_step(20)]
    assert best_so_far(folder, "avg_at_k") == Best(20, "avg_at_k", 0.75)
    saved.clear()
    kept(folder, saved, keep_best="avg_at_k").after_step(20)
    assert saved == []


def test_nothing_goes_while_the_latest_is_damaged(folder: RunFolder) -> None:
    """A checkpoint whose bytes are wrong cannot stand for those before it; once it is whole they go."""
    file = next(directory_of(folder, 40).glob("*.distcp"))
    whole = file.read_bytes()
    file.write_bytes(whole[:2000] + b"\xff" * 64 + whole[2064:])
    kept(folder, keep_last=1).close()
    assert steps_on_disk(folder) == list(STEPS)
    assert "is damaged" in next(read_lines(folder.events))["text"]
    file.write_bytes(whole)
    kept(folder, keep_last=1).close()
    assert steps_on_disk(folder) == [40]


def test_what_others_put_there_stays(folder: RunFolder) -> None:
    """A checkpoint's directory with a file of the user's, a link in its place, and foreign names are left alone."""
    (directory_of(folder, 10) / "notes.txt").write_text("mine")
    shutil.move(directory_of(folder, 20), folder.root / "elsewhere")
    directory_of(folder, 20).symlink_to(folder.root / "elsewhere")
    (folder.checkpoints / "my_copy").mkdir()
    kept(folder, keep_last=1).close()
    assert steps_on_disk(folder) == [10, 20, 40]
    assert damage_of(directory_of(folder, 20)) == "" and (folder.checkpoints / "my_copy").is_dir()
    assert [event["text"][:31] for event in read_lines(folder.events)] == [
        "checkpoint of step 10 is kept: ",
        "checkpoint of step 20 is kept: ",
    ]


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_run_that_resumes(folder: RunFolder) -> None:
    """A process that dies before any one of the changes that a removal makes to the disk leaves only whole checkpoints and a
    leftover, which the next start takes away."""
    deaths = 0
    while True:
        pid = os.fork()
        if not pid:
            left = [deaths]

            def die(event: str, arguments: object, left: list[int] = left) -> None:
                if event in ("os.rename", "os.remove", "os.rmdir"):
                    if not left[0]:
                        os._exit(9)
                    left[0] -= 1

            sys.addaudithook(die)
            remove(folder, 10)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert whole_checkpoint(folder, may_use_previous=False) == 40
        assert all(damage_of(directory_of(folder, step)) == "" for step in steps_on_disk(folder))
        remove_leftovers(folder)
        assert not list(folder.checkpoints.glob(".removed*"))
        if code == 0:
            break
        assert code == 9
        deaths += 1
        if not directory_of(folder, 10).exists():
            shutil.copytree(directory_of(folder, 20), directory_of(folder, 10))
    assert deaths >= 4  # before the rename, each file, the directory
    assert steps_on_disk(folder) == [20, 30, 40]


def test_a_new_run_in_an_old_folder_has_no_best_yet(folder: RunFolder) -> None:
    """What was best is forgotten with the run that it belonged to, and is not compared with another metric."""
    record_best(folder, Best(10, "avg_at_k", 0.5))
    assert best_so_far(folder, "avg_at_k") == Best(10, "avg_at_k", 0.5)
    assert best_so_far(folder, "pass_at_k") is None
    folder.rewind(0)
    assert best_so_far(folder, "avg_at_k") is None


def test_a_fork_stands_at_its_step_with_another_config(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new run has the checkpoint and the records up to its step, its own config, and is resumed by the printed command; the
    first run is as it was."""
    before = sorted(path.relative_to(folder.root) for path in folder.root.rglob("*"))
    forked = RunFolder(tmp_path / "forked")
    command = ["fork", str(folder.root), "--step", "20", "optimizer.lr=0.5", "--run-dir", str(forked.root)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "optimizer.lr = 0.5 (was 0.001)" in printed
    assert f"megatron-distill train {forked.config} --run-dir {forked.root}" in printed
    assert forked.latest_checkpoint_step() == 20 and steps_on_disk(forked) == [20]
    assert whole_checkpoint(forked, may_use_previous=False) == 20
    assert [record["step"] for record in read_lines(forked.metrics)] == [10, 20]
    assert read_json(forked.root / "forked_from.json") == {"run": str(folder.root), "step": 20}
    check_folder(config_module.load(forked.config), forked)
    assert sorted(path.relative_to(folder.root) for path in folder.root.rglob("*")) == before
    assert main(command) == 1
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_a_fork_takes_a_recipe_wherever_it_stands(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an option as docs/keeping.md has it, or before; a second word that sets nothing is refused."""
    run, changes = str(folder.root), ["num_steps=60", "student.parallel.tp=1"]
    for number, words in enumerate(
        (
            ["--step", "20", "tiny_rl.grpo", *changes],
            ["tiny_rl.grpo", "--step", "20", *changes],
            [*changes, "--step", "20"],
        )
    ):
        forked = RunFolder(tmp_path / str(number))
        assert main(["fork", run, *words, "--run-dir", str(forked.root)]) == 0, capsys.readouterr().err
        config = config_module.load(forked.config)
        assert config.name == ("grpo" if "tiny_rl.grpo" in words else "quickstart") and config.num_steps == 60
    assert main(["fork", run, "--step", "20", "tiny_rl.grpo", "seed", "--run-dir", str(tmp_path / "none")]) == 1
    assert "override = 'seed': must read section.field=value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "override", "message"),
    [
        (25, "seed=2", r"--step = 25: .* holds no checkpoint of it \(there: 10, 20, 30, 40\)"),
        (20, "num_steps=20", "num_steps = 20: must exceed 20"),
        (20, "student.dtype=bf16", r"student\.dtype = 'bf16': must be 'fp32'"),
        (20, f"student.path={tiny.MODELS / 'teacher'}", "is of another architecture"),
        (20, "student.parallel.tp=3", r"student\.parallel\.tp = 3"),
    ],
)
def test_a_fork_that_cannot_be_is_refused(
    step: int, override: str, message: str, folder: RunFolder, tmp_path: Path
) -> None:
    """By name, before anything is written."""
    config = config_module.with_overrides(tiny.quickstart(), [override])
    with pytest.raises(DistillError, match=message):
        fork(folder, step, config, RunFolder(tmp_path / "forked"))
    assert not (tmp_path / "forked").exists() and not list(tmp_path.glob(".forked*"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval/step_000020.json"])
def test_a_fork_of_what_cannot_be_copied_leaves_nothing(name: str, folder: RunFolder, tmp_path: Path) -> None:
    """A pipe in the place of a record is named, and not waited for."""
    (folder.root / name).unlink(missing_ok=True)
    os.mkfifo(folder.root / name)
    with pytest.raises(DistillError, match=name):
        fork(folder, 20, tiny.quickstart(), RunFolder(tmp_path / "forked"))
    assert not (tmp_path / "forked").exists() and not list(tmp_path.glob(".forked*"))


def test_the_disk_is_planned_for_what_is_kept() -> None:
    """Ten checkpoints of 14 B a parameter under bf16; with two kept there are three while the newest is written, and the best;
    what a folder holds already is not asked for again."""
    student = HfConfig.from_dir(tiny.MODELS / "student")
    parameters = num_parameters(student)

    def parts(*overrides: str) -> dict[str, float]:
        base = ["student.dtype=bf16", "num_steps=100", "save_every_steps=10"]
        config = config_module.with_overrides(tiny.quickstart(), [*base, *overrides])
        return {part.name: part.num_bytes / parameters for part in disk(config, student)}

    assert parts() == {"checkpoints": 140, "student": 2, "weights on the way": 4}
    thinned = parts("checkpoints.keep_last=2", "checkpoints.keep_best=avg_at_k", "checkpoints.export_hf=true")
    assert thinned == {"checkpoints": 56, "student": 2, "best student": 4, "exports": 18, "weights on the way": 4}
    assert parts("save_every_steps=30", "servers.weight_sync=broadcast") == {"checkpoints": 56, "student": 2}
    assert parts("save_every_steps=0")["checkpoints"] == 14


def test_what_is_on_the_disk_is_not_asked_for_again(folder: RunFolder) -> None:
    """A resumed run needs room for what is still to come only."""
    student, config = HfConfig.from_dir(tiny.MODELS / "student"), tiny.quickstart()
    there = sum(path.stat().st_size for path in folder.checkpoints.rglob("*") if path.is_file())
    whole = bytes_to_come(config, student, RunFolder(folder.root / "nothing"))
    assert bytes_to_come(config, student, folder) == max(whole - there, 0) < whole


def test_any_checkpoint_is_exported(folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's at a step, its latest, and a bare Megatron checkpoint: each is the student, tokenizer included."""
    student = tiny.MODELS / "student"
    for name, arguments in {
        "at": [str(folder.root), "--step", "20"],
        "latest": [str(folder.root)],
        "bare": [str(folder.checkpoints), "--step", "30", "--hf", str(student)],
    }.items():
        assert main(["export", *arguments, "--out", str(tmp_path / name)]) == 0
        assert compare_tensors(tmp_path / name, student).same
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()
        assert HfDirectory(tmp_path / name).num_bytes > 0
    printed = capsys.readouterr().out
    assert "iter_0000020" in printed and "iter_0000040" in printed and "iter_0000030" in printed


def test_an_exported_student_ends_where_its_responses_did(folder: RunFolder, tmp_path: Path) -> None:
    """At both stop tokens of its run, also where the base model's files name its own alone; a bare checkpoint names none."""
    export(folder.root, tmp_path / "student", step=None, hf_dir=None, overwrite=False)
    assert end_token_ids(tiny.MODELS / "student") == (0,) and end_token_ids(tmp_path / "student") == (0, 2)
    export(folder.checkpoints, tmp_path / "bare", step=30, hf_dir=tiny.MODELS / "student", overwrite=False)
    assert end_token_ids(tmp_path / "bare") == (0,)


@pytest.mark.parametrize("take", ["export", "export of a bare one", "fork", "eval"])
def test_a_checkpoint_that_is_not_there_or_not_whole_is_refused(take: str, folder: RunFolder, tmp_path: Path) -> None:
    """By whatever takes one, with the steps that there are; a damaged one is named, and nothing is written."""

    def at(step: int) -> object:
        out = tmp_path / "out"
        if take == "fork":
            return fork(folder, step, tiny.quickstart(), RunFolder(out))
        if take == "eval":
            return evaluate_model(str(folder.root), out=out, step=step)
        source, hf_dir = (folder.root, None) if take == "export" else (folder.checkpoints, tiny.MODELS / "student")
        return export(source, out, step=step, hf_dir=hf_dir, overwrite=False)

    with pytest.raises(CheckpointError, match=r"--step = 15: .*there: 10, 20, 30, 40"):
        at(15)
    next(directory_of(folder, 20).glob("*.distcp")).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has 0 bytes.* Name another --step \(there: 10, 30, 40\)"):
        at(20)
    assert not list(tmp_path.glob("out*"))


def test_without_a_checkpoint_there_is_no_latest_one(tmp_path: Path) -> None:
    """The message names the folder, and no step that nobody gave."""
    with pytest.raises(CheckpointError, match=r"run: holds no checkpoint yet\. Train on"):
        checkpoint_of(RunFolder(tmp_path / "run"), None)
