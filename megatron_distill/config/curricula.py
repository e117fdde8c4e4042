"""Length curricula, a type a kind: how long a response may be at each step (see ``training.curriculum``).

In: nothing. Out: ``FixedHorizon``, ``Ladder``, ``Progressive`` and ``EntropyGated``; a config holds one of them, chosen by
``curriculum.kind``, so that a field of another kind is an unknown key.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_distill.config.fields import plain
from megatron_distill.config.schedules import Schedule, constant, piecewise

_KINDS = (
    "schedule: horizon_tokens as given; ladder: one rung of ladder_tokens every stage_steps; progressive: from start_tokens "
    "growth_tokens more every stage_steps, up to end_tokens; entropy_gated: one rung every stage_steps if the held-out "
    "entropy allows it. A field of another kind is refused"
)


@dataclass(frozen=True)
class FixedHorizon:
    """The same cap throughout, or one that follows a schedule."""

    kind: Literal["schedule"] = plain("schedule", _KINDS)
    horizon_tokens: Schedule = plain(constant(128), "cap on a response's length, as a schedule over steps", "[1, 1e9]")

    def fastest_schedule(self, num_steps: int) -> Schedule:
        """The horizon at each of ``num_steps`` steps."""
        return self.horizon_tokens


@dataclass(frozen=True)
class Ladder:
    """The next of a few horizons after every stage."""

    kind: Literal["ladder"] = plain("ladder", _KINDS)
    ladder_tokens: tuple[int, ...] = plain(
        (128, 256, 512, 1024, 2048, 4096),
        "the horizons, in rising order",
        "[1, 1e9]",
    )
    stage_steps: int = plain(100, "optimizer steps of one stage", "[1, 1e9]")

    def fastest_schedule(self, num_steps: int) -> Schedule:
        """The horizon at each of ``num_steps`` steps."""
        return _stairs(self.ladder_tokens, self.stage_steps, num_steps)


@dataclass(frozen=True)
class Progressive:
    """A horizon that grows by the same number of tokens after every stage."""

    kind: Literal["progressive"] = plain("progressive", _KINDS)
    start_tokens: int = plain(128, "horizon of the first stage", "[1, 1e9]")
    growth_tokens: int = plain(128, "how much longer each stage's horizon is than the one before", "[1, 1e9]")
    end_tokens: int = plain(4096, "where the horizon stops growing", "[1, 1e9]")
    stage_steps: int = plain(100, "optimizer steps of one stage", "[1, 1e9]")

    def fastest_schedule(self, num_steps: int) -> Schedule:
        """The horizon at each of ``num_steps`` steps."""
        num_stages = -(-num_steps // self.stage_steps)
        grown = range(self.start_tokens, self.end_tokens, self.growth_tokens)
        return _stairs((*grown[:num_stages], self.end_tokens), self.stage_steps, num_steps)


@dataclass(frozen=True)
class EntropyGated:
    """A ladder whose next rung is climbed at a stage's end if held-out responses allow it."""

    kind: Literal["entropy_gated"] = plain("entropy_gated", _KINDS)
    ladder_tokens: tuple[int, ...] = plain(
        (128, 256, 512, 1024, 2048, 4096),
        "the horizons, in rising order",
        "[1, 1e9]",
    )
    stage_steps: int = plain(100, "optimizer steps of one stage; its gates are tested at its end", "[1, 1e9]")
    min_entropy_nats: float = plain(
        0.1,
        "held-out entropy that the next rung requires. Under reverse KL it collapses to about 0.05 and a "
        "healthy mix holds about 0.28",
        "[0, inf)",
    )
    min_entropy_frac: float = plain(
        0.5,
        "share of the highest entropy at any stage's end so far that the next rung requires; 0 is off",
        "[0, 1]",
    )
    max_truncated_frac: float = plain(
        0.5,
        "share of held-out responses cut at evaluation.max_response_tokens above which no rung is climbed; 1 is off",
        "[0, 1]",
    )
    max_repetition_frac: float = plain(
        0.1,
        "share of held-out responses that end in a loop above which no rung is climbed; 1 is off",
        "[0, 1]",
    )
    on_failure: Literal["freeze", "freeze_here", "retry"] = plain(
        "freeze",
        "when a gate fails: freeze: keep the last stable horizon (the longest whose stage passed, or the "
        "first) for the rest of the run; freeze_here: keep the present horizon for the rest of the run; retry: train "
        "another stage at the present horizon and test again",
    )

    def fastest_schedule(self, num_steps: int) -> Schedule:
        """The horizon at each of ``num_steps`` steps if every gate passes: an upper bound."""
        return _stairs(self.ladder_tokens, self.stage_steps, num_steps)


CurriculumConfig = FixedHorizon | Ladder | Progressive | EntropyGated
"""Whatever a config may hold as its curriculum."""


def _stairs(rungs: tuple[int, ...], stage_steps: int, num_steps: int) -> Schedule:
    num_stages = -(-num_steps // stage_steps)
    return piecewise({stage * stage_steps: rung for stage, rung in enumerate(rungs[:num_stages])})
