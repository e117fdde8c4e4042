"""Keeps the processes of a run on one machine: ``python -m megatron_distill.launch.keeper RUN_DIR``, started by ``local``.

    launcher ── keeper ── NeMo-Run job group ── trainer, student servers, teacher servers

A process of its own for three reasons. NeMo-Run waits in threads that swallow Ctrl-C, so the launcher must not wait there.
The keeper adopts whatever its descendants leave (``PR_SET_CHILD_SUBREAPER``), so that nothing gets out of sight. And its
standard input is held by the launcher: however that ends, the kernel closes it, and the keeper ends everything, itself last.
"""

import ctypes
import os
import sys
import threading
from pathlib import Path

from megatron_distill import config as config_module
from megatron_distill.launch import processes
from megatron_distill.launch.launch import import_nemo_run, quiet
from megatron_distill.launch.local import local_tasks, task_script, visible_gpus
from megatron_distill.runs.run_folder import RunFolder

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 20.0


def main() -> None:
    """Start all roles, wait for the trainer, end the rest."""
    folder = RunFolder(Path(sys.argv[1]))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    tag = os.environ[processes.TAG]
    threading.Thread(target=_end_with_launcher, args=(tag,), daemon=True, name="leash").start()
    config = config_module.load(folder.config)
    tasks = local_tasks(config, folder, visible_gpus())
    run = import_nemo_run((folder.root / "launch").absolute())
    scripts = [run.Script(inline=task_script(task, folder)) for task in tasks]
    executors = [run.LocalExecutor() for _ in tasks]
    with quiet(folder.logs / "launcher.log"):
        experiment = run.Experiment("run", executor=run.LocalExecutor(), log_level="WARNING")
        with experiment:
            experiment.add(scripts, executor=executors, name="roles")
            experiment.run(detach=False, tail_logs=False)
    processes.end_tagged(tag, _GRACE_S)
    os._exit(0)  # NeMo-Run's threads may wait for ever for what has just been ended


def _end_with_launcher(tag: str) -> None:
    while os.read(0, 4096):
        pass
    processes.end_tagged(tag, _GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    main()
