"""Length curricula: how long a response may be at each step, and whether the held-out entropy allows longer ones.

In: ``CurriculumConfig``, and for the gated kind a ``Measurement`` of held-out responses at the end of each stage. Out:
``horizon_tokens(step)``, and a ``Decision`` for each measurement, one line of ``curriculum.jsonl``.

    kind            horizon                                                      decides
    schedule        any schedule over steps; a constant is the fixed horizon     nothing
    ladder          the next rung every ``stage_steps``                          nothing
    progressive     ``growth_tokens`` more every ``stage_steps``                 nothing
    entropy_gated   the next rung every ``stage_steps`` *if* the gates pass      at the end of each stage

Why a gate. On-policy distillation sharpens the student: with reverse KL its entropy collapses, responses then loop and
run into the horizon, and a longer horizon feeds the loop. So train at a short horizon L_0; at the end of stage m measure
H_m, the mean predictive entropy per token of the model's own responses to held-out prompts (full vocabulary, temperature
1, nats); go on to L_{m+1} only if H_m >= H_min, else freeze at the last stable length. (Entropy-gated length curriculum,
arXiv 2605.16826, which publishes neither H_min nor the ladder nor the stage length: all are config fields.)

Three choices of ours. Nothing is tested at step 0, since a base model's entropy starts below that of a collapsed student
(about 0.025 against 0.05 nats). Besides the absolute gate there are a relative one, against the highest H of any stage's
end so far, and guards on truncation and repetition, which tell of collapse even where entropy does not. And nothing is
tested on the top rung, from which there is nowhere to go.

A decision's record holds every input it was made from, so ``replay`` makes the decisions of ``curriculum.jsonl`` again and
there is no other state to save: a resumed run continues exactly.

    curriculum = make_curriculum(config.curriculum, config.num_steps)
    curriculum.replay(read_lines(folder.curriculum), checkpoint_step)
    if curriculum.is_due(step):                              # after ``step`` optimizer steps
        decision = curriculum.decide(step, Measurement(entropy_nats=..., truncated_frac=..., repetition_frac=...))
        append(folder.curriculum, decision.to_record())      # and decision.line() on the console
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from megatron_distill.config import CurriculumConfig, EntropyGated
from megatron_distill.config.schedules import Schedule
from megatron_distill.errors import ConfigError, DataError
from megatron_distill.evaluate.heldout import Measurement
from megatron_distill.runs.run_folder import finite_or_none

Outcome = Literal["advance", "freeze", "retry", "unmeasured"]


@dataclass(frozen=True)
class Gate:
    """One condition of a decision, with its verdict.

    Attributes:
        name: what is compared, as in the config's ``min_`` and ``max_`` fields; ``entropy_frac`` is the share of the highest
            entropy so far.
        measured: the value.
        comparison: how ``measured`` must stand to ``bound``.
        bound: the threshold that applied.
        passed: the verdict.
    """

    name: str
    measured: float
    comparison: Literal[">=", "<="]
    bound: float
    passed: bool

    def __str__(self) -> str:
        """E.g. ``entropy_nats 0.031 < 0.1``: the comparison that holds."""
        failed = {">=": "<", "<=": ">"}[self.comparison]
        return f"{self.name} {self.measured:.3g} {self.comparison if self.passed else failed} {self.bound:.3g}"


@dataclass(frozen=True)
class Decision:
    """What was decided at the end of a stage, and everything that it was decided from.

    Attributes:
        step: optimizer steps done.
        measurement: of the held-out responses.
        highest_entropy_nats: of this and all earlier measurements, what the relative gate refers to.
        gates: each condition that was tested; empty if the entropy could not be measured.
        outcome: "advance" to the next rung; "freeze" for the rest of the run; "retry" or "unmeasured": another stage on
            this rung.
        horizon_before_tokens: until this step.
        horizon_after_tokens: from this step (0-based) on.
        reason: in words.
    """

    step: int
    measurement: Measurement
    highest_entropy_nats: float
    gates: tuple[Gate, ...]
    outcome: Outcome
    horizon_before_tokens: int
    horizon_after_tokens: int
    reason: str

    def to_record(self) -> dict[str, Any]:
        """Its line of ``curriculum.jsonl``; what could not be measured is null."""
        return finite_or_none(asdict(self))

    def line(self) -> str:
        """Its line on the console."""
        change = (
            f"horizon stays at {self.horizon_after_tokens} tokens"
            if self.horizon_after_tokens == self.horizon_before_tokens
            else f"horizon {self.horizon_before_tokens} -> {self.horizon_after_tokens} tokens"
        )
        return f"curriculum at step {self.step}: {change}: {self.reason}"


class Curriculum(Protocol):
    """The cap on response length, over the steps of a run."""

    def horizon_tokens(self, step: int) -> int:
        """The cap in ``step`` (0-based)."""

    def is_due(self, step: int) -> bool:
        """Whether a measurement and a decision are due, and not made yet, once ``step`` optimizer steps are done."""

    def decide(self, step: int, measurement: Measurement) -> Decision:
        """Decide what is due at ``step``; the horizon of ``step`` and later steps follows it."""

    def replay(self, records: Iterable[Mapping[str, Any]], step: int) -> None:
        """Take up the state that a run had after ``step`` optimizer steps, from the lines of its ``curriculum.jsonl``."""


def make_curriculum(config: CurriculumConfig, num_steps: int) -> Curriculum:
    """The curriculum of a run of ``num_steps`` optimizer steps, at its start."""
    if isinstance(config, EntropyGated):
        return EntropyGatedCurriculum(config)
    return PlannedCurriculum(config.fastest_schedule(num_steps))


class PlannedCurriculum:
    """A horizon that depends on the step alone: fixed, scheduled, ladder and progressive. It has no state."""

    def __init__(self, horizon_tokens: Schedule) -> None:
        """Follow a schedule."""
        self._schedule = horizon_tokens

    def horizon_tokens(self, step: int) -> int:
        """The scheduled cap, in whole tokens."""
        return int(self._schedule.at(step))

    def is_due(self, step: int) -> bool:
        """Never."""
        return False

    def decide(self, step: int, measurement: Measurement) -> Decision:
        """Refuse: there is nothing to decide.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"curriculum = planned: decides nothing, so it cannot at step {step}. Ask is_due first, or set "
            "curriculum.kind=entropy_gated."
        )

    def replay(self, records: Iterable[Mapping[str, Any]], step: int) -> None:
        """Nothing to take up."""


