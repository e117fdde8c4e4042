"""Break runs on purpose, resume them, and compare what they leave with a run that nothing broke.

    python tools/chaos.py FOLDER                         a few faults: minutes
    python tools/chaos.py FOLDER --faults 60 --seed 7    every kind, at random moments: hours on a small machine
    python tools/chaos.py FOLDER --table                 the table of what was done in FOLDER so far

Disks that fill up need the right to mount one; clocks that jump need `pip install libfaketime`. Without, they are left out.

One run is made whole, in FOLDER/unbroken. Then runs of the same seed are started and broken, one fault a start, and the same
command is typed again until the run has finished. Every finished run must hold the same bits: weights, every number of every
step, every response of every evaluation, one record a step, the same files. After every start nothing may be left running.
Faults are appended to FOLDER/faults.jsonl as they happen, comparisons to FOLDER/compared.jsonl.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import unkind

from megatron_distill.errors import CheckpointError
from megatron_distill.launch import processes
from megatron_distill.runs.run_folder import HELDOUT, RunFolder, append, read_lines

NUM_STEPS = 16
EVALUATED_EVERY_STEPS = 5
_COMMAND = (sys.executable, "-m", "megatron_distill.cli.main", "train")
RECIPE = (
    "tiny.quickstart",
    f"num_steps={NUM_STEPS}",
    "save_every_steps=1",
    "on_damaged_checkpoint=use_previous",
    "student.parallel.tp=1",
    "teacher.transport=in_process",
    "rollouts.prompts_per_step=8",
    "micro_batch_rollouts=4",
    "curriculum.horizon_tokens=24",
    "evaluation.num_problems=4",
    "evaluation.samples_per_problem=1",
    "evaluation.max_response_tokens=24",
    "evaluation.entropy_problems=2",
    f"evaluation.every_steps={EVALUATED_EVERY_STEPS}",
    "servers.hang_timeout_s=60",
)
MARK = "MEGATRON_DISTILL_CHAOS"
START_LIMIT_S = 1800.0  # only ends a hang: a start that takes longer is reported as one
_POLL_S = 0.05
_MEASURED = ("_s", "tokens_per_s")  # numbers of a step that are times, and so differ
_ROUNDED = ("sampler_gap_nats",)
"""Numbers between two programs' log-probs: SGLang's last bit depends on what it batches together."""


# --- one start --------------------------------------------------------------------------------------------------------


class Start:
    """One start of a run, and its processes: none of them outlives the ``with`` block.

    Attributes:
        overrides: of the recipe, for every start of this program; the unbroken run's too.
        clock: what its processes add to the time of day, if that can be changed here; a file that libfaketime reads.
        manners: how its servers treat requests; a file that ``unkind`` reads.
    """

    overrides: ClassVar[tuple[str, ...]] = ()

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        folder.root.parent.mkdir(parents=True, exist_ok=True)
        self.began, self.at = time.monotonic(), time.time()
        self.output = folder.root.parent / f"{folder.root.name}.out"
        self.clock = folder.root.parent / f"{folder.root.name}.clock"
        self.clock.write_text("+0")
        self.manners = folder.root.parent / f"{folder.root.name}.manners"
        self.manners.write_text("")
        plugin = unkind.entry_points(folder.root.parent / f"{folder.root.name}.plugin", self.manners)
        with self.output.open("ab") as out:
            self.process = subprocess.Popen(
                [*_COMMAND, *RECIPE, *self.overrides, "--run-dir", str(folder.root)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1"} | _changeable_clock(self.clock) | plugin,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while pids := self.pids():  # in a session of their own, which no Ctrl-C reaches
            processes.send(pids, signal.SIGKILL)
            time.sleep(_POLL_S)
        self.process.wait()

    def running(self) -> bool:
        return self.process.poll() is None

    def pids(self) -> list[int]:
        """Every process of this start, the launcher first, wherever it is now."""
        wanted = f"{MARK}={self.mark}".encode()
        found: dict[int, None] = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError, ValueError):
                if wanted in path.read_bytes().split(b"\0"):
                    pid = int(path.parent.name)
                    found |= dict.fromkeys([pid, *processes.descendants(pid)])
        return [pid for pid in sorted(found) if processes.is_alive(pid)]

    def named(self, *words: str) -> list[int]:
        """Those whose command line holds all words."""
        return [pid for pid in self.pids() if all(word in " ".join(processes.arguments_of(pid)) for word in words)]

    def ranks(self) -> list[int]:
        return [
            pid
            for pid in self.named("launch.roles trainer")
            if "torch.distributed.run" not in processes.arguments_of(pid)
        ]

    def servers(self) -> list[int]:
        """SGLang's own processes: whatever runs below the servers' roles."""
        roles = self.named("launch.roles student-server") + self.named("launch.roles teacher-server")
        return [pid for role in roles for pid in processes.descendants(role)]

    def wait(self, limit_s: float = START_LIMIT_S) -> int | None:
        """The exit code; None if it did not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(limit_s)
        return None

    def left(self, patience_s: float = 90.0) -> list[str]:
        """What still runs so long after the launcher's end."""
        deadline = time.monotonic() + patience_s
        while (pids := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return [" ".join(processes.arguments_of(pid))[:120] for pid in pids]


def _changeable_clock(clock: Path) -> dict[str, str]:
    """An environment in which the time of day, and it alone, is off by what ``clock`` holds; empty without libfaketime."""
    if importlib.util.find_spec("libfaketime") is None:
        return {}
    import libfaketime

    library = Path(libfaketime.__file__).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


# --- moments ----------------------------------------------------------------------------------------------------------

Moment = Callable[[Start, random.Random], bool]
"""Waits for a moment of a start; whether it came before the start ended."""


def _until(start: Start, holds: Callable[[], bool]) -> bool:
    while start.running():
        if holds():
            return True
        time.sleep(_POLL_S)
    return False


def _steps(folder: RunFolder) -> int:
    return max((int(record["step"]) for record in read_lines(folder.metrics)), default=0)


def starting(start: Start, rng: random.Random) -> bool:
    """While the processes come up."""
    time.sleep(rng.uniform(0, 20))
    return start.running()


def stepping(start: Start, rng: random.Random) -> bool:
    """At any time of the next two steps."""
    wanted = min(NUM_STEPS - 1, max(_saved(start.folder), _steps(start.folder)) + rng.randint(1, 2))
    came = _until(start, lambda: _steps(start.folder) >= wanted)
    time.sleep(rng.uniform(0, 1.5))
    return came and start.running()


def saving(start: Start, rng: random.Random) -> bool:
    """While a checkpoint is written: its directory is there, the tracker names the one before."""
    folder, resumed = start.folder, _saved(start.folder)

    def is_saving() -> bool:
        present = folder.checkpoints.glob("iter_*")
        written = [int(path.name[5:]) for path in present if path.stat().st_mtime > start.at]
        return max(written, default=0) > max(resumed, _saved(folder))

    came = _until(start, is_saving)
    time.sleep(rng.uniform(0, 0.05))
    return came and start.running()


def syncing(start: Start, rng: random.Random) -> bool:
    """While weights are written for the servers, or loaded by them."""
    resumed = _saved(start.folder)
    seen = _until(start, lambda: _steps(start.folder) > resumed and any(start.folder.sync.glob(".v*")))
    time.sleep(rng.uniform(0, 0.1))
    return seen and start.running()


def evaluating(start: Start, rng: random.Random) -> bool:
    """In the evaluation of a step whose checkpoint is written."""
    folder, resumed = start.folder, _saved(start.folder)

    def is_evaluating() -> bool:
        step = _saved(folder)
        is_due = step % EVALUATED_EVERY_STEPS == 0 or step == NUM_STEPS
        return step > resumed and is_due and not folder.evaluation(HELDOUT, step).exists()

    came = _until(start, is_evaluating)
    time.sleep(rng.uniform(0, 0.2))
    return came and start.running()


def ending(start: Start, rng: random.Random) -> bool:
    """Between the last checkpoint and the mark of the end: evaluation, export, page, mark."""
    came = _until(start, lambda: _saved(start.folder) >= NUM_STEPS)
    time.sleep(rng.uniform(0, 2))
    return came and start.running()


def _saved(folder: RunFolder) -> int:
    """The step of the last checkpoint; 0 while Megatron writes the number, which it does in place."""
    with contextlib.suppress(CheckpointError):
        return folder.latest_checkpoint_step()
    return 0


MOMENTS: dict[str, Moment] = {one.__name__: one for one in (starting, stepping, saving, syncing, evaluating, ending)}


# --- faults -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One way to break a start.

    Attributes:
        name: in the table.
        moments: at which it makes sense.
        break_it: does it; the start may go on, or end.
        mend: what a user would do before the next start.
    """

    name: str
    moments: tuple[str, ...]
    break_it: Callable[[Start, random.Random], None]
    mend: Callable[[RunFolder], None] = lambda folder: None


def _kill(find: Callable[[Start], list[int]], number: signal.Signals = signal.SIGKILL) -> Callable[..., None]:
    def act(start: Start, rng: random.Random) -> None:
        processes.send(find(start), number)

    return act


def _one(find: Callable[[Start], list[int]], number: signal.Signals = signal.SIGKILL) -> Callable[..., None]:
    def act(start: Start, rng: random.Random) -> None:
        found = find(start)
        processes.send(rng.sample(found, min(1, len(found))), number)

    return act


def _stall(find: Callable[[Start], list[int]], seconds: float) -> Callable[..., None]:
    def act(start: Start, rng: random.Random) -> None:
        pids = find(start)
        processes.send(pids, signal.SIGSTOP)
        time.sleep(seconds)
        processes.send(pids, signal.SIGCONT)

    return act


def _unkind(manners: str, seconds: float) -> Callable[..., None]:
    """The servers treat every request so, for a while."""

    def act(start: Start, rng: random.Random) -> None:
        met = start.manners.with_name(start.manners.name + ".met")
        met.unlink(missing_ok=True)
        start.manners.write_text(manners)
        time.sleep(seconds)
        start.manners.write_text("")
        if start.running() and not met.exists():
            raise AssertionError(f"no request in {seconds:.0f} s met a server that was told: {manners}")

    return act


def _twice(start: Start, rng: random.Random) -> None:
    start.process.send_signal(signal.SIGINT)
    time.sleep(1)
    if start.running():
        start.process.send_signal(signal.SIGINT)


def _set_clock(start: Start, rng: random.Random) -> None:
    """The time of day jumps by an hour, forwards or back, and the start goes on; the next one has the right time again."""
    start.clock.write_text(rng.choice(("+3600", "-3600")))


def _second_launch(start: Start, rng: random.Random) -> None:
    """A launch of the same folder beside the first; it must be refused, and the first one goes on."""
    with Start(start.folder) as second:
        if second.wait(300) != 1:
            raise AssertionError("a second launch of a run folder was not refused")
    start.process.send_signal(signal.SIGTERM)


def _damage(change: Callable[[Path], None], name: str) -> Callable[..., None]:
    """End the start, then damage its last checkpoint: the next start has to notice, and take the one before it."""

    def act(start: Start, rng: random.Random) -> None:
        processes.send(start.pids(), signal.SIGKILL)
        start.wait(60)
        folder = start.folder
        last = folder.checkpoints / f"iter_{_saved(folder):07d}"
        earlier = [path for path in folder.checkpoints.glob("iter_*") if path.name < last.name]
        files = sorted(last.glob(name))
        if earlier and files:
            change(rng.choice(files))

    return act


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _cut_records(start: Start, rng: random.Random) -> None:
    """End the start and leave half a line in every record file, as a full disk may."""
    processes.send(start.pids(), signal.SIGKILL)
    start.wait(60)
    for path in (start.folder.metrics, start.folder.events, start.folder.samples):
        if path.exists():
            with path.open("ab") as file:
                file.write(b'{"step": 3.0, "lo')


def _fill_disk(start: Start, rng: random.Random) -> None:
    """Leave a few KiB on the run's file system, which is a small one of its own."""
    usage = shutil.disk_usage(start.folder.root)
    if usage.total > 1 << 30:
        raise AssertionError("the run folder does not lie on the small disk")
    with (start.folder.root.parent / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def _free_disk(folder: RunFolder) -> None:
    (folder.root.parent / "ballast").unlink(missing_ok=True)


_LAUNCHER: Callable[[Start], list[int]] = lambda start: [start.process.pid]  # noqa: E731
_KEEPER: Callable[[Start], list[int]] = lambda start: start.named("launch.keeper")  # noqa: E731
_TORCHRUN: Callable[[Start], list[int]] = lambda start: start.named("torch.distributed.run")  # noqa: E731
_ROLES: Callable[[Start], list[int]] = lambda start: start.named("launch.roles student-server")  # noqa: E731
_HELPERS: Callable[[Start], list[int]] = lambda start: start.named("multiprocessing")  # noqa: E731
_ANY = ("starting", "stepping", "saving", "syncing", "evaluating", "ending")
_LATE = ("stepping", "saving", "syncing", "evaluating")

CLOCK = "clock set by an hour"
DISK = "disk full"

FAULTS = (
    Fault("SIGKILL of everything", _ANY, _kill(Start.pids)),
    Fault("SIGKILL of the launcher", _ANY, _kill(_LAUNCHER)),
    Fault("SIGKILL of the keeper", _ANY, _kill(_KEEPER)),
    Fault("SIGKILL of a trainer rank", _LATE, _one(Start.ranks)),
    Fault("SIGKILL of torchrun", _LATE, _kill(_TORCHRUN)),
    Fault("SIGKILL of a server's role", _LATE, _one(_ROLES)),
    Fault("SIGKILL of one of a server's processes", _LATE, _one(Start.servers)),
    Fault("SIGKILL of Megatron's helpers", _LATE, _kill(_HELPERS)),
    Fault("Ctrl-C", _ANY, _kill(_LAUNCHER, signal.SIGINT)),
    Fault("Ctrl-C twice", _ANY, _twice),
    Fault("SIGTERM", _ANY, _kill(_LAUNCHER, signal.SIGTERM)),
    Fault("SIGHUP", _ANY, _kill(_LAUNCHER, signal.SIGHUP)),
    Fault("server stalled for 8 s", _LATE, _stall(Start.servers, 8)),
    Fault("trainer stalled for 8 s", _LATE, _stall(Start.ranks, 8)),
    Fault("launcher stalled for 8 s", _LATE, _stall(_LAUNCHER, 8)),
    Fault("server frozen for ever", _LATE, _kill(Start.servers, signal.SIGSTOP)),
    Fault("server answers 2 s late for 20 s", _LATE, _unkind("slow 2", 20)),
    Fault("server refuses (503) for 15 s", _LATE, _unkind("refuse", 15)),
    Fault("second launch of the folder", ("stepping",), _second_launch),
    Fault("checkpoint truncated", ("stepping",), _damage(_truncate, "*.distcp")),
    Fault("checkpoint zeroed", ("stepping",), _damage(_zero, "*.distcp")),
    Fault("checkpoint's table of contents cut", ("stepping",), _damage(_truncate, ".metadata")),
    Fault("records cut in mid-line", ("stepping",), _cut_records),
    Fault(CLOCK, _LATE, _set_clock),
    Fault(DISK, _LATE, _fill_disk, _free_disk),
)
SHORT = ("SIGKILL of everything", "SIGTERM", "checkpoint truncated")


# --- comparing --------------------------------------------------------------------------------------------------------


def differences(run: RunFolder, unbroken: RunFolder) -> list[str]:
    """What two finished runs of one seed differ in, beyond times and logs."""
    found = [
        f"{name} differs"
        for name in ("hf/model.safetensors", "hf/config.json", "samples.jsonl", "config.json")
        if _digest(run.root / name) != _digest(unbroken.root / name)
    ]
    steps = [record["step"] for record in read_lines(run.metrics)]
    if steps != sorted(set(steps)):
        found.append("metrics.jsonl has not one record a step")
    for mine, other in zip(run.steps(), unbroken.steps(), strict=False):
        found += [
            f"step {mine['step']:.0f}: {key}"
            for key in other
            if not key.endswith((*_MEASURED, *_ROUNDED)) and mine.get(key) != other[key]
        ]
    if len(run.steps()) != len(unbroken.steps()):
        found.append(f"{len(run.steps())} steps, not {len(unbroken.steps())}")
    for path in sorted(unbroken.evals.glob("step_*.json")):
        if _digest(run.evals / path.name) != _digest(path):
            found.append(f"eval/{path.name} differs")
    if missing := _present(unbroken) ^ _present(run):
        found.append(f"files of one only: {', '.join(sorted(missing))}")
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _present(folder: RunFolder) -> set[str]:
    """Names in the run folder that do not depend on how often it was started."""
    names = {
        str(path.relative_to(folder.root)) for pattern in ("*", "hf/*", "eval/*") for path in folder.root.glob(pattern)
    }
    return {name for name in names if not name.startswith(("logs", "launch", "lock", "endpoints", "sync"))}


# --- the whole --------------------------------------------------------------------------------------------------------


def chaos(root: Path, num_faults: int, seed: int, faults: list[Fault], disk: Path | None) -> bool:
    """Break ``num_faults`` starts; whether every comparison held and nothing was ever left running."""
    rng = random.Random(seed)
    unbroken = RunFolder(root / "unbroken" / "run")
    if not unbroken.finished.exists():
        with Start(unbroken) as start:
            if start.wait() != 0 or start.left():
                raise SystemExit(f"the unbroken run failed: see {start.output}")
    plan = _plan(rng, num_faults, faults)
    chain = len(list(read_lines(root / "compared.jsonl")))
    while plan:
        chain += 1
        on_small_disk = disk is not None and plan[0][0].name == DISK
        folder = RunFolder((disk if on_small_disk and disk else root / f"chain-{chain:03d}") / f"run-{chain:03d}")
        failed: list[str] = []
        while plan and (plan[0][0].name == DISK) == on_small_disk and not folder.finished.exists():
            failed += _break_once(root, folder, *plan.pop(0), rng)
        _finish(root, folder, unbroken, failed)
    return _verdict(root)


def _plan(rng: random.Random, num_faults: int, faults: list[Fault]) -> list[tuple[Fault, str]]:
    """Every kind in turn, at its moments in turn, in random order; the full disks together, on their own file system."""
    kinds = [faults[index % len(faults)] for index in range(num_faults)]
    rng.shuffle(kinds)
    plan = [(fault, rng.choice(fault.moments)) for fault in kinds]
    return sorted(plan, key=lambda item: item[0].name == DISK)


def _break_once(root: Path, folder: RunFolder, fault: Fault, moment: str, rng: random.Random) -> list[str]:
    """One start and its fault; what the fault did not find as it must be, for the comparison of the run."""
    failed = []
    with Start(folder) as start:
        came = MOMENTS[moment](start, rng)
        at, began = _steps(folder), time.monotonic()
        try:
            if came:
                fault.break_it(start, rng)
        except (AssertionError, OSError) as error:
            failed.append(f"{fault.name}: {error}")
        code = start.wait()
        ended_s = time.monotonic() - began
        left = start.left()
    fault.mend(folder)
    record = {
        "fault": fault.name,
        "moment": moment,
        "came": came,
        "step": at,
        "code": code,
        "ended_s": round(ended_s, 1),
    }
    record |= {"left": left, "start_s": round(time.monotonic() - start.began, 1), "run": folder.root.name}
    append(root / "faults.jsonl", record)
    print(
        f"{folder.root.name}  {fault.name}, {moment}, step {at}: code {code} after {ended_s:.0f} s, left {left}",
        *failed,
        flush=True,
    )
    return failed


def _finish(root: Path, folder: RunFolder, unbroken: RunFolder, failed: list[str]) -> None:
    """Type the same command until the run has finished, and compare."""
    for _ in range(3):
        if folder.finished.exists() and folder.report.exists():
            break
        with Start(folder) as start:
            code, left = start.wait(), start.left()
        if left or code != 0:
            print(f"{folder.root.name}  finishing: code {code}, left {left}: see {start.output}", flush=True)
    found = failed + (differences(folder, unbroken) if folder.finished.exists() else ["did not finish"])
    append(root / "compared.jsonl", {"run": folder.root.name, "differences": found[:20]})
    print(f"{folder.root.name}  {'EQUAL' if not found else found[:5]}", flush=True)
    if not found:
        shutil.rmtree(folder.checkpoints)  # some MB each; the rest stays for whoever wants to look


def table(root: Path) -> str:
    """What was broken in ``root``, by kind, and whether the runs ended equal: Markdown."""
    compared = {record["run"]: record["differences"] for record in read_lines(root / "compared.jsonl")}
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in read_lines(root / "faults.jsonl"):
        if record["came"] and record["run"] in compared:
            by_kind.setdefault(record["fault"], []).append(record)
    lines = [
        "| fault | times | moments | exit codes | ended after, s | left running | runs equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        records = by_kind.get(fault.name, [])
        if not records:
            continue
        seconds = sorted(record["ended_s"] for record in records)
        moments = ", ".join(sorted({record["moment"] for record in records}))
        codes = ", ".join(sorted({str(record["code"]) for record in records}))
        equal = sum(not compared[record["run"]] for record in records)
        left = sum(bool(record["left"]) for record in records)
        lines.append(
            f"| {fault.name} | {len(records)} | {moments} | {codes} | {seconds[0]:.0f} to {seconds[-1]:.0f} | {left} | "
            f"{equal} of {len(records)} |"
        )
    num = sum(map(len, by_kind.values()))
    lines.append(
        f"\n{num} faults in {len(compared)} runs; {sum(not found for found in compared.values())} runs equal to the bit."
    )
    return "\n".join(lines)


def _verdict(root: Path) -> bool:
    print("\n" + table(root), flush=True)
    equal = all(not record["differences"] for record in read_lines(root / "compared.jsonl"))
    return equal and not any(record["left"] for record in read_lines(root / "faults.jsonl"))


@contextlib.contextmanager
def small_disk(root: Path) -> Iterator[Path | None]:
    """A file system of 96 MiB in memory, for root; None for others."""
    path = root / "disk"
    if os.geteuid() != 0:
        yield None
        return
    path.mkdir(parents=True, exist_ok=True)
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(path)], check=False).returncode == 0
    )
    try:
        yield path if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=False)


