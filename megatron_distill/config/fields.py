"""How a field is declared: its default, its help text, and the values that it may take.

In: a line of a section in ``schema``. Out: a dataclass field, whose metadata ``rules``, ``files`` and the docs read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_distill.config.schedules import Schedule

_WIDE = 1000  # an upper bound from here on only keeps nonsense out: who broke the lower one need not hear of it


@dataclass(frozen=True)
class Interval:
    """The numbers that a field may hold, written as in mathematics: ``[0, 1)``, ``(0, inf)``. Never NaN or infinite.

    Attributes:
        text: as it is written.
    """

    text: str

    def holds(self, value: float) -> bool:
        """Whether ``value`` lies inside."""
        low, high = map(float, self.text[1:-1].split(","))
        above = value >= low if self.text[0] == "[" else value > low
        return above and (value <= high if self.text[-1] == "]" else value < high)

    def rule(self, value: float) -> str:
        """What ``value``, which lies outside, breaks."""
        low, high = (part.strip() for part in self.text[1:-1].split(","))
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if float(high) < _WIDE:
            return f"must lie in {self.text}"
        if value > float(low):
            return f"must be at most {high}"
        if self.text[0] == "[":
            return "must not be negative" if low == "0" else f"must be at least {low}"
        return "must be positive" if low == "0" else f"must be above {low}"


def plain(default: Any, help_text: str, within: str = "") -> Any:
    """A field; of a number, a schedule or a list of numbers, ``within`` is the interval in which each value must lie."""
    metadata: dict[str, Any] = {"help": help_text}
    if within:
        metadata["within"] = Interval(within)
    return _field(default, metadata)


def function(default: Any, built_in: tuple[str, ...], help_text: str) -> Any:
    """A name, several, or several with values, each built in or ``path/to/file.py:function``; paths become absolute."""
    return _field(default, {"help": help_text, "function": True, "built_in": built_in})


def broken_range(name: str, metadata: Mapping[str, Any], value: Any) -> str | None:
    """The rule that a field's value breaks by lying outside its interval; None if it lies inside."""
    within: Interval | None = metadata.get("within")
    if within is None or value is None:
        return None
    numbers = value.values if isinstance(value, Schedule) else value if isinstance(value, tuple) else (value,)
    outside = [number for number in numbers if not within.holds(number)]
    if not outside:
        return None
    return f"a share {within.rule(outside[0])}" if name.endswith("_frac") else within.rule(outside[0])


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)