class EntropyGatedCurriculum:
    """A ladder of horizons whose next rung must be earned; see the module's docstring."""

    def __init__(self, config: EntropyGated) -> None:
        """Stand on the first rung."""
        self._config = config
        self._decisions: list[Decision] = []

    def horizon_tokens(self, step: int) -> int:
        """The cap that the decisions up to ``step`` led to. Past steps keep theirs."""
        in_force = [decision for decision in self._decisions if decision.step <= step]
        return in_force[-1].horizon_after_tokens if in_force else self._config.ladder_tokens[0]

    def is_due(self, step: int) -> bool:
        """At the end of each stage below the top rung, until a failure froze the horizon."""
        last = self._decisions[-1] if self._decisions else None
        if last is not None and (last.outcome == "freeze" or last.step >= step):
            return False
        return (
            step > 0
            and step % self._config.stage_steps == 0
            and self.horizon_tokens(step) < self._config.ladder_tokens[-1]
        )

    def decide(self, step: int, measurement: Measurement) -> Decision:
        """Test every gate; advance if all pass.

        Raises:
            DataError: if no decision is due at ``step``.
        """
        if not self.is_due(step):
            raise DataError(
                f"curriculum.decide: step = {step}: no decision is due. Stages end every curriculum.stage_steps = "
                f"{self._config.stage_steps} steps, each is decided once, and neither a frozen horizon nor the top rung is. "
                "Ask is_due first."
            )
        past = [decision.measurement.entropy_nats for decision in self._decisions]
        known = [entropy for entropy in (*past, measurement.entropy_nats) if not math.isnan(entropy)]
        highest = max(known, default=math.nan)
        gates = () if math.isnan(measurement.entropy_nats) else self._gates(measurement, highest)
        before = self.horizon_tokens(step)
        outcome, after, reason = self._verdict(gates, before)
        decision = Decision(step, measurement, highest, gates, outcome, before, after, reason)
        self._decisions.append(decision)
        return decision

    def replay(self, records: Iterable[Mapping[str, Any]], step: int) -> None:
        """Make the recorded decisions up to ``step`` again.

        Args:
            records: lines of ``curriculum.jsonl``, in file order.
            step: optimizer steps behind the checkpoint that the run resumes from; later records are left out.

        Raises:
            DataError: a record that this config would not have led to.
        """
        self._decisions = []
        for record in valid_records(records):
            if record["step"] > step:
                break
            measured = {name: math.nan if value is None else value for name, value in record["measurement"].items()}
            decision = self.decide(record["step"], Measurement(**measured))
            if (decision.outcome, decision.horizon_after_tokens) != (record["outcome"], record["horizon_after_tokens"]):
                raise DataError(
                    f"curriculum.jsonl, step {decision.step} = {record['outcome']} at {record['horizon_after_tokens']} tokens: "
                    f"the same measurement now gives {decision.outcome} at {decision.horizon_after_tokens}. The curriculum's "
                    "config has changed, and resuming would mix two. Restore it, or start a new run."
                )

    def _gates(self, measurement: Measurement, highest_entropy_nats: float) -> tuple[Gate, ...]:
        config = self._config
        entropy_frac = measurement.entropy_nats / highest_entropy_nats if highest_entropy_nats > 0 else 1.0

        def at_least(name: str, measured: float, bound: float) -> Gate:
            return Gate(name, measured, ">=", bound, measured >= bound)

        def at_most(name: str, measured: float, bound: float) -> Gate:
            return Gate(name, measured, "<=", bound, measured <= bound)

        return (
            at_least("entropy_nats", measurement.entropy_nats, config.min_entropy_nats),
            at_least("entropy_frac", entropy_frac, config.min_entropy_frac),
            at_most("truncated_frac", measurement.truncated_frac, config.max_truncated_frac),
            at_most("repetition_frac", measurement.repetition_frac, config.max_repetition_frac),
        )

    def _verdict(self, gates: tuple[Gate, ...], before_tokens: int) -> tuple[Outcome, int, str]:
        """(outcome, horizon from here on, reason)."""
        ladder, on_failure = self._config.ladder_tokens, self._config.on_failure
        if not gates:
            return "unmeasured", before_tokens, "the entropy could not be measured; another stage on this rung"
        failed = "; ".join(str(gate) for gate in gates if not gate.passed)
        if not failed:
            return "advance", ladder[ladder.index(before_tokens) + 1], "; ".join(map(str, gates))
        if on_failure == "retry":
            return "retry", before_tokens, f"{failed}; another stage on this rung"
        if on_failure == "freeze_here":
            return "freeze", before_tokens, f"{failed}; frozen here"
        # The rung below passed its gates, or this one would not have been reached.
        stable_tokens = ladder[max(ladder.index(before_tokens) - 1, 0)]
        return "freeze", stable_tokens, f"{failed}; frozen at the last stable horizon"


def valid_records(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of ``curriculum.jsonl`` that count, in step order.

    A run that resumed from a checkpoint before some of its decisions made these again, and appended them. So a record
    voids every record before it in the file whose step is not smaller.
    """
    valid: list[Mapping[str, Any]] = []
    for record in records:
        valid = [kept for kept in valid if kept["step"] < record["step"]]
        valid.append(record)
    return valid
