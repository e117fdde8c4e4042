"""Processes of a run on one machine, GPUs shared out among them, and how servers are found."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from megatron_distill.recipes import clusters, tiny

from megatron_distill.config import (
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    ServersConfig,
    StudentConfig,
    problems_of,
)
from megatron_distill.errors import ConfigError, DistillError, ServerError
from megatron_distill.launch import endpoints
from megatron_distill.launch.launch import num_gpus
from megatron_distill.launch.local import local_tasks, visible_gpus
from megatron_distill.launch.nodes import groups_of
from megatron_distill.launch.roles import server_spec
from megatron_distill.launch.threads import Threads, num_cores, threads_of
from megatron_distill.runs.run_folder import RunFolder
from tests.support.waiting import HANG_S

CONFIG = RunConfig(
    student=StudentConfig(parallel=ParallelConfig(tp=2, dp=2)),
    servers=ServersConfig(student_replicas=2, teacher_replicas=1, teacher_tp=2),
)


def test_every_gpu_has_one_owner(tmp_path: Path) -> None:
    """Ranks and servers get disjoint GPUs of the right number, in the order of the machine's."""
    tasks = local_tasks(CONFIG, RunFolder(tmp_path), [str(i) for i in range(8)])
    shares = {task.name: task.env["CUDA_VISIBLE_DEVICES"] for task in tasks}
    assert shares == {"trainer": "0,1,2,3", "student-0": "4", "student-1": "5", "teacher-0": "6,7"}
    assert num_gpus(CONFIG) == 8


def test_too_few_gpus_are_refused_and_none_are_fine(tmp_path: Path) -> None:
    """A machine with some GPUs but too few would fail late and obscurely; one without runs everything on its cores."""
    with pytest.raises(DistillError, match="GPUs = 7: the run takes 8"):
        local_tasks(CONFIG, RunFolder(tmp_path), [str(i) for i in range(7)])
    tasks = local_tasks(CONFIG, RunFolder(tmp_path), [])
    assert [task.name for task in tasks] == ["trainer", "student-0", "student-1", "teacher-0"]
    assert all(task.env == {"OMP_NUM_THREADS": "1"} for task in tasks)
    assert "--nproc-per-node=4" in tasks[0].command


def test_one_gpu_may_hold_a_whole_run(tmp_path: Path) -> None:
    """Shared GPUs are the trainer's, and servers lie on them in turn, each told how much it may take; tp still takes distinct
    ones. Without a GPU nothing of it is heard of. NCCL, which refuses two processes on a GPU, and several nodes are refused."""
    servers = replace(CONFIG.servers, shared_gpu_frac=0.3)
    small = replace(CONFIG, student=StudentConfig(), servers=replace(servers, teacher_tp=1))
    assert {task.env["CUDA_VISIBLE_DEVICES"] for task in local_tasks(small, RunFolder(tmp_path), ["0"])} == {"0"}
    tasks = local_tasks(replace(CONFIG, servers=servers), RunFolder(tmp_path), list("01234567"))
    assert [task.env["CUDA_VISIBLE_DEVICES"] for task in tasks] == ["0,1,2,3", "0", "1", "2,3"]
    assert server_spec(small, "student", 0, "h", "cuda").extra_args == ("--mem-fraction-static=0.3",)
    assert server_spec(small, "student", 0, "h", "cpu").extra_args == ()
    by_broadcast = replace(tiny.quickstart(), servers=ServersConfig(shared_gpu_frac=0.3, weight_sync="broadcast"))
    assert any("NCCL refuses" in problem for problem in problems_of(by_broadcast))
    with pytest.raises(ConfigError, match=r"servers\.shared_gpu_frac = 0\.3: is for a run on one node"):
        groups_of(replace(CONFIG, servers=servers), replace(clusters.example_h100(), gpus_per_node=2))


def test_gpus_that_the_caller_hid_stay_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES decides where it is set; else all GPUs are counted from 0, whatever the numbers of their files."""
    for number in (0, 1, 2, 10):
        (tmp_path / f"nvidia{number}").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(tmp_path) == ["0", "1", "2", "3"]  # as CUDA counts those that a container was given
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-8f3a")
    assert visible_gpus(tmp_path) == ["2", "GPU-8f3a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus(tmp_path) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")  # as a Slurm with pretended GPUs sets it
    assert visible_gpus(tmp_path / "none") == []


def test_servers_are_found_in_index_order_whenever_they_come(tmp_path: Path) -> None:
    """Who asks waits for all of them, and is told which did not come."""
    folder = RunFolder(tmp_path)
    folder.create()

    def late() -> None:
        for index in (2, 0, 1):
            time.sleep(0.1)
            endpoints.announce(folder, "student", index, f"http://node{index}:1")

    thread = threading.Thread(target=late)
    thread.start()
    urls = endpoints.announced(folder, "student", 3, timeout_s=HANG_S)
    thread.join()
    assert urls == ("http://node0:1", "http://node1:1", "http://node2:1")
    endpoints.forget(folder)
    with pytest.raises(ServerError, match="student-0, student-1 did not start in time"):
        endpoints.announced(folder, "student", 2, timeout_s=0)


def test_waiting_for_a_server_ends_when_a_role_has_failed(tmp_path: Path) -> None:
    """Its cause is raised at once, not the timeout that would follow."""
    folder = RunFolder(tmp_path)
    folder.create()
    folder.fail("teacher-server-0", "no such model")
    with pytest.raises(ServerError, match="no such model"):
        endpoints.announced(folder, "teacher", 1, timeout_s=600)


@pytest.mark.parametrize(
    ("cpu_threads", "staleness", "cores", "expected"),
    [
        (1, 0, 64, Threads(1, 1)),
        (6, 1, 64, Threads(6, 6)),
        (0, 0, 64, Threads(16, 16)),  # four ranks; two students and a teacher of two
        (0, 1, 64, Threads(8, 8)),
        (0, 2, 2, Threads(1, 1)),
    ],
)
def test_processes_share_the_cores_with_those_that_run_at_the_same_time(
    cpu_threads: int, staleness: int, cores: int, expected: Threads
) -> None:
    """One thread each unless told otherwise, so that results do not depend on the machine; told to share, ranks and servers
    take turns at staleness 0 and not above; nobody has none."""
    config = replace(CONFIG, cpu_threads=cpu_threads, rollouts=RolloutConfig(max_staleness_steps=staleness))
    assert threads_of(config, cores) == expected


def test_a_containers_share_of_the_cores_counts(tmp_path: Path) -> None:
    """A quota of half a core is one; without a quota, or above what the process is bound to, the binding counts."""
    bound = len(os.sched_getaffinity(0))
    for text, cores in (("50000 100000", 1), ("max 100000", bound), (f"{1000 * 100000} 100000", bound)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert num_cores(tmp_path / "cpu.max") == cores
    assert num_cores(tmp_path / "none") == bound
