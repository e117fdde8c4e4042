"""Whole runs as jobs of a real Slurm with emulated nodes: what only a scheduler can prove. Minutes each."""

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import urllib3
from megatron_distill.recipes import clusters, tiny

from megatron_distill import config
from megatron_distill.launch import cluster
from megatron_distill.launch.slurm import has_ended, job_state
from megatron_distill.runs.console import Console
from megatron_distill.runs.run_folder import RunFolder, read_json, read_lines
from tests.support.slurm_lab import SlurmLab, install
from tests.support.waiting import HANG_S, processes_naming, saved_step, wait_until, wait_until_none_names

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

PROFILES = '''
from dataclasses import replace
from megatron_distill.launch.nodes import ClusterProfile
from megatron_distill.recipes import clusters

def cpu_nodes() -> ClusterProfile:
    return clusters.lab()

def wide_nodes() -> ClusterProfile:
    """Nodes that carry two ranks or servers each; a job that failed goes on once."""
    return replace(clusters.lab(), tasks_per_cpu_node=2, max_failed_starts=2)

def gpu_node() -> ClusterProfile:
    """Nodes that say they have 4 GPUs, so that the run fits one of them; its processes find none and use the CPU."""
    return replace(clusters.lab(), gpus_per_node=4, env={"MEGATRON_DISTILL_DEVICE": "cpu"})
'''
PIPELINE = """
from dataclasses import replace
from megatron_distill import config
from megatron_distill.launch.pipeline import Pipeline
from megatron_distill.recipes import tiny_rl

def short() -> Pipeline:
    whole = tiny_rl.pipeline()
    shortened = [config.with_overrides(stage.config, {overrides!r}) for stage in whole.stages]
    stages = [replace(stage, config=one, gate=lambda evaluations: None) for stage, one in zip(whole.stages, shortened)]
    return replace(whole, stages=tuple(stages))
"""
SHORT = [
    "num_steps=4",
    "rollouts.prompts_per_step=16",
    "micro_batch_rollouts=8",
    "curriculum.horizon_tokens=32",
    "evaluation.num_problems=8",
    "evaluation.samples_per_problem=1",
    "evaluation.max_response_tokens=32",
]


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    """Four nodes with addresses of their own and four pretended GPUs each. Nothing of the lab outlives it."""
    problem = install()
    if problem:
        pytest.fail(problem)
    with tempfile.TemporaryDirectory(prefix="lab") as short_path:
        folder = Path(short_path) / "slurm"
        with SlurmLab(folder, num_nodes=4, gpus_per_node=4) as started:
            (folder / "profiles.py").write_text(PROFILES)
            yield started
        assert processes_naming(str(folder)) == []


