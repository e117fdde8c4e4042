"""The ``servers`` section: the SGLang servers beside the trainer.

In: nothing. Out: ``ServersConfig``.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_distill.config.fields import plain


@dataclass(frozen=True)
class ServersConfig:
    """The SGLang servers beside the trainer."""

    student_replicas: int = plain(1, "student servers; rollouts go to the least loaded", "[1, 4096]")
    teacher_replicas: int = plain(
        1,
        "teacher servers; 0 if teacher.transport is a function that needs none, e.g. for a teacher that runs elsewhere",
        "[0, 4096]",
    )
    evaluation_replicas: int = plain(
        0,
        "servers of their own for evaluations, each like a student's; training goes on meanwhile. 0: the student's servers "
        "answer, and training waits",
        "[0, 4096]",
    )
    student_tp: int = plain(1, "tensor-parallel size of each student and evaluation server", "[1, 4096]")
    teacher_tp: int = plain(1, "tensor-parallel size of each teacher server", "[1, 4096]")
    shared_gpu_frac: float = plain(
        0.0,
        "servers lie on the trainer's GPUs, and each takes so much of the memory that is free when it starts: for one machine "
        "with few GPUs, even one; 0: servers have GPUs of their own",
        "[0, 1)",
    )
    deterministic: bool = plain(
        True,
        "servers that write answer the same request with the same tokens, whatever else is being answered; false is faster "
        "on GPUs, and a resumed run is then no longer equal to an unbroken one. Servers that only score draw nothing",
    )
    student_args: tuple[str, ...] = plain(
        (),
        "more flags of sglang.launch_server for the student's servers, as --name=value or --name, after the run's own; "
        "those that the run decides are refused",
    )
    teacher_args: tuple[str, ...] = plain((), "the same for the teacher's servers")
    weight_sync: Literal["disk", "broadcast"] = plain(
        "disk",
        "how new weights reach the student's servers; disk: a directory that they can read; broadcast: a process group of "
        "rank 0 and the servers, gloo on CPU and NCCL on GPUs",
    )
    sync_bucket_mib: int = plain(
        256, "broadcast: size of one message; rank 0's GPU holds one at a time, its host memory all", "[1, 1e6]"
    )
    startup_timeout_s: float = plain(600.0, "longest wait until a server that starts is healthy", "(0, inf)")
    request_timeout_s: float = plain(
        600.0,
        "longest wait for a reply, besides the time that its tokens may take; then the request is sent again, twice at most",
        "(0, inf)",
    )
    min_tokens_per_s: float = plain(
        10.0,
        "slowest rate at which a response may be drawn: its time limit is longer by its tokens over this",
        "(0, inf)",
    )
    requests_per_replica: int = plain(64, "requests in flight to one replica", "[1, 1e9]")
    hang_timeout_s: float = plain(
        300.0,
        "longest time without a sign of life before a server is taken for hung and started again; it must be longer than a "
        "weight update takes",
        "(0, inf)",
    )
    max_restarts_per_hour: int = plain(
        5,
        "how often a server that died or hung is started again within an hour; 0 ends the run at the first loss",
        "[0, 1e9]",
    )
