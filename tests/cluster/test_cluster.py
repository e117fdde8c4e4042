"""Layout on nodes and the scripts of a Slurm job; nothing here needs Slurm or a GPU."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from megatron_distill.recipes import clusters, qwen3, tiny

from megatron_distill.config import ParallelConfig, RunConfig, ServersConfig, StudentConfig
from megatron_distill.errors import ConfigError, DistillError
from megatron_distill.launch import cluster
from megatron_distill.launch.job_scripts import RUN_VARIABLE, task_script
from megatron_distill.launch.launch import require_success, trainer_log_size
from megatron_distill.launch.nodes import ClusterProfile, Group, groups_of, require_mounted, seconds_of
from megatron_distill.launch.signals import Interrupted
from megatron_distill.runs.run_folder import RunFolder, write_json
from tests.support.waiting import HANG_S, wait_until

GOLDEN = Path(__file__).parent / "golden"
H100 = clusters.example_h100()


def config_of(tp: int = 1, dp: int = 1, **servers: int) -> RunConfig:
    return RunConfig(student=StudentConfig(parallel=ParallelConfig(tp=tp, dp=dp)), servers=ServersConfig(**servers))


# --- layout -----------------------------------------------------------------------------------------------------------


def test_a_run_that_fits_one_gpu_node_is_one_node() -> None:
    """Trainer and servers share its GPUs, in one group."""
    assert groups_of(config_of(dp=4, student_replicas=2, teacher_replicas=2), H100) == [Group("run", 1, 1, 8)]


def test_larger_runs_get_groups_of_nodes_with_the_trainer_first() -> None:
    """16 ranks on two nodes; eight one-GPU servers on one; three two-GPU servers on one, not spread over more."""
    groups = groups_of(config_of(tp=4, dp=4, student_replicas=8, teacher_replicas=3, teacher_tp=2), H100)
    assert groups == [Group("trainer", 2, 1, 8), Group("student", 1, 8, 1), Group("teacher", 1, 3, 2)]


def test_cpu_nodes_carry_as_many_ranks_and_servers_as_the_profile_says() -> None:
    """Two ranks lie on two nodes, or on one that takes two tasks."""
    lab = clusters.lab()
    assert groups_of(config_of(tp=2), lab) == [
        Group("trainer", 2, 1, 1),
        Group("student", 1, 1, 1),
        Group("teacher", 1, 1, 1),
    ]
    wide = replace(lab, tasks_per_cpu_node=2)
    assert groups_of(config_of(tp=2), wide)[0] == Group("trainer", 1, 1, 2)


@pytest.mark.parametrize("replicas", range(1, 40))
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_layout_places_each_server_once_and_overfills_no_node(replicas: int, tp: int) -> None:
    """For any number of servers: all are placed within the nodes' GPUs, or the error names a number that can be."""
    config = config_of(dp=16, student_replicas=replicas, student_tp=tp)
    try:
        group = groups_of(config, H100)[1]
    except ConfigError as error:
        remedy = int(re.search(r"Set it to (\d+)", str(error))[1])
        assert remedy > replicas
        group = groups_of(config_of(dp=16, student_replicas=remedy, student_tp=tp), H100)[1]
        replicas = remedy
    assert group.num_nodes * group.tasks_per_node == replicas
    assert group.tasks_per_node * group.slots_per_task <= H100.gpus_per_node


def test_what_does_not_divide_into_nodes_is_refused_all_at_once() -> None:
    """One error names every number that leaves part of a node over."""
    with pytest.raises(ConfigError) as caught:
        groups_of(config_of(dp=12, student_replicas=9, teacher_tp=16), H100)
    for where in (
        "student.parallel: tp * pp * cp * dp = 12",
        "servers.student_replicas = 9",
        "servers.teacher_tp = 16",
    ):
        assert where in str(caught.value)


# --- scripts ----------------------------------------------------------------------------------------------------------