def launch(lab: SlurmLab, profile: str, folder: RunFolder, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_distill.cli.main", "launch", "tiny.quickstart", *SHORT, *overrides]
    command += ["--cluster", f"{lab.folder / 'profiles.py'}:{profile}", "--run-dir", str(folder.root)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | lab.env, **pipes)  # type: ignore[call-overload,no-any-return]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)


def settled(lab: SlurmLab, job_id: str) -> bool:
    """Whether the accounting, which lags behind, has a job down as completed; it may not have failed."""
    states = lab.slurm("sacct", "-n", "-X", "-P", "--format=State", f"--jobs={job_id}").split()
    assert set(states) <= {"COMPLETED", "RUNNING", "COMPLETING"}, states
    return states == ["COMPLETED"]


def status_of(method: str, url: str, key: str) -> int:
    """Of a request to a server, from the submitting host."""
    with urllib3.PoolManager(retries=False) as http:
        return http.request(method, url, headers={"Authorization": f"Bearer {key}"}, timeout=HANG_S).status


def test_a_job_warned_of_its_end_saves_is_requeued_and_finishes(lab: SlurmLab, tmp_path: Path) -> None:
    """Two trainer nodes (tp 2), a student and a teacher server on nodes of their own, weights by broadcast between them: all
    find each other although each host's name is its loopback at home. A stranger with another key is turned away. The signal
    that Slurm sends before the time limit comes after the first step. The job goes on in its second start from the step it
    saved, and launch follows it to the end."""
    folder = RunFolder(tmp_path / "run")
    num_steps = 8  # enough for the signal to come before the last one
    process = launch(lab, "cpu_nodes", folder, f"num_steps={num_steps}", "servers.weight_sync=broadcast")
    wait_for(folder.metrics, process)
    urls = {path.stem: read_json(path)["url"] for path in (folder.root / "endpoints").glob("*.json")}
    hosts = {name: url.split("/")[2].split(":")[0] for name, url in urls.items()}
    assert set(hosts) == {"student-0", "teacher-0"}
    assert set(hosts.values()) < {lab.address(number) for number in range(1, 5)}
    key_file = folder.root / "server_key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    for path in ("/generate", "/pause_generation", "/update_weights_from_disk"):
        assert status_of("POST", urls["student-0"] + path, "another") == 401
    assert status_of("GET", urls["student-0"] + "/model_info", key_file.read_text()) == 200

    job_id = read_json(folder.root / "launch" / "job.json")["job_id"]
    lab.slurm("scancel", "--signal=USR1", job_id)  # to the job's steps, not to its batch script: as --signal does
    output = process.communicate()[0]
    assert process.returncode == 0, output

    assert "Restarts=1" in lab.slurm("scontrol", "show", "job", job_id)
    wait_until(lambda: settled(lab, job_id), "the accounting")
    steps = [record["step"] for record in read_lines(folder.metrics)]
    assert steps == list(range(1, num_steps + 1))  # none lost, none twice
    starts = [event for name in ("student", "teacher") for event in read_lines(folder.events_of(f"{name} server 0"))]
    assert [event["text"] for event in starts] == ["starting", "ready"] * 4  # two servers, twice
    assert [summary["step"] for summary in folder.evaluations()] == [0, num_steps]
    logs = {path.name for path in folder.logs.iterdir()}
    assert {
        "trainer-0.out",
        "trainer-1.out",
        "student-0.out",
        "student-0.log",
        "teacher-0.out",
        "teacher-0.log",
    } <= logs
    assert (folder.hf / "model.safetensors").exists()
    wait_until_none_names(str(folder.root))


@pytest.mark.long
def test_a_job_survives_the_loss_of_a_server_and_then_of_a_rank(lab: SlurmLab, tmp_path: Path) -> None:
    """Two students on one node, two ranks on another. A killed server is started again, and its neighbour works on. A killed
    rank ends the job, which is requeued and goes on from its checkpoint; why it ended is kept."""
    folder = RunFolder(tmp_path / "run")
    process = launch(lab, "wide_nodes", folder, "servers.student_replicas=2", "save_every_steps=1")
    wait_for(folder.metrics, process)
    hosts = {read_json(path)["url"].rpartition(":")[0] for path in (folder.root / "endpoints").glob("student-*.json")}
    assert len(hosts) == 1
    [victim] = [one for one in processes_of(folder, "student-server", "0") if one.children()]
    victim.children()[0].kill()
    lost = folder.events_of("student server 0")
    wait_until(lambda: sum(event["text"] == "ready" for event in read_lines(lost)) == 2, "the restart", 900)
    wait_until(lambda: saved_step(folder) >= 1, "a checkpoint", 900)
    processes_of(folder, "trainer")[-1].kill()
    output = process.communicate()[0]
    assert process.returncode == 0, output

    job_id = read_json(folder.root / "launch" / "job.json")["job_id"]
    assert "Restarts=1" in lab.slurm("scontrol", "show", "job", job_id)
    assert list((folder.root / "launch" / "failures").rglob("*.json"))
    assert {record["step"] for record in read_lines(folder.metrics)} == {1, 2, 3, 4}
    assert "student server 0: died (" in output
    wait_until_none_names(str(folder.root))


def processes_of(folder: RunFolder, role: str, *words: str) -> list[psutil.Process]:
    """The processes of a role, those that started others first; torchrun is none."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        is_role = "megatron_distill.launch.roles" in line and role in line and str(folder.root) in line
        if is_role and "torch.distributed.run" not in line and set(words) <= set(line):
            found.append(process)
    return found


@pytest.mark.long
def test_a_pipeline_distils_and_then_reinforces_in_two_jobs(lab: SlurmLab, tmp_path: Path) -> None:
    """Two trainer nodes each time: beside a student and a teacher server to distil, beside a student server for RL, which
    begins with what distillation ended with."""
    recipe = lab.folder / "pipeline.py"
    recipe.write_text(PIPELINE.format(overrides=[*SHORT, "num_steps=2"]))
    command = [sys.executable, "-m", "megatron_distill.cli.main", "pipeline", f"{recipe}:short", "--dir", str(tmp_path)]
    command += ["--cluster", f"{lab.folder / 'profiles.py'}:cpu_nodes"]
    done = subprocess.run(command, env=os.environ | lab.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    stages = {name: RunFolder(tmp_path / name) for name in ("distil", "rl")}
    for name, num_nodes in (("distil", 4), ("rl", 3)):
        job_id = read_json(stages[name].root / "launch" / "job.json")["job_id"]
        wait_until(partial(settled, lab, job_id), "the accounting")
        assert f"NumNodes={num_nodes} " in lab.slurm("scontrol", "show", "job", job_id)
        assert (stages[name].logs / "trainer-1.out").exists()
    assert "forward_kl_nats" in list(read_lines(stages["distil"].metrics))[-1]
    assert "reward" in list(read_lines(stages["rl"].metrics))[-1]
    assert config.load(stages["rl"].config).student.path == str(stages["distil"].hf)
    wait_until_none_names(str(tmp_path))


STUDY = """
from dataclasses import replace
from megatron_distill import config
from megatron_distill.recipes import recall
from megatron_distill.study.design import Arm, Question, Study

def short() -> Study:
    well = config.with_overrides(recall.distil(), {overrides!r})
    sick = config.with_overrides(well, ["num_steps=12", "servers.startup_timeout_s={startup_timeout_s}"])
    arms = (Arm("well", "well", well), Arm("sick", "sick", sick), Arm("then", "then", well, after="sick"))
    question = Question("q", "c", {{arm.name: arm.label for arm in arms}}, ("avg_at_k",), (), ())
    return Study("short", "Short", "Nothing.", "study short", arms, (101,), (question,), ("well",), ())
"""


def test_a_study_is_job_arrays_which_wait_for_one_another_and_go_on_when_asked_again(
    lab: SlurmLab, tmp_path: Path
) -> None:
    """Two runs in one array, each on a trainer's node and a student server's; a third waits in another for one of them. That
    one fails, its server given no time to start: so the third never begins, and the first is not bothered. Asked again with
    the fault mended, only those two are submitted. The one is warned as before its time limit and requeued, the other waits on,
    and goes on with its student."""

    def study(startup_timeout_s: int, *flags: str) -> subprocess.CompletedProcess[str]:
        recipe = lab.folder / f"study_{startup_timeout_s}.py"
        small = ["num_steps=2", "rollouts.prompts_per_step=8", "micro_batch_rollouts=8", "evaluation.every_steps=0"]
        overrides = [*small, *(one for one in SHORT if one.startswith(("curriculum", "evaluation")))]
        recipe.write_text(STUDY.format(overrides=overrides, startup_timeout_s=startup_timeout_s))
        command = [
            sys.executable,
            "-m",
            "megatron_distill.cli.main",
            "study",
            f"{recipe}:short",
            "--dir",
            str(tmp_path),
        ]
        command += ["--cluster", f"{lab.folder / 'profiles.py'}:cpu_nodes", "--max-running", "2", *flags]
        return subprocess.run(command, env=os.environ | lab.env, capture_output=True, text=True, check=False)

    def job_of(arm: str) -> str:
        return str(read_json(runs[arm].root / "launch" / "job.json")["job_id"])

    runs = {arm: RunFolder(tmp_path / "runs" / arm / "seed_101") for arm in ("well", "sick", "then")}
    first = study(1)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "did not answer within 1 s" in first.stderr and "2 of 3 runs did not finish" in first.stderr
    assert "it was to go on with the student of sick" in first.stderr
    array, _, number = job_of("sick").partition("_")
    assert job_of("well").startswith(f"{array}_") and not job_of("then").startswith(f"{array}_")
    assert job_of("then").endswith(f"_{number}")
    assert "NumNodes=2 " in lab.slurm("scontrol", "show", "job", job_of("sick"))
    well = job_of("well")
    assert settled(lab, well) and not (runs["then"].root / "endpoints").exists()

    detached = study(600, "--detach")
    assert detached.returncode == 0, detached.stdout + detached.stderr
    assert detached.stdout.count("1 runs, each on 2 nodes") == 2
    submitted = job_of("then")
    wait_until(runs["sick"].metrics.exists, "the first step", 900)
    lab.slurm("scancel", "--signal=USR1", job_of("sick"))
    again = study(600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Slurm job array" not in again.stdout  # what waits or runs is followed
    assert (job_of("well"), job_of("then")) == (well, submitted)
    assert config.load(runs["then"].config).student.path == str(runs["sick"].hf)
    assert "Restarts=1" in lab.slurm("scontrol", "show", "job", job_of("sick"))
    assert "Restarts=0" in lab.slurm("scontrol", "show", "job", job_of("well"))
    assert [record["step"] for record in read_lines(runs["sick"].metrics)] == list(range(1, 13))
    assert all(run.has_finished(2) and run.report.exists() for run in runs.values())
    assert [one["arm"] for one in read_json(tmp_path / "short" / "results.json")["runs"]] == ["well", "sick", "then"]
    wait_until_none_names(str(tmp_path))


STAND_IN = """#!/bin/bash
# In place of Python. A server sleeps; the trainer has a child, as torchrun has, which trains until it is told to stop.
# No signal may end either: where Slurm tracks processes by cgroups, only the shell before them gets the warning.
case "$*" in
    *-server*) sleep 600 ;;
    *) {python} {rank} ;;
