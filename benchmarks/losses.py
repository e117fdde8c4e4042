"""What the losses cost and how right they are: time, memory kept, peak memory, collectives and gradient error, against others.

    python -m benchmarks.losses --json docs/figures/losses_speed.json      # every row: six minutes on two idle cores
    python -m benchmarks.losses --quick                                    # every row on small tensors: does it all run?
    python -m benchmarks.losses --only fp32 bf16                           # some parts
    python -m benchmarks.losses --device cuda                              # the parts that one GPU can have

`python docs/figures/losses_speed.py` makes the tables of docs/losses.md and the figure out of the file.

A part is one process (or one per tensor-parallel rank), and all of its rows are measured on the same tensors. Its floor is
memory traffic alone at the rate of a copy, the least of those taken before each row: two reads forward, two reads and a
write backward. Compare a part's rows with its floor and with each other. Times are the least of several runs; on one
thread CPU time, so that other load disturbs little and waiting for another rank does not count, else elapsed time.

256 tokens: much fewer fit a cache, and the floor is then not memory's. glibc is told to keep large blocks: else it returns
every one to the system, and a fresh gradient is timed with the page faults of 150 MB.

The error is that of the gradient of 8 tokens over all ranks' columns, relative in norm to the dense float64 gradient of
the same loss.
"""

import argparse
import json
import multiprocessing as mp
import os
import platform
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.losses_compositions import VARIANTS, WEIGHT, Variant
from megatron_distill.losses import cpu_kernels, distill_kl, fused_linear_distill_kl

ERROR_TOKENS = 8
FEATURES = 1024  # of hidden states, in the part `fused`
SECONDS_A_ROW = 3.0  # after two runs, a slow row is not repeated for longer
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}

OURS = ("mixed KL", "JSD", "top-k 64, tail bucket", "log-prob and entropy")
CORE = (*OURS, "KL: dense PyTorch", "KL: all-reduce composition", "JSD: dense PyTorch (GKD)")
COMPARED = (  # by their gradients' errors over ranks
    "mixed KL",
    "JSD",
    "KL: all-reduce composition",
    "KL: the same, identity backward",
    "KL: differentiable all-reduce",
)
ALL = tuple(name for name in VARIANTS if name not in COMPARED[3:])  # those are wrong, whatever their speed


class Part(NamedTuple):
    """Rows measured together.

    Args:
        variants: names in `VARIANTS`; those that cannot run at this `tp` are left out. Empty: the fused linear loss.
        target: what to build the C++ kernels for; None: this processor.
        timed: False takes the rows' gradient errors alone.
    """

    dtype: str
    vocab: int
    variants: tuple[str, ...]
    tp: int = 1
    threads: int = 1
    target: str | None = None
    timed: bool = True


PARTS = {
    "fp32": Part("float32", 151_936, ALL),
    "bf16": Part("bfloat16", 151_936, ALL),
    "fp32-128k": Part("float32", 128_256, CORE),
    "bf16-128k": Part("bfloat16", 128_256, CORE),
    "fp32-256bit": Part("float32", 151_936, OURS, target="-march=x86-64-v3"),
    "bf16-256bit": Part("bfloat16", 151_936, OURS, target="-march=x86-64-v3"),
    "fp32-2threads": Part("float32", 151_936, CORE, threads=2),
    "bf16-2threads": Part("bfloat16", 151_936, CORE, threads=2),
    "fp32-tp2": Part("float32", 151_936, (*CORE, "mixed KL, eager"), tp=2),
    "bf16-tp2": Part("bfloat16", 151_936, CORE, tp=2),
    "fp32-128k-tp2": Part("float32", 128_256, CORE, tp=2),
    "fused": Part("float32", 151_936, ()),
    "errors-tp1": Part("float32", 32_000, COMPARED, timed=False),
    "errors-tp2": Part("float32", 32_000, COMPARED, tp=2, timed=False),
    "errors-tp4": Part("float32", 32_000, COMPARED, tp=4, timed=False),
}


