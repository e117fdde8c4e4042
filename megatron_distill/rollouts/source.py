"""Where a step's samples come from: the seam between the training loop and everything that answers prompts.

In: a step, this replica's share of it, the horizon. Out: ``Collected``. ``rollouts.source`` names a source: the built-in
``streamed`` (``streamed.py``), or ``path/to/file.py:function``, called once on each replica's leader with a
``SourceContext``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_distill.config import RunConfig
from megatron_distill.rewards.base import Reward
from megatron_distill.rollouts.environment import Environment
from megatron_distill.rollouts.prompts import PromptSet
from megatron_distill.teacher.base import Teacher
from megatron_distill.types import Sample, Sampler

IN_FLIGHT = 2
"""From this ``rollouts.max_staleness_steps`` on, weights change under responses that are being written."""


@dataclass(frozen=True)
class Share:
    """Which part of a step one data-parallel replica works on.

    Attributes:
        rank: of the replica, 0-based.
        size: number of replicas.
    """

    rank: int
    size: int


@dataclass(frozen=True)
class Collected:
    """What a leader brings back for one step.

    Attributes:
        samples: of its replica, prompt-major.
        seconds: that each phase took.
        num_dropped: responses that were too old, and asked for again, since the step before; None unless weights change in
            flight.
    """

    samples: list[Sample]
    seconds: dict[str, float]
    num_dropped: int | None = None


class RolloutSource(Protocol):
    """Draws samples. Lives on the leader of each replica; ``take`` is called for one step at a time, except of ``streamed``."""

    def take(self, step: int, share: Share, horizon_tokens: int) -> Collected:
        """The samples of ``step`` (0-based): a function of (seed, step, share, horizon, weights), whenever it is called.

        Raises:
            ServerError: a server is lost for good.
            TeacherError: too many scores are missing.
        """

    def weights_changed(self, version: int) -> None:
        """Whatever is taken from now on finds the weights behind ``version`` optimizer steps on the student's servers."""

    def close(self) -> None:
        """End threads and what else the source started."""


@dataclass(frozen=True)
class SourceContext:
    """What a source may build on.

    Attributes:
        config: the run's, as config.json holds it.
        train: the training problems and their prompts.
        tokenizer: shared by student and teacher.
        stop_token_ids: end a response.
        student: samples from the student's servers.
        teacher_sampler: samples from the teacher's; None if it writes nothing.
        teacher: scores responses; None if the run asks no one, or the teacher runs in the trainer.
        reward: judges responses; None without RL.
        environment: brings a response about.
    """

    config: RunConfig
    train: PromptSet
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    student: Sampler
    teacher_sampler: Sampler | None
    teacher: Teacher | None
    reward: Reward | None
    environment: Environment

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


MakeSource = Callable[[SourceContext], RolloutSource]