esac
"""
STAND_IN_RANK = """
import os, pathlib, time

run = pathlib.Path({run!r})
tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
if tracker.exists():
    (run / "finished.json").write_text("{{}}")
else:
    while not (run / "stop_requested").exists():
        time.sleep(0.2)
    tracker.parent.mkdir()
    tracker.write_text("1")
"""
STAND_IN_SAVING_RANK = """
import pathlib, time

tracker = pathlib.Path({run!r}) / "checkpoints" / "latest_checkpointed_iteration.txt"
tracker.parent.mkdir()
tracker.write_text("1")
time.sleep(600)
"""


def submit_stand_ins(
    lab: SlurmLab, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, rank_code: str, **profile: Any
) -> str:
    """A job of the real scripts, in which what they start is a stand-in: minutes of sleep. Its id."""
    folder.create()
    rank, python = folder.root.parent / "rank.py", folder.root.parent / "python"
    rank.write_text(rank_code.format(run=str(folder.root)))
    python.write_text(STAND_IN.format(python=sys.executable, rank=rank))
    python.chmod(0o755)
    for name, value in lab.env.items():
        monkeypatch.setenv(name, value)
    nodes = replace(clusters.lab(), python=str(python), **profile)
    return cluster.submit(cluster.job_of(tiny.quickstart(), nodes, folder), nodes, {"": folder})


def test_a_job_that_its_user_cancels_stays_down(lab: SlurmLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it has saved a step, after which a job that fails would be requeued."""
    folder = RunFolder(tmp_path / "run")
    job_id = submit_stand_ins(lab, folder, monkeypatch, STAND_IN_SAVING_RANK)
    wait_until(folder.checkpoint_tracker.exists, "a saved step")
    lab.slurm("scancel", job_id)
    wait_until(lambda: has_ended(job_state(job_id)), "the end of the job")
    assert job_state(job_id).startswith("CANCELLED")
    assert "Restarts=0" in lab.slurm("scontrol", "show", "job", job_id)
    wait_until_none_names(str(tmp_path))


