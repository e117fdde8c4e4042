"""The run folder as a contract: a mark, a lock, one record a step, nothing deleted that the project did not write."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from megatron_distill.recipes import tiny

from megatron_distill import config as config_module
from megatron_distill.cli.main import main
from megatron_distill.errors import CheckpointError, DistillError
from megatron_distill.launch import job_scripts, launch, processes
from megatron_distill.launch.launch import check_folder, opened
from megatron_distill.launch.resume import refused_changes
from megatron_distill.pages.report import write_report
from megatron_distill.runs import lock, marks
from megatron_distill.runs.lock import RunLock
from megatron_distill.runs.run_folder import RunFolder, append, read_lines, write_json
from tests.support.waiting import wait_until

USERS_FILES = (
    "sync/weights.txt",
    "endpoints/a.json",
    "errors/mine.json",
    "metrics.jsonl",
    "events.jsonl",
    "finished.json",
)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A folder of a user's own, with names that a run folder has too."""
    root = tmp_path / "mine"
    for name in USERS_FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("a user's own\n")
    return root


@pytest.mark.parametrize("command", [["train", "tiny.quickstart"], ["train", "tiny.quickstart", "--dry-run"]])
def test_a_folder_without_the_mark_is_left_alone(
    command: list[str], users_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its files are called, a folder that bears no mark is refused, by a dry run too, and nothing in it changes."""
    before = tree(users_folder)
    assert main([*command, "--run-dir", str(users_folder)]) == 1
    assert "is not a run folder of this project" in capsys.readouterr().err
    assert tree(users_folder) == before


def test_what_a_user_puts_into_a_run_folder_stays(tmp_path: Path) -> None:
    """A start removes what the start before it left about its end, and not a user's files beside these."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    mine = ["notes.txt", "sync/notes.txt", "errors/mine.json", "errors/list.json", "eval/mine.json"]
    for name in mine:
        (folder.root / name).parent.mkdir(exist_ok=True)
        (folder.root / name).write_text("[1]")
    folder.fail("trainer-0", "it broke")
    (folder.sync / "v000003").mkdir()
    with opened(tiny.quickstart(), folder) as step:
        assert step == 0
        assert not (folder.errors / "trainer-0.json").exists() and not (folder.sync / "v000003").exists()
        folder.rewind(0)
    assert all((folder.root / name).read_text() == "[1]" for name in mine)


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_a_place_that_cannot_hold_a_folder_is_named(place: str, tmp_path: Path) -> None:
    """A file in the way, or above, or a folder that nobody may write to, root included: one sentence, no traceback."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(DistillError, match="run folder = "), opened(tiny.quickstart(), RunFolder(tmp_path / place)):
        pass


def test_a_checkpoint_without_its_config_is_refused(tmp_path: Path) -> None:
    """Nothing would tell whether it is of this run."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.checkpoints.mkdir()
    folder.checkpoint_tracker.write_text("3")
    with pytest.raises(DistillError, match=r"a checkpoint of step 3 but no config\.json"):
        check_folder(tiny.quickstart(), folder)
    folder.checkpoint_tracker.write_text("three")
    with pytest.raises(CheckpointError, match="must hold the number of a step"):
        check_folder(tiny.quickstart(), folder)


def test_only_what_does_not_change_the_result_may_differ_in_a_resume(tmp_path: Path) -> None:
    """More steps are fine, another seed is not, fewer steps than there are checkpoints are not."""
    folder, config = RunFolder(tmp_path / "run"), tiny.quickstart()
    with opened(config, folder):
        folder.checkpoints.mkdir()
        folder.checkpoint_tracker.write_text("5")
    change = config_module.with_overrides
    check_folder(change(config, ["num_steps=50"]), folder)
    with pytest.raises(DistillError, match=r"another config \(seed differ\) at step 5"):
        check_folder(change(config, ["seed=7"]), folder)
    with pytest.raises(DistillError, match="has come to 5 steps"):
        check_folder(change(config, ["num_steps=2"]), folder)


@pytest.mark.parametrize(
    ("override", "may"),
    [
        ("servers.student_replicas=3", True),
        ("servers.request_timeout_s=5", True),
        ("servers.student_tp=2", False),
        ("servers.deterministic=false", False),
        ("evaluation.every_steps=7", True),
        ("evaluation.samples_per_problem=7", False),
        ("save_every_steps=7", True),
        ("checkpoints.keep_last=2", True),
        ("teacher.cache_dir=cache", True),
        ("name=other", True),
        ("micro_batch_rollouts=8", False),
        (f"student.path={tiny.MODELS}/../tiny_models/student", True),
        (f"student.path={tiny.MODELS}/teacher", False),
        ("optimizer.lr=0.1", False),
    ],
)
def test_a_resume_may_change_servers_places_and_cadences(override: str, may: bool, tmp_path: Path) -> None:
    """Replicas, time limits, cadences, retention and other names of the same places change nothing that is learnt; what does is
    refused by its dotted name."""
    folder, config = RunFolder(tmp_path / "run"), tiny.quickstart()
    with opened(config, folder):
        folder.checkpoints.mkdir()
        folder.checkpoint_tracker.write_text("3")
    changed = config_module.with_overrides(config, [override])
    if may:
        check_folder(changed, folder)
    else:
        name = override.partition("=")[0].replace(".", r"\.")
        with pytest.raises(DistillError, match=rf"another config \({name} differ\)"):
            check_folder(changed, folder)


def test_an_evaluation_that_would_freshen_rollouts_may_not_move(tmp_path: Path) -> None:
    """Weights reach the servers for an evaluation too: where they otherwise wait for more than a step, its cadence counts."""
    config = config_module.with_overrides(tiny.quickstart(), ["rollouts.sync_every_steps=4"])
    moved = config_module.with_overrides(config, ["evaluation.every_steps=2", "servers.evaluation_replicas=1"])
    assert refused_changes(config, moved) == ["evaluation.every_steps", "servers.evaluation_replicas"]


def test_warm_up_is_not_made_longer_or_shorter_midway(tmp_path: Path) -> None:
    """Its length is a share of all steps: another number of them would raise or lower the rate of a run that stands within the
    longer of both; after that it is free, in either direction."""
    folder, change = RunFolder(tmp_path / "run"), config_module.with_overrides
    config = change(tiny.quickstart(), ["num_steps=40", "optimizer.warmup_frac=0.1"])
    with opened(config, folder):
        folder.checkpoints.mkdir()
    longer, shorter = change(config, ["num_steps=200"]), change(config, ["num_steps=20"])
    for step, refused in {3: [longer, shorter], 4: [longer], 19: [longer], 20: []}.items():
        folder.checkpoint_tracker.write_text(str(step))
        for one in refused:
            wanted = f"num_steps = {one.num_steps} instead of 40 .* after step {step}: .* {one.warmup_steps} steps instead of"
            with pytest.raises(DistillError, match=wanted):
                check_folder(one, folder)
        for one in (longer, shorter, config):
            if one not in refused:
                check_folder(one, folder)


def test_warm_up_is_looked_at_again_where_a_damaged_checkpoint_leads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that counts is that of the checkpoint which is gone on from."""
    folder, config = RunFolder(tmp_path / "run"), tiny.quickstart()
    with opened(config, folder):
        folder.checkpoints.mkdir()
        folder.checkpoint_tracker.write_text("30")
    monkeypatch.setattr(launch, "whole_checkpoint", lambda folder, _: folder.checkpoint_tracker.write_text("3"))
    with pytest.raises(DistillError, match="after step 3"), opened(replace(config, num_steps=200), folder):
        pass


def test_a_rate_that_falls_to_the_end_keeps_its_end() -> None:
    """The number of steps is free at a constant learning rate only."""
    config = config_module.with_overrides(tiny.quickstart(), ["optimizer.lr_decay=cosine"])
    assert refused_changes(config, config_module.with_overrides(config, ["num_steps=99"])) == ["num_steps"]


def test_a_run_between_its_last_checkpoint_and_its_end_may_go_on(tmp_path: Path) -> None:
    """Only ``finished.json`` makes a run finished: without it the same command goes on at its last step."""
    folder, config = RunFolder(tmp_path / "run"), tiny.quickstart()
    with opened(config, folder):
        folder.checkpoints.mkdir()
        folder.checkpoint_tracker.write_text(str(config.num_steps))
    check_folder(config, folder)
    write_json(folder.finished, {"step": config.num_steps})
    with pytest.raises(DistillError, match="its run has finished"):
        check_folder(config, folder)


def test_after_a_rewind_every_step_has_one_record(tmp_path: Path) -> None:
    """Records after the checkpoint, and a line that a kill cut short, are gone; what remains is byte for byte as it was."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    for step in (1, 2, 3, 4, 5):
        append(folder.metrics, {"step": float(step), "loss": 1 / step})
        append(folder.samples, {"step": step, "response": "\u2028 and \x85 break no line"})
        write_json(folder.evals / f"step_{step:06d}.json", {"summary": {"step": step}})
    whole = folder.metrics.read_bytes()
    with folder.metrics.open("ab") as file:
        file.write(b'{"step": 6.0, "lo')
    folder.rewind(3)
    assert [record["step"] for record in read_lines(folder.metrics)] == [1, 2, 3]
    assert whole.startswith(folder.metrics.read_bytes())
    assert [record["step"] for record in read_lines(folder.samples)] == [1, 2, 3]
    assert [summary["step"] for summary in folder.evaluations()] == [1, 2, 3]
    folder.rewind(0)  # a run that never reached a checkpoint starts over, perhaps with other steps
    assert folder.evaluations() == [] and list(read_lines(folder.metrics)) == []


HOLD = """
import sys, time
from dataclasses import replace
from pathlib import Path
from megatron_distill.runs.lock import RunLock, take_part
root = Path(sys.argv[1])
if sys.argv[2] == "role":
    take_part(root)
    print("held", flush=True)
    time.sleep(600)
with RunLock(root):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(root: Path, what: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(root), what], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def refused_until_its_holder_ends(root: Path) -> None:
    """A launcher in another process keeps this one out, and is named; once killed it does no longer."""
    first = holder(root, "launcher")
    try:
        with pytest.raises(DistillError, match=f"process {first.pid} on .* is running in it"), RunLock(root):
            pass
    finally:
        first.kill()
        first.wait()
    with RunLock(root):
        pass


def test_the_second_launch_of_a_folder_is_told_who_holds_it(tmp_path: Path) -> None:
    """The refusal names process and host; a SIGKILL of the holder releases the lock."""
    RunFolder(tmp_path).create()
    refused_until_its_holder_ends(tmp_path)
    assert not (tmp_path / "lock" / "holder.json").exists()


@pytest.mark.slow
def test_a_file_system_without_locks_leaves_the_count_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same machine too."""

    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    RunFolder(tmp_path).create()
    monkeypatch.setattr(fcntl, "flock", flock)
    refused_until_its_holder_ends(tmp_path)


def test_a_start_waits_for_the_roles_of_a_killed_launcher(tmp_path: Path) -> None:
    """They may still write; the folder is free as soon as the last of them has ended."""
    RunFolder(tmp_path).create()
    with RunLock(tmp_path):
        pass
    role = holder(tmp_path, "role")
    with pytest.raises(DistillError, match="processes of an earlier start still run"), RunLock(tmp_path, roles_end_s=0):
        pass
    role.kill()
    role.wait()
    with RunLock(tmp_path, roles_end_s=0):
        pass


@pytest.mark.slow
def test_another_machine_sees_the_lock_where_locks_stay_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system whose locks stay on one machine the holder's moving count tells; one that stands still is dead."""
    RunFolder(tmp_path).create()
    monkeypatch.setattr(lock, "BEAT_S", 0.3)
    record = {"host": "elsewhere", "pid": 1, "command": "train", "beat": 0}
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "holder.json").write_text(json.dumps(record))
    with RunLock(tmp_path):  # nobody raised the count
        pass
    code = "import itertools, sys, time; from pathlib import Path; from megatron_distill.runs.run_folder import write_json\n"
    code += "for n in itertools.count():\n"
    code += " write_json(Path(sys.argv[1]), {'host': 'elsewhere', 'pid': 1, 'command': 'train', 'beat': n})\n"
    code += " print(n, flush=True); time.sleep(0.05)"
    beating = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock" / "holder.json")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert beating.stdout is not None and beating.stdout.readline()
        monkeypatch.setattr(lock, "BEAT_S", 60.0)  # long: it ends as soon as the count is seen to move
        with pytest.raises(DistillError, match="on elsewhere"), RunLock(tmp_path):
            pass
    finally:
        beating.kill()
        beating.wait()