def test_secrets_do_not_enter_a_profile() -> None:
    """Job scripts are readable files, so a variable that looks like a secret is refused, and its value is not repeated."""
    with pytest.raises(ConfigError, match="HF_TOKEN") as caught:
        replace(H100, env={"HF_TOKEN": "hf_0123456789", "NCCL_DEBUG": "WARN"})
    assert "hf_0123456789" not in str(caught.value)


SECRETS = (
    "OPENAI_KEY",
    "GITHUB_PAT",
    "DB_PWD",
    "SSH_PRIVATE_KEY",
    "WANDB_API_KEY",
    "MY_PASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "X_PASS",
)
OTHERS = (
    "TOKENIZERS_PARALLELISM",
    "PATH",
    "LD_LIBRARY_PATH",
    "MAX_TOKENS",
    "NCCL_DEBUG",
    "MONKEY",
    "BYPASS",
    "KEYBOARD",
)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_told_by_the_words_of_its_name_wherever_it_stands(name: str) -> None:
    """As a variable, in a line of bash, in a directive; and its value is not repeated."""
    for where, value in {
        "env": {name: "hush1"},
        "setup": ("module load cuda", f"export A=1 {name}=hush1"),
        "sbatch": {"export": f"ALL,{name}=hush1"},
    }.items():
        with pytest.raises(ConfigError, match=f"{where} = {name}: looks like a secret") as caught:
            replace(H100, **{where: value})
        assert "hush1" not in str(caught.value)


@pytest.mark.parametrize("name", OTHERS)
def test_a_name_that_only_holds_the_letters_of_a_secret_passes(name: str) -> None:
    """TOKENIZERS_PARALLELISM is no token."""
    assert replace(H100, env={name: "1"}, setup=(f"export {name}=1",)).env == {name: "1"}