@pytest.mark.long
def test_the_time_limit_itself_warns_the_ranks_and_requeues_the_job(
    lab: SlurmLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No signal of ours: what Slurm's --signal says reaches the trainer through its shell, spares servers and batch script, and
    the job that is requeued finishes."""
    folder = RunFolder(tmp_path / "run")
    job_id = submit_stand_ins(lab, folder, monkeypatch, STAND_IN_RANK, time_limit="2:00", warning_s=60)
    with Console(folder, 1, io.StringIO()) as console:
        cluster.follow(job_id, folder, console)
    assert folder.finished.exists()
    assert "Restarts=1" in lab.slurm("scontrol", "show", "job", job_id)
    wait_until_none_names(str(tmp_path))


def test_a_failing_role_ends_the_job_and_its_cause_is_the_last_line(lab: SlurmLab, tmp_path: Path) -> None:
    """A server that cannot start in time ends the trainer too; launch exits with 1 and tells the first cause."""
    folder = RunFolder(tmp_path / "run")
    process = launch(lab, "cpu_nodes", folder, "servers.startup_timeout_s=1")
    output = process.communicate()[0]
    assert process.returncode == 1
    assert "did not answer within 1 s" in output
    wait_until_none_names(str(folder.root))


def test_a_run_that_fits_one_node_is_a_job_on_one_node(lab: SlurmLab, tmp_path: Path) -> None:
    """Two ranks and two servers on a node that claims four GPUs: the job's only task runs them all."""
    folder = RunFolder(tmp_path / "run")
    process = launch(lab, "gpu_node", folder, "num_steps=1")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    job_id = read_json(folder.root / "launch" / "job.json")["job_id"]
    assert "NumNodes=1 " in lab.slurm("scontrol", "show", "job", job_id)
    assert [record["step"] for record in read_lines(folder.metrics)] == [1]
    wait_until_none_names(str(folder.root))