def test_a_zombie_is_not_alive() -> None:
    """A launcher that was killed, but whose parent never asked how it ended, must not keep a run going."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    wait_until(lambda: not processes.is_alive(process.pid), "the process to end")
    os.kill(process.pid, 0)  # which says that it is still there
    process.wait()


ORPHANS = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_everything_tagged_is_ended_wherever_it_went() -> None:
    """A child in a session of its own, whose parent was killed, and a stopped one: ended all the same, and nothing else."""
    tag = f"test-{os.getpid()}"
    environment = os.environ | {processes.TAG: tag}
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline()
    stopped = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    wait_until(lambda: len(processes.tagged(tag)) == 3, "all three")
    stopped.send_signal(signal.SIGSTOP)
    parent.kill()
    parent.wait()
    assert len(processes.tagged(tag)) == 2
    processes.end_tagged(tag, grace_s=0)
    assert processes.tagged(tag) == []
    assert bystander.poll() is None
    for process in (stopped, bystander):
        process.kill()
        process.wait()


def test_each_variable_of_the_environment_means_one_thing() -> None:
    """No two modules put different values under one name: a job's tasks hold the run's folder, its processes a start's tag."""
    package = Path(processes.__file__).parents[1]
    sources = (path.read_text() for path in package.rglob("*.py"))
    declared = [name for text in sources for name in re.findall(r'^\w+ = "(MEGATRON_DISTILL_\w+)"', text, re.MULTILINE)]
    assert {processes.TAG, job_scripts.RUN_VARIABLE} <= set(declared)
    assert sorted(declared) == sorted(set(declared))


def test_a_page_is_written_over_a_page_only(tmp_path: Path) -> None:
    """``compare --out RUN/config.json`` and the like are refused."""
    file = tmp_path / "config.json"
    file.write_text("{}")
    with pytest.raises(DistillError, match="is no page of this project"):
        marks.check_page(file, "--out")
    page = tmp_path / "page.html"
    page.write_text(f"<html><head>{marks.GENERATOR}")
    marks.check_page(page, "--out")
    with pytest.raises(DistillError, match="is a folder"):
        marks.check_page(tmp_path, "--out")


def test_a_report_bears_the_mark_of_a_page(tmp_path: Path) -> None:
    """So that it can be written again."""
    folder, config = RunFolder(tmp_path / "run"), tiny.quickstart()
    folder.create()
    config_module.save(config, folder.config)
    append(folder.metrics, {"step": 1.0, "loss": 0.5, "step_s": 1.0})
    for _ in range(2):
        write_report(folder, at_end=True)
    assert "finished at step 1" in folder.report.read_text()