@pytest.mark.parametrize("role", ["run", "trainer", "student", "teacher"])
def test_scripts_are_sound_bash_with_awkward_values(role: str, tmp_path: Path) -> None:
    """Quotes, blanks and dollars in paths and values reach the role unchanged: a stand-in for Python prints them."""
    folder = RunFolder(tmp_path / "it's a $(touch run)")
    folder.create()
    fake_python = tmp_path / "python"
    fake_python.write_text('#!/bin/bash\nprintf "%s\\n" "$AWKWARD" "$@"\n')
    fake_python.chmod(0o755)
    profile = replace(H100, python=str(fake_python), env={"AWKWARD": "a \"$HOME\" 'b'"}, setup=("true",))
    script = task_script(Group(role, 2, 2, 2), profile)
    environment = os.environ | {
        RUN_VARIABLE: str(folder.root),
        "SLURM_NODEID": "1", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "TRAINER_HOST": "n1", "TRAINER_PORT": "20001"
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == (1 if role in ("student", "teacher") else 0)  # a server must not end
    [log] = folder.logs.glob("*.out")
    said = log.read_text().splitlines()
    assert said[0] == "a \"$HOME\" 'b'"
    assert str(folder.root) in said
    if role == "trainer":
        assert {"--node-rank=1", "--master-addr=n1", "--master-port=20001", "--nnodes=2"} <= set(said)


def test_each_server_of_a_node_gets_gpus_of_its_own(tmp_path: Path) -> None:
    """Four tasks of two GPUs share eight, by their number on the node."""
    folder = RunFolder(tmp_path)
    folder.create()
    fake_python = tmp_path / "python"
    fake_python.write_text('#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES"\n')
    fake_python.chmod(0o755)
    script = task_script(Group("teacher", 1, 4, 2), replace(H100, python=str(fake_python)))
    for local in range(4):
        environment = os.environ | {
            RUN_VARIABLE: str(tmp_path),
            "SLURM_PROCID": str(local),
            "SLURM_LOCALID": str(local),
        }
        subprocess.run(["bash", "-c", script], env=environment, check=False)
    seen = [(folder.logs / f"teacher-{index}.out").read_text().strip() for index in range(4)]
    assert seen == ["0,1", "2,3", "4,5", "6,7"]


def plain(text: str, folder: RunFolder) -> str:
    """A script without what differs from one machine, or one dry run, to the next."""
    text = re.sub(r"run_\d{10,}", "run_ID", text)
    return text.replace(str(folder.root), "/RUN").replace(os.getcwd(), "/CWD").replace(sys.executable, "python")


@pytest.mark.parametrize("role", ["trainer", "run", "student"])
def test_a_warning_to_the_shell_alone_reaches_the_trainer_and_no_server(role: str, tmp_path: Path) -> None:
    """What a Slurm that tracks processes by cgroups does: only the task's shell gets the signal. It leaves the file that the
    trainer looks for, the role goes on, and its exit code is the task's."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    fake_python = tmp_path / "python"
    fake_python.write_text('#!/bin/bash\necho started; while [ ! -e "$GO" ]; do sleep 0.05; done; exit 7\n')
    fake_python.chmod(0o755)
    go = tmp_path / "go"
    profile = replace(H100, python=str(fake_python), env={"GO": str(go)}, setup=())
    environment = os.environ | {
        RUN_VARIABLE: str(folder.root),
        "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "TRAINER_HOST": "n1", "TRAINER_PORT": "20001"
    }  # fmt: skip
    script = task_script(Group(role, 1, 1, 1), profile)
    with subprocess.Popen(["bash", "-c", script], env=environment) as shell:
        wait_until(lambda: any(path.read_text() for path in folder.logs.glob("*.out")), "the role's start")
        for _ in range(3):
            shell.send_signal(signal.SIGUSR1)
        if role != "student":
            wait_until(folder.stop_requested.exists, "the file")
        assert shell.poll() is None
        go.touch()
        assert shell.wait(timeout=HANG_S) == (1 if role == "student" else 7)
    assert folder.stop_requested.exists() == (role != "student")


HOSTILE = "x'$(touch owned)`touch owned`;\"| &\n"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("account", HOSTILE), ("partition", "a b"), ("name", ""), ("time_limit", "abc"), ("time_limit", "0:05:00"),
        ("socket_interface", "ib0;true"), ("container_image", "x;touch owned"), ("container_mounts", ("/a:/a --x",)),
        ("setup", "module load cuda"), ("setup", ("a\nb",)), ("env", {"A=1; touch owned; B": "1"}), ("env", {"A": "x\ny"}),
        ("sbatch", {"qos": "high\n#SBATCH --wrap=x"}), ("sbatch", {"q os": "high"}),
    ],
)  # fmt: skip
def test_a_profile_that_a_script_would_break_on_or_run_is_refused(field: str, value: object) -> None:
    """No value of a profile can end a line of the script or begin a command."""
    with pytest.raises(ConfigError, match=re.escape(field)):
        replace(H100, **{field: value})


@pytest.mark.parametrize("name", ["a b", "$(touch owned)", "it's", "a;b", "a\nb", 'a"b', "`x`"])
def test_a_run_folder_that_slurms_scripts_would_break_on_is_refused(name: str, tmp_path: Path) -> None:
    """NeMo-Run names it without quotes in mkdir and srun lines: nothing is written, nothing is run."""
    with pytest.raises(ConfigError, match="run folder"):
        cluster.dry_run(tiny.quickstart(), clusters.lab(), RunFolder(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_hostile_values_reach_the_roles_unchanged_through_nemo_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a profile may say that is no plain word, a variable's value, is quoted in what NeMo-Run would submit, and
    running the script of a role runs nothing of it."""
    monkeypatch.chdir(tmp_path)
    value = HOSTILE.strip()
    fake_python = tmp_path / "python"
    fake_python.write_text('#!/bin/bash\nprintf "%s\\n" "$AWKWARD"\n')
    fake_python.chmod(0o755)
    folder = RunFolder(tmp_path / "run")
    folder.create()
    profile = replace(clusters.lab(), python=str(fake_python), env={"AWKWARD": value})
    scripts = cluster.dry_run(tiny.quickstart(), profile, folder)
    variables = {RUN_VARIABLE: str(folder.root), "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
    variables |= {"TRAINER_HOST": "n1", "TRAINER_PORT": "20001"}
    for name in ("roles-0.sh", "roles-1.sh", "roles-2.sh"):
        subprocess.run(["bash", "-c", scripts[name]], env=os.environ | variables, check=False)
    assert {log.read_text().strip() for log in folder.logs.glob("*-0.out")} == {value}
    assert not list(tmp_path.rglob("owned"))


def test_what_containers_would_not_see_is_refused() -> None:
    """Everything of a run lies below a mount, under the same path; all that does not is named."""
    config = qwen3.b06_from_4b_1x8_4096()
    with pytest.raises(ConfigError) as caught:
        require_mounted(config, replace(H100, container_mounts=("/shared:/data",)), {"run folder": Path("/shared/run")})
    for where in ("run folder = /shared/run", "student.path", "data.train_path"):
        assert where in str(caught.value)
    require_mounted(config, replace(H100, container_mounts=(f"{Path.cwd()}:{Path.cwd()}",)), {"cwd": Path.cwd()})
    require_mounted(config, replace(H100, container_image=""), {"run folder": Path("/anywhere")})


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("90:30", 5430), ("4:00:00", 14_400), ("2-12", 216_000), ("1-0:30:0", 88_200), ("1-1:30", 91_800)],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit: str, seconds: int) -> None:
    """Minutes alone, hours, days: every form that sbatch takes."""
    assert seconds_of(limit) == seconds


