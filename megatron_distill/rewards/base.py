"""What a reward is: a function from responses to numbers, for RL and for evaluation alike.

In: ``Answered`` responses, as many as have ended. Out: one float each. ``rl.reward`` and ``evaluation.reward`` name one:
a built-in, or ``path/to/file.py:function``.

    def is_short(answered: Sequence[Answered]) -> list[float]:
        return [float(len(one.response_ids) < 100) for one in answered]
"""

import math
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_distill.errors import RewardError
from megatron_distill.types import Problem, StopReason


@dataclass(frozen=True)
class Answered:
    """A response, and the problem that it answers.

    Attributes:
        problem: with its reference answer and everything else that its record held.
        response_ids: [R], the stop token included.
        text: the response without special tokens.
        stop_reason: "stop", or "length" for a truncated one.
    """

    problem: Problem
    response_ids: Sequence[int]
    text: str
    stop_reason: StopReason


class Reward(Protocol):
    """Judges responses, each by itself: which ones share a call depends on when they ended. Called from one thread."""

    def __call__(self, answered: Sequence[Answered], /) -> Sequence[float]:
        """One finite number for each response, in order."""


class BoundedReward:
    """A reward held to its word: the right number of finite values, within a time limit. Closing it closes the inner one."""

    def __init__(self, inner: Reward, name: str, timeout_s: float) -> None:
        """Wrap a reward.

        Args:
            inner: the reward.
            name: as the config names it, for messages.
            timeout_s: longest time that one call may take.
        """
        self._inner, self._name, self._timeout_s = inner, name, timeout_s

    def __call__(self, answered: Sequence[Answered], /) -> list[float]:
        """The inner reward's values.

        Raises:
            RewardError: it raised, took too long, or gave something other than one finite number for each response.
        """
        if not answered:
            return []
        outcome: queue.SimpleQueue[Sequence[float] | Exception] = queue.SimpleQueue()
        # A thread that hangs is left behind as a daemon: the run ends with the error below, and the thread with it.
        threading.Thread(target=self._call, args=(answered, outcome), daemon=True, name="reward").start()
        try:
            result = outcome.get(timeout=self._timeout_s)
        except queue.Empty:
            raise RewardError(
                f"reward = {self._name}: no answer for {len(answered)} responses within {self._timeout_s:g} s. Training "
                "waits for it. Make it faster, or raise rl.reward_timeout_s."
            ) from None
        if isinstance(result, Exception):
            raise RewardError(
                f"reward = {self._name}: raised {type(result).__name__}: {result}. A reward judges whatever a model may "
                "write. Give a wrong response 0 instead of raising."
            ) from result
        try:
            values = [float(value) for value in result]
        except (TypeError, ValueError):
            values = []
        if len(values) != len(answered) or not all(map(math.isfinite, values)):
            raise RewardError(
                f"reward = {self._name}: returned {_shown(result)} for {len(answered)} responses. It must return one finite "
                "number for each, in order. Mend the function."
            )
        return values

    def _call(self, answered: Sequence[Answered], outcome: "queue.SimpleQueue[Sequence[float] | Exception]") -> None:
        try:
            outcome.put(self._inner(answered))
        except Exception as error:
            outcome.put(error)

    def close(self) -> None:
        """Close the inner reward, if it has something to close."""
        close = getattr(self._inner, "close", None)
        if close is not None:
            close()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
