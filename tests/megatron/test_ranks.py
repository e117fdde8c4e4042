"""A rank's place, and its end, without a process of Megatron's."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_distill.megatron.ranks import find_ranks
from megatron_distill.runs.run_folder import RunFolder
from tests.support.waiting import HANG_S, wait_until_none_names


def test_ranks_wait_for_each_other_as_long_as_megatron_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives a new group 30 minutes whatever the default group has; a server's start or an evaluation may take longer."""
    waits: list[timedelta] = []

    def new_group(*_: Any, backend: str, timeout: timedelta) -> str:
        waits.append(timeout)
        return backend

    mpu = SimpleNamespace(
        get_data_parallel_rank=lambda **_: 1,
        get_data_parallel_world_size=lambda **_: 2,
        is_pipeline_last_stage=lambda: True,
        get_tensor_model_parallel_rank=lambda: 0,
    )
    monkeypatch.setitem(sys.modules, "megatron.core", SimpleNamespace(mpu=mpu))
    arguments = SimpleNamespace(distributed_timeout_minutes=120)
    monkeypatch.setitem(sys.modules, "megatron.training", SimpleNamespace(get_args=lambda: arguments))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda box, value, group: box.__setitem__(slice(None), [0, 1]))
    monkeypatch.setattr(dist, "new_group", new_group)
    ranks = find_ranks()
    assert ranks.leaders == (0, 1) and ranks.is_leader and ranks.is_reporter
    assert waits == [timedelta(minutes=120)] * 4  # of all, of their threads, and of each replica


@pytest.mark.slow
@pytest.mark.parametrize(("code", "told"), [(1, True), (0, False)])
def test_an_exit_of_megatrons_is_a_failure_unless_it_is_polite(code: int, told: bool, tmp_path: Path) -> None:
    """``sys.exit`` raises no Exception: with a code it must leave a cause all the same, or the run would end without one."""
    folder = RunFolder(tmp_path)
    folder.create()
    program = f"""
import sys
from pathlib import Path
from megatron_distill.launch.roles import _failure_reported
from megatron_distill.runs.run_folder import RunFolder
with _failure_reported(RunFolder(Path({str(tmp_path)!r})), "trainer-0"):
    sys.exit({code})
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == code
    failure = folder.first_failure()
    assert (failure is not None) == told
    assert failure is None or failure["message"].startswith(f"SystemExit: {code}.")


@pytest.mark.slow
def test_a_polite_exit_waits_for_no_response(tmp_path: Path) -> None:
    """Threads that still ask servers would hold the process, and a job's nodes, until the longest response has come."""
    program = f"""
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from megatron_distill.launch.roles import _failure_reported
from megatron_distill.runs.run_folder import RunFolder
ThreadPoolExecutor().submit(time.sleep, 2 * {HANG_S})
with _failure_reported(RunFolder(Path({str(tmp_path)!r})), "trainer-0"):
    print("saved")
    sys.exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=HANG_S, check=False)
    assert (done.returncode, done.stdout) == (0, b"saved\n")


@pytest.mark.slow
def test_what_fails_on_a_full_disk_ends_with_its_helpers(tmp_path: Path) -> None:
    """The cause cannot be left in the run folder; it is told in the log, and no process waits for one that has ended."""
    folder = RunFolder(tmp_path)
    folder.create()
    folder.errors.rmdir()
    folder.errors.touch()  # nothing can be written below it
    program = f"""
import errno, subprocess, sys
from pathlib import Path
from megatron_distill.launch.roles import _failure_reported
from megatron_distill.runs.run_folder import RunFolder
with _failure_reported(RunFolder(Path({str(tmp_path)!r})), "trainer-0"):
    helper = [sys.executable, "-c", "import time; time.sleep(600)", {str(tmp_path)!r}]
    subprocess.Popen(helper, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    raise OSError(errno.ENOSPC, "No space left on device", "model.pt")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("No space left on device: 'model.pt'")
    wait_until_none_names(str(tmp_path))