def test_an_image_has_its_own_interpreter() -> None:
    """Without an image it is the one that runs now."""
    assert replace(H100, python="").interpreter == "python3"
    assert clusters.lab().interpreter == sys.executable


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "profile"),
    [
        ("lab", tiny.quickstart(), clusters.lab()),
        ("one_node", qwen3.b06_from_4b_1x8_4096(), H100),
        ("four_nodes", qwen3.b8_from_32b_4x8_4096(), H100),
    ],
)
def test_the_generated_job_is_the_golden_one(
    name: str, config: RunConfig, profile: ClusterProfile, tmp_path: Path
) -> None:
    """The whole job as it would be submitted, container or not. After a wanted change: GOLDEN=write pytest tests/cluster."""
    folder = RunFolder(tmp_path)
    mounts = tuple(f"{path}:{path}" for path in (tmp_path, Path.cwd()))
    profile = replace(profile, python="python", container_mounts=mounts if profile.container_image else ())
    scripts = cluster.dry_run(config, profile, folder)
    for script in scripts.values():
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    text = "\n".join(f"# === {file} ===\n{plain(script, folder)}" for file, script in scripts.items())
    golden = GOLDEN / f"{name}.sh"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()


# --- the verdict ------------------------------------------------------------------------------------------------------


def test_a_run_is_judged_by_its_folder(tmp_path: Path) -> None:
    """A result counts even if Slurm calls the job failed (a server may die at the very end); else the first cause does."""
    folder = RunFolder(tmp_path)
    folder.create()
    with pytest.raises(DistillError, match="Slurm job 7 = COMPLETED"):
        require_success(folder, "Slurm job 7 = COMPLETED")
    write_json(folder.errors / "trainer-0.json", {"time": 2.0, "role": "trainer-0", "message": "lost a server"})
    write_json(folder.errors / "student-0.json", {"time": 1.0, "role": "student-server-0", "message": "out of memory"})
    with pytest.raises(DistillError, match="student-server-0 failed: out of memory"):
        require_success(folder, "Slurm job 7 = FAILED")
    write_json(folder.finished, {"step": 3})
    require_success(folder, "Slurm job 7 = FAILED")


