"""The judge process: compares mathematical answers with math-verify, one forked child for each.

In: one JSON line per request on stdin, a list of [reference, candidate] pairs. Out: one JSON line on stdout, a list of
verdicts. ``rewards.MathVerifier`` starts it and is the only one to talk to it:

    python -m megatron_distill.rewards.math_judge CPU_LIMIT_S NUM_PARALLEL

Answers are written by a model under training, so some are hostile by accident: ``9^{9^{9^9}}`` keeps a CPU busy for
ever inside one C call and asks for all the memory there is. math-verify's own time limit is a Python signal handler: it
needs the main thread and cannot interrupt a C call. Here the kernel enforces the limits on a child that holds nothing
but its own pair. A fork of the warm process takes milliseconds, where a fresh interpreter would import SymPy again; and
since no child sees another's caches, a verdict does not depend on the answers judged before it.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
import sys
from typing import Literal

from math_verify import LatexExtractionConfig, parse, verify

Verdict = Literal["right", "wrong", "undecided"]

MEMORY_LIMIT_BYTES = 2 << 30
# CPU time is the limit proper, so that a verdict does not depend on how busy the machine is; wall time is a backstop.
WALL_LIMIT_FACTOR = 20
READY = "ready"
# One of each common form, judged before the first fork: the grammar's prediction caches fill up once, for all children,
# which then parse in a few milliseconds instead of up to 250.
_WARM_UP_ANSWERS = (
    "0.5",
    r"\frac{1}{2}",
    r"2\sqrt{3}+\pi^{2}",
    r"x=(y+1)^2-3z",
    r"(-\infty,3]\cup[4,5)",
    r"\{1,2\}",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"50\%",
    r"5\text{ cm}",
    r"90^\circ",
)
_VERDICT_OF_EXIT: dict[int, Verdict] = {0: "right", 1: "wrong"}


def judge_pair(reference: str, candidate: str) -> bool:
    """Whether math-verify finds both equal; both are contents of a box, as math-verify's heuristics expect."""
    extraction = [LatexExtractionConfig(boxed_match_priority=0)]
    # None turns math-verify's own signal-based limits off: the kernel's hold here.
    expected, given = (parse(f"\\boxed{{{text}}}", extraction, parsing_timeout=None) for text in (reference, candidate))
    return bool(verify(expected, given, timeout_seconds=None))


def judge_in_child(reference: str, candidate: str, cpu_limit_s: float) -> int:
    """Fork a child that judges one pair and reports the verdict by its exit status; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 2
    try:
        # The default action of both signals ends the process, even in the middle of a C call.
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        signal.setitimer(signal.ITIMER_REAL, cpu_limit_s * WALL_LIMIT_FACTOR)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = 0 if judge_pair(reference, candidate) else 1
    finally:
        os._exit(status)


def judge_pairs(pairs: list[tuple[str, str]], cpu_limit_s: float, num_parallel: int) -> list[Verdict]:
    """Judge all pairs, at most ``num_parallel`` at a time; what was killed or failed is "undecided"."""
    verdicts: list[Verdict] = ["undecided"] * len(pairs)
    running: dict[int, int] = {}

    def reap() -> None:
        pid, status = os.wait()
        verdicts[running.pop(pid)] = _VERDICT_OF_EXIT.get(os.waitstatus_to_exitcode(status), "undecided")

    for index, (reference, candidate) in enumerate(pairs):
        if len(running) == num_parallel:
            reap()
        running[judge_in_child(reference, candidate, cpu_limit_s)] = index
    while running:
        reap()
    return verdicts


def main() -> None:
    cpu_limit_s, num_parallel = float(sys.argv[1]), int(sys.argv[2])
    logging.disable(logging.CRITICAL)  # math-verify logs every answer it cannot parse
    # Replies go to a private copy of stdout, so that no library's print can corrupt them.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for answer in _WARM_UP_ANSWERS:
        judge_pair(answer, answer)
    gc.freeze()  # keeps the children's collectors from touching, and so copying, the parent's pages
    print(READY, file=replies, flush=True)
    for request in sys.stdin:  # which ends with the parent, however that ends
        print(json.dumps(judge_pairs(json.loads(request), cpu_limit_s, num_parallel)), file=replies, flush=True)


if __name__ == "__main__":
    main()