def main(argv: list[str] | None = None) -> int:
    """Parse and run; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the runs and the records; the same folder again adds to them")
    parser.add_argument(
        "--faults", type=int, default=0, help="how many (default: a few kinds once, or those of --only)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the moments and their order")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORDS", help="kinds whose name holds these words"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], help="of the recipe, e.g. rollouts.max_staleness_steps=1; one set a folder"
    )
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args(argv)
    root = options.folder.absolute()
    if options.table:
        print(table(root))
        return 0
    # A shell's background jobs ignore Ctrl-C, and nohup's a hang-up: so would the runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    Start.overrides = tuple(options.overrides)
    asked = [fault for fault in FAULTS if options.faults or options.only or fault.name in SHORT]
    with small_disk(root) as disk:
        possible = {CLOCK: bool(_changeable_clock(root)), DISK: disk is not None}
        faults = [
            fault
            for fault in asked
            if possible.get(fault.name, True)
            and (not options.only or any(words in fault.name for words in options.only))
        ]
        if not faults:
            known = ", ".join(fault.name for fault in FAULTS)
            parser.error(f"--only {' --only '.join(options.only)}: no fault that is possible here. Of: {known}.")
        return 0 if chaos(root, options.faults or len(faults), options.seed, faults, disk) else 1


if __name__ == "__main__":
    sys.exit(main())
