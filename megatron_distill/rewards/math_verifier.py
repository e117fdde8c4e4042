r"""Rewards: whether a response ends in the right answer.

In: responses (text) and reference answers. Out: one reward per response: 1.0 where the last ``\boxed{}``
equals the reference in the eyes of math-verify, else 0.0.

    with MathVerifier() as verifier:
        verifier.verify([r"... so \boxed{\frac{1}{2}}"], ["0.5"])       # [1.0]

Most answers are decided by comparing strings. The rest go to ``math_judge``, a process of its own with hard limits, so no
answer can hang, crash or bloat a run, from whichever thread ``verify`` is called. This is the built-in reward ``math``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from types import TracebackType

from megatron_distill.errors import ConfigError, DataError, DistillError
from megatron_distill.rewards.base import Answered

logger = logging.getLogger(__name__)

# A backslash takes the character after it along, so that \{ and \} never count as braces.
_BOX_TOKENS = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
# 12,345 and 12{,}345 and 12\,345: in the last two the separator is typesetting only; math-verify knows the first.
_TYPESET_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\[,!;:])(?=\d{3}(?!\d))")
# Longer boxes are a model's repetition, not an answer. math-verify 0.9 recovers from what it cannot parse by reading a
# part of it, so that 200 nested fractions may pass for the innermost one.
_MAX_ANSWER_CHARS = 1000
_INTEGER = re.compile(r"[+-]?\d{1,100}")


def last_boxed(text: str) -> str | None:
    r"""The content of the last balanced ``\boxed{...}``, or None if there is none.

    Of nested boxes the inner one counts, as it starts later. An unclosed box, as truncation leaves it, is no answer:
    its content may be half a number. One pass whatever the text: a model that repeats ``\boxed{`` to its token limit
    costs no more than any other.
    """
    open_boxes: list[int | None] = []  # one entry per open brace: where the content starts if it is a box
    last_start, last_end = -1, -1
    for token in _BOX_TOKENS.finditer(text):
        if token["box"]:
            open_boxes.append(token.end())
        elif token["open"]:
            open_boxes.append(None)
        elif token["close"] and open_boxes:
            start = open_boxes.pop()
            if start is not None and start > last_start:
                last_start, last_end = start, token.start()
    return text[last_start:last_end] if last_start >= 0 else None


def clean_answer(text: str) -> str:
    r"""Strip what does not belong to an answer's value: its own box, dollar signs, outer space, a final full stop."""
    boxed = last_boxed(text)
    text = _TYPESET_THOUSANDS.sub("", text if boxed is None else boxed)
    return text.strip().rstrip(".").strip().strip("$").strip()


def compare_strings(reference: str, candidate: str) -> bool | None:
    """Decide the easy pairs of cleaned answers; None where it takes mathematics."""
    if reference == candidate:
        return bool(candidate)
    if not candidate or len(candidate) > _MAX_ANSWER_CHARS:
        return False
    if _INTEGER.fullmatch(reference) and _INTEGER.fullmatch(candidate):
        return int(reference) == int(candidate)
    return None


class MathVerifier:
    """A ``Reward`` for mathematical answers: math-verify under hard limits.

    The judge process starts with the first answer that needs it (a few seconds, once) and ends with ``close``, with the
    end of this object, or with this process. Calls are serialised; each spreads its answers over ``num_parallel``
    processes.

    Args:
        cpu_limit_s: CPU seconds one answer may take; past it the answer counts as wrong.
        num_parallel: answers judged at once; by default one per CPU this process may use, at most 8.

    Attributes:
        num_undecided: answers given up so far, for a limit or a failure of math-verify. They got the reward 0.0.
    """

    def __init__(self, cpu_limit_s: float = 5.0, num_parallel: int | None = None) -> None:
        if cpu_limit_s <= 0:
            raise ConfigError(f"cpu_limit_s = {cpu_limit_s}: must be positive; no answer could be judged. Try 5.")
        self.num_undecided = 0
        self._cpu_limit_s = cpu_limit_s
        self._num_parallel = num_parallel or min(8, len(os.sched_getaffinity(0)))
        self._judge: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def __call__(self, answered: Sequence[Answered], /) -> list[float]:
        """1.0 for each response whose last box equals its problem's answer, else 0.0; see ``verify``."""
        return self.verify([one.text for one in answered], [one.problem.answer for one in answered])

    def verify(self, responses: Sequence[str], answers: Sequence[str]) -> list[float]:
        r"""Judge each response's last box against its reference answer.

        Args:
            responses: what the model wrote, as text.
            answers: the reference of each response; may itself stand in ``\boxed{}`` or dollar signs.

        Returns:
            1.0 where they are equal, else 0.0; 0.0 also where there is no closed box.

        Raises:
            DataError: the two differ in length.
            DistillError: the judge process cannot run.
        """
        if len(responses) != len(answers):
            raise DataError(
                f"verify: {len(responses)} responses, {len(answers)} answers: one answer belongs to each response. "
                "Repeat a prompt's answer for each of its rollouts."
            )
        pairs = [
            (clean_answer(answer), clean_answer(boxed)) if (boxed := last_boxed(response)) is not None else None
            for response, answer in zip(responses, answers, strict=True)
        ]
        verdicts = {pair: compare_strings(*pair) for pair in pairs if pair is not None}
        hard_pairs = [pair for pair, verdict in verdicts.items() if verdict is None]
        if hard_pairs:
            verdicts.update(zip(hard_pairs, self._ask_judge(hard_pairs), strict=True))
        return [1.0 if pair is not None and verdicts[pair] else 0.0 for pair in pairs]

    def _ask_judge(self, pairs: list[tuple[str, str]]) -> list[bool]:
        with self._lock:
            judge = self._judge or self._start_judge()
            try:
                print(json.dumps(pairs), file=judge.stdin, flush=True)
                reply = judge.stdout.readline() if judge.stdout else ""
            except BrokenPipeError:
                reply = ""
            if not reply.endswith("\n"):
                self._judge = None
                raise DistillError(
                    f"math judge = exit status {judge.wait()}: it ended while judging {len(pairs)} answers. Something "
                    "killed it, perhaps for memory. See its last lines above; the next call starts a new one."
                )
        verdicts = json.loads(reply)
        num_undecided = verdicts.count("undecided")
        self.num_undecided += num_undecided
        if num_undecided:
            logger.warning("math judge gave up on %d of %d answers; they count as wrong", num_undecided, len(pairs))
        return [verdict == "right" for verdict in verdicts]

    def _start_judge(self) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "megatron_distill.rewards.math_judge",
            str(self._cpu_limit_s),
            str(self._num_parallel),
        ]
        judge = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            process_group=0,  # with its children, which hold its pipes too; and out of reach of the terminal's Ctrl-C
        )
        self._judge = judge
        weakref.finalize(self, _stop_judge, judge)
        if not (judge.stdout and judge.stdout.readline()):
            self._judge = None
            raise DistillError(
                f"math judge = exit status {judge.wait()}: it did not start. Its error stands above. "
                "Check that math-verify is installed: pip install math-verify."
            )
        return judge

    def close(self) -> None:
        """End the judge process, if one runs, and with it a call that waits for it; a later ``verify`` starts another."""
        if (judge := self._judge) is not None:
            _kill(judge)  # first: a call that was given up holds the lock until all of its answers are judged
        with self._lock:
            if self._judge is not None:
                _stop_judge(self._judge)
                self._judge = None

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _kill(judge: subprocess.Popen[str]) -> None:
    """End the judge and the children that it has forked."""
    if judge.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.killpg(judge.pid, signal.SIGKILL)


def _stop_judge(judge: subprocess.Popen[str]) -> None:
    _kill(judge)
    for pipe in (judge.stdin, judge.stdout):
        if pipe:
            with contextlib.suppress(BrokenPipeError):  # of a judge that died, with a request unread
                pipe.close()
    judge.wait()