def gradient_error(variant: Variant, part: Part, group: dist.ProcessGroup | None, device: str) -> float | None:
    """Relative error, in norm over all ranks' columns, of the gradient of a random combination of tokens."""
    if variant.dense is None:
        return None
    generator, dtype = torch.Generator().manual_seed(7), getattr(torch, part.dtype)
    student, teacher = (torch.randn(ERROR_TOKENS, part.vocab, generator=generator).mul(2).to(dtype) for _ in range(2))
    upstream = torch.randn(ERROR_TOKENS, generator=generator)
    whole = student.double().requires_grad_()
    (exact,) = torch.autograd.grad(variant.dense(whole, teacher.double()), whole, upstream.double())
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    mine = slice(rank * (part.vocab // size), (rank + 1) * (part.vocab // size))
    leaf = student[:, mine].to(device).requires_grad_()
    logits = leaf * 1.0
    (grad,) = torch.autograd.grad(variant.loss(logits, teacher[:, mine].to(device), group), logits, upstream.to(device))
    squares = torch.stack([(grad.cpu().double() - exact[:, mine]).square().sum(), exact[:, mine].square().sum()])
    if group is not None:
        squares = squares.to(device)
        dist.all_reduce(squares, group=group)
    return (squares[0] / squares[1]).sqrt().item()


class _Collectives(TorchDispatchMode):
    """Counts operations of torch.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "c10d" in function.namespace
        return function(*args, **(kwargs or {}))


class Clock:
    """Times calls: CPU time of this process on one thread, else elapsed time."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self._now = time.process_time if device == "cpu" and threads == 1 else time.perf_counter

    def __call__(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds and result."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = self._now()
        result = function()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self._now() - start, result


def _peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Largest memory held at once during `function`, beyond what was held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _once(
    loss: Callable[..., Tensor], leaf: Tensor, teacher: Tensor, group: dist.ProcessGroup | None, upstream: Tensor
) -> tuple[int, tuple[int, int]]:
    """One run: bytes saved for the backward beside the logits, and collectives forward and backward."""
    logits = leaf * 1.0
    given = {tensor.untyped_storage().data_ptr() for tensor in (logits, teacher)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _Collectives() as forward:
        value = loss(logits, teacher, group)
        saved = sum(kept.values())
    with _Collectives() as backward:
        torch.autograd.grad(value, logits, upstream)
    return saved, (forward.count, backward.count)


def measure(
    loss: Callable[..., Tensor],
    leaf: Tensor,
    teacher: Tensor,
    group: dist.ProcessGroup | None,
    clock: Clock,
    repeats: int,
) -> dict[str, Any]:
    """A row's numbers, but for its floors and its error."""
    upstream = torch.randn(leaf.shape[0], device=leaf.device)
    saved, collectives = _once(loss, leaf, teacher, group, upstream)
    forward, backward = [], []
    # As many runs on every rank, since they meet in collectives.
    slow = torch.tensor(clock(lambda: _once(loss, leaf, teacher, group, upstream))[0] * repeats > SECONDS_A_ROW)
    if group is not None:
        slow = slow.to(torch.int32).to(leaf.device)
        dist.all_reduce(slow, op=dist.ReduceOp.MAX, group=group)
    for _ in range(min(2, repeats) if slow else repeats):
        logits = leaf * 1.0  # A fresh buffer, since a variant may write its gradient there.
        seconds, value = clock(partial(loss, logits, teacher, group))
        forward.append(seconds)
        backward.append(clock(partial(torch.autograd.grad, value, logits, upstream))[0])
        del value
    logits = leaf * 1.0
    peak = _peak_bytes(lambda: torch.autograd.grad(loss(logits, teacher, group), logits, upstream), clock.device)
    return {
        "forward_ms": min(forward) * 1e3,
        "backward_ms": min(backward) * 1e3,
        "saved_bytes_per_token": saved / leaf.shape[0],
        "peak_mib": peak / 2**20,
        "collectives": collectives,
    }


def fused_rows(part: Part, tokens: int, features: int, clock: Clock) -> Iterator[dict[str, Any]]:
    """The fused linear loss, and heads followed by the loss; hidden states and head get gradients."""
    shapes = ((tokens, features), (part.vocab, features)) * 2
    hidden, head, teacher_hidden, teacher_head = (
        (torch.randn(shape, device=clock.device) / features**0.25).to(getattr(torch, part.dtype)) for shape in shapes
    )
    leaves = (hidden.requires_grad_(), head.requires_grad_())
    upstream = torch.randn(tokens, device=clock.device)

    def fused() -> Tensor:
        return fused_linear_distill_kl(hidden, head, teacher_hidden, teacher_head, reverse_kl_weight=WEIGHT).loss

    def unfused() -> Tensor:
        logits = hidden @ head.T, teacher_hidden @ teacher_head.T
        return distill_kl(*logits, reverse_kl_weight=WEIGHT, grad_in_place=True).loss

    def product() -> Tensor:
        with torch.no_grad():
            return hidden @ head.T

    gemm = min(clock(product)[0] for _ in range(2))
    for name, loss in (("fused linear KL", fused), ("heads, then mixed KL", unfused)):
        peak = _peak_bytes(lambda loss=loss: torch.autograd.grad(loss(), leaves, upstream), clock.device)
        forward, value = clock(loss)
        backward, _ = clock(partial(torch.autograd.grad, value, leaves, upstream))
        del value
        row = {"variant": name, "forward_ms": forward * 1e3, "backward_ms": backward * 1e3, "peak_mib": peak / 2**20}
        yield row | {"product_ms": gemm * 1e3}


def part_rows(part: Part, group: dist.ProcessGroup | None, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One rank's rows of a part."""
    device, repeats = arguments.device, arguments.repeats
    clock = Clock(device, part.threads)
    if not part.variants:
        return list(fused_rows(part, arguments.tokens, 32 if arguments.quick else FEATURES, clock))
    shape, dtype = (arguments.tokens, part.vocab // part.tp), getattr(torch, part.dtype)
    leaf = torch.randn(shape, device=device).to(dtype).requires_grad_()
    teacher = torch.randn(shape, device=device).to(dtype)
    target = torch.empty_like(teacher)
    rows, copies = [], []
    for name in part.variants:
        variant = VARIANTS[name]
        if (part.tp > 1 and not variant.sharded) or (arguments.quick and "Inductor" in name):
            continue
        row: dict[str, Any] = {"variant": name, "gradient_error": gradient_error(variant, part, group, device)}
        if part.timed:
            copies += [clock(lambda: target.copy_(teacher))[0] for _ in range(repeats)]
            row |= measure(variant.loss, leaf, teacher, group, clock, repeats)
        else:
            row["collectives"] = _once(variant.loss, leaf, teacher, group, torch.ones(shape[0], device=device))[1]
        rows.append(row)
    if part.timed:
        floor = min(copies) * 1e3
        for row in rows:
            row |= {
                "floor_ms": floor,
                "forward_floors": row["forward_ms"] / floor,
                "backward_floors": row["backward_ms"] / (1.5 * floor),
            }
    return rows


def run_rank(rank: int, name: str, part: Part, port: int, to: Connection, arguments: argparse.Namespace) -> None:
    """The process of one rank; the first sends its rows."""
    torch.set_num_threads(part.threads)
    torch.manual_seed(rank)
    warnings.simplefilter("ignore", FutureWarning)  # torch.distributed.nn's all-reduce is on its way out
    if part.target is not None:
        built = cpu_kernels.build(part.target)
        cpu_kernels.library = lambda: built  # type: ignore[assignment]
    group = None
    if part.tp > 1:
        backend = "gloo" if arguments.device == "cpu" else "nccl"
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=part.tp)
        group = dist.group.WORLD
    rows = part_rows(part, group, arguments)
    if rank == 0:
        described = {"part": name, **part._asdict(), "tokens": arguments.tokens, "device": arguments.device}
        described.pop("variants")
        to.send([described | row for row in rows])
    if part.tp > 1:
        dist.destroy_process_group()


def run_part(name: str, part: Part, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the part's ranks and wait for the rows.

    Raises:
        SystemExit: a rank failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    ranks = [
        context.Process(target=run_rank, args=(rank, name, part, port, theirs, arguments)) for rank in range(part.tp)
    ]
    for process in ranks:
        process.start()
    theirs.close()
    try:
        rows = ours.recv()
    except EOFError:
        rows = None
    for process in ranks:
        process.join()
    if rows is None or any(process.exitcode for process in ranks):
        sys.exit(f"part = {name}: a rank failed; its error is above.")
    return rows


def report(row: dict[str, Any]) -> str:
    """A row as text."""
    text = f"  {row['variant']:<34}"
    if "forward_ms" in row:
        for half in ("forward", "backward"):
            floors = f"({row[f'{half}_floors']:.2f})" if "floor_ms" in row else ""
            text += f"{row[f'{half}_ms']:>9.1f} {floors:<8}"
        text += f"{row['peak_mib']:>9.1f} MiB"
    if "saved_bytes_per_token" in row:
        text += f"{row['saved_bytes_per_token']:>12,.0f} B{row['collectives'][0]:>4} / {row['collectives'][1]}"
    if row.get("gradient_error") is not None:
        text += f"{row['gradient_error']:>10.1e}"
    return text


def processor() -> str:
    """The processor's name, or the GPU's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Run the parts one after the other, print their rows, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument(
        "--quick", action="store_true", help="small tensors, one run a row, no Inductor: times mean nothing"
    )
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="write the machine and all rows to this file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.repeats = 16, 1
    os.environ.update({"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99", **MALLOC})  # for the parts' processes
    result: dict[str, Any] = {
        "machine": processor() if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "rows": [],
    }
    print(
        f"{result['machine']}, {arguments.tokens} tokens; ms forward and backward (times the floor), peak, saved a token,"
    )
    print("collectives forward / backward, gradient error")
    started = time.perf_counter()
    for name in arguments.only:
        part = PARTS[name]
        if arguments.device == "cuda" and (part.tp > 1 or part.threads > 1 or part.target):
            continue
        part = part._replace(vocab=2_048) if arguments.quick else part
        print(f"{name}: {part.dtype}, {part.vocab:,} columns, tp {part.tp}, {part.threads} thread(s)", flush=True)
        rows = run_part(name, part, arguments)
        print(*map(report, rows), sep="\n")
        if "floor_ms" in rows[0]:
            print(
                f"  floor: {rows[0]['floor_ms']:.1f} ms forward, {1.5 * rows[0]['floor_ms']:.1f} backward", flush=True
            )
        result["rows"] += rows
        result["minutes"] = round((time.perf_counter() - started) / 60, 1)
        if arguments.json:  # after every part, so that a later one's failure costs no more than itself
            Path(arguments.json).write_text(json.dumps(result, indent=0) + "\n")
    print(f"{result['minutes']} minutes")


if __name__ == "__main__":
    main()
