"""A long run of short steps, and what each of its processes holds as it goes on: memory, threads, open files, disk.

    python tools/soak.py FOLDER              1,000 steps: half an hour on two idle cores
    python tools/soak.py FOLDER --figure soak.svg

Every five seconds a line is added to FOLDER/soak.jsonl. At the end, the growth of each process from the warm-up's end to the
last step is printed; memory is what a process alone holds (USS), which no neighbour changes that comes, goes or shares pages.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_distill.pages.plots import Panel, Series, curves
from megatron_distill.runs.run_folder import RunFolder, append, read_lines

_COMMAND = (sys.executable, "-m", "megatron_distill.cli.main", "train")
RECIPE = (
    "tiny.quickstart",
    "student.parallel.tp=1",
    "rollouts.prompts_per_step=4",
    "micro_batch_rollouts=4",
    "curriculum.horizon_tokens=8",
    "save_every_steps=50",
    "evaluation.every_steps=100",
    "evaluation.num_problems=4",
    "evaluation.samples_per_problem=1",
    "evaluation.max_response_tokens=8",
    "evaluation.entropy_problems=2",
)
WARM_UP_FRAC = 0.2
MEASURES = {
    "memory_mib": "memory, MiB",
    "threads": "threads",
    "files": "open files",
}
_EVERY_S = 5.0


def soak(root: Path, num_steps: int) -> int:
    """Run to the end and watch; the run's exit code."""
    run = RunFolder(root / "run")
    root.mkdir(parents=True, exist_ok=True)
    with (root / "run.out").open("ab") as out:
        launcher = subprocess.Popen(
            [*_COMMAND, *RECIPE, f"num_steps={num_steps}", "--run-dir", str(run.root)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    while launcher.poll() is None:
        record = {
            "step": len(run.steps()),
            "disk_mib": _disk_mib(run.root),
            "processes": list(_processes(launcher.pid)),
        }
        append(root / "soak.jsonl", record)
        time.sleep(_EVERY_S)
    return launcher.returncode


def _processes(launcher: int) -> Iterator[dict[str, Any]]:
    """What each process of the run holds now."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (root := psutil.Process(launcher), *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                yield {
                    "pid": process.pid,
                    "name": _name(process.cmdline()),
                    "memory_mib": process.memory_full_info().uss / 2**20,
                    "threads": process.num_threads(),
                    "files": process.num_fds(),
                }


def _name(words: list[str]) -> str:
    """What a process is, in a word or two."""
    line = " ".join(words)
    kinds = {
        "sglang::scheduler": "server's scheduler",
        "sglang::detokenizer": "server's detokenizer",
        "launch.keeper": "launcher's side",
        "torch.distributed.run": "launcher's side",
        "launch.roles trainer": "trainer",
        "launch.roles": "server's role",
        "launch_server": "server",
        "multiprocessing": "Megatron's helpers",
        "cli.main": "launcher's side",  # with its keeper and torchrun
    }
    return next((name for words, name in kinds.items() if words in line), "other")


def _disk_mib(folder: Path) -> float:
    """What the run folder takes, without the checkpoints."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() and "checkpoints" not in path.parts else 0
    return total / 2**20


def by_name(root: Path, measure: str) -> dict[str, Series]:
    """The curve of each kind of process that lived as long as steps were made; several of a kind together."""
    every = list(read_lines(root / "soak.jsonl"))
    records = [record for record in every if 0 < record["step"] < every[-1]["step"]]
    steps = np.array([record["step"] for record in records], dtype=float)
    seen: dict[str, list[float]] = {}
    for index, record in enumerate(records):
        for process in record["processes"]:
            values = seen.setdefault(process["name"], [0.0] * len(records))
            values[index] += process[measure]
    lasting = {name: values for name, values in seen.items() if np.mean(np.array(values) > 0) > 0.8}
    return {
        name: Series(name, steps, np.where(np.array(values) > 0, values, np.nan))
        for name, values in sorted(lasting.items())
    }


def table(root: Path) -> str:
    """The growth of each kind of process after the warm-up: Markdown."""
    lines = [
        "| process | memory, MiB | a thousand steps add | threads | open files |",
        "|---|---|---|---|---|",
    ]
    curves_of = {measure: by_name(root, measure) for measure in MEASURES}
    for name, memory in curves_of["memory_mib"].items():
        spans = []
        for measure in ("threads", "files"):
            values = _after_warm_up(curves_of[measure][name])[1]
            low, high = int(values.min()), int(values.max())
            spans.append(f"{low}" if low == high else f"{low} to {high}")
        steps, values = _after_warm_up(memory)
        slope = np.polyfit(steps, values, 1)[0] * 1000
        lines.append(f"| {name} | {values[0]:.0f} to {values[-1]:.0f} | {slope:+.1f} | {spans[0]} | {spans[1]} |")
    records = list(read_lines(root / "soak.jsonl"))
    disk = Series(
        "disk", np.array([one["step"] for one in records], float), np.array([one["disk_mib"] for one in records])
    )
    steps, values = _after_warm_up(disk)
    lines.append(
        f"\nThe run folder without its checkpoints grows by {np.polyfit(steps, values, 1)[0] * 1024:.1f} KiB a step."
    )
    return "\n".join(lines)


def _after_warm_up(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values after the warm-up."""
    kept = (series.steps >= WARM_UP_FRAC * series.steps.max()) & ~np.isnan(series.values)
    return series.steps[kept], series.values[kept]


def figure(root: Path, out: Path) -> None:
    """One panel a measure, a curve a kind of process."""
    panels = [Panel(label, list(by_name(root, measure).values()), log=True) for measure, label in MEASURES.items()]
    out.write_text(curves("soak", panels, width_in=7))


def main(argv: list[str] | None = None) -> int:
    """Parse and run; 0 if the run came to its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the run and the records")
    parser.add_argument("--steps", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--figure", type=Path, metavar="SVG", help="only draw what was recorded, and print the table")
    options = parser.parse_args(argv)
    root = options.folder.absolute()
    code = 0 if options.figure else soak(root, options.steps)
    if not by_name(root, "memory_mib"):
        raise SystemExit(
            f"{root}: no soak.jsonl with steps in it. Its run.out tells why, if this program made one there."
        )
    if options.figure:
        figure(root, options.figure)
    print(table(root))
    return code


if __name__ == "__main__":
    sys.exit(main())