def test_a_killed_rank_is_the_cause_of_what_the_others_report(tmp_path: Path) -> None:
    """torchrun knows who was killed; the other rank only sees its connection break. What an earlier start left is not read."""
    folder = RunFolder(tmp_path)
    folder.create()
    log = folder.logs / "trainer.out"
    said = "Root Cause (first observed failure):\n[0]:\n  rank      : {} (local_rank: {})\n  exitcode  : {} (pid: 7)\n"
    log.write_text(said.format(0, 0, -11))
    since = trainer_log_size(folder)
    write_json(folder.errors / "trainer-0.json", {"time": 1.0, "role": "trainer-0", "message": "Connection reset"})
    with pytest.raises(DistillError, match="trainer-0 failed: Connection reset"):
        require_success(folder, "trainer = ended early", since)
    with log.open("a") as file:
        file.write(said.format(1, 1, -9))
    with pytest.raises(DistillError, match=r"trainer rank 1 was ended by SIGKILL .*memory runs out"):
        require_success(folder, "trainer = ended early", since)


@pytest.mark.parametrize(
    ("state", "ended"),
    [("COMPLETED", True), ("CANCELLED by 0", True), ("TIMEOUT", True), ("PREEMPTED", True), ("PENDING", False),
     ("REQUEUED", False), ("COMPLETING", False), ("UNKNOWN", False)],
)  # fmt: skip
def test_requeued_and_unknown_jobs_have_not_ended(state: str, ended: bool) -> None:
    """Only a state that is final ends a job."""
    assert cluster.has_ended(state) is ended


def test_a_profile_is_found_by_name_or_file(tmp_path: Path) -> None:
    """A misspelt name is answered with the nearest."""
    assert cluster.load_profile("lab").name == "lab"
    file = tmp_path / "mine.py"
    file.write_text("from megatron_distill.launch.nodes import ClusterProfile\nfrom megatron_distill.recipes import clusters\n"
                    "def here() -> ClusterProfile:\n    return clusters.lab()\n")  # fmt: skip
    assert cluster.load_profile(f"{file}:here").name == "lab"
    with pytest.raises(ConfigError, match=r"Did you mean clusters\.lab\?"):
        cluster.load_profile("labb")


def test_ctrl_c_ends_the_following_and_not_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and how to come back."""
    folder = RunFolder(tmp_path)
    folder.create()

    def interrupted(*_: object) -> None:
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(cluster, "ensure_job", lambda *_: ("42", ""))
    monkeypatch.setattr(cluster, "follow", interrupted)
    with pytest.raises(Interrupted) as stop:
        cluster.train(H100, RunConfig(), folder)
    assert stop.value.told == "Slurm job 42 goes on; the same command follows it again, scancel 42 stops it"


def test_a_run_folder_takes_one_job_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiting or running job of the folder is found again, so that launch follows it; an ended one is not. squeue forgets
    jobs after minutes, and sacct is asked then; the stand-ins here say what a file says."""
    folder = RunFolder(tmp_path / "run")
    (folder.root / "launch").mkdir(parents=True)
    for name in ("squeue", "sacct"):
        (tmp_path / name).write_text(f'#!/bin/sh\ncat {tmp_path}/{name}.txt\necho "$@" >> {tmp_path}/asked.txt\n')
        (tmp_path / name).chmod(0o755)
        (tmp_path / f"{name}.txt").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert cluster.active_job(folder) is None
    write_json(folder.root / "launch" / "job.json", {"job_id": "42", "cluster": "lab"})
    for waiting in ("PENDING\n", "RUNNING\nRUNNING\n", "REQUEUED\n", "COMPLETING\n"):
        (tmp_path / "squeue.txt").write_text(waiting)
        assert cluster.active_job(folder) == "42"
    (tmp_path / "squeue.txt").write_text("")
    assert cluster.active_job(folder) == "42"  # nobody answers: rather wait than submit a second one
    (tmp_path / "sacct.txt").write_text("CANCELLED by 0\n")
    assert cluster.active_job(folder) is None
    (tmp_path / "sacct.txt").write_text("")
    (tmp_path / "squeue").write_text("#!/bin/sh\necho slurm_load_jobs error: Invalid job id specified >&2; exit 1\n")
    assert cluster.job_state("42") == "FORGOTTEN" and cluster.active_job(folder) is None
    assert all("42" in line for line in (tmp_path / "asked.txt").read_text().splitlines())
