"""A number that changes over the optimizer steps of a run: KL weight, temperature, prefix share, horizon.

In: points given in a recipe (or a plain number on the command line). Out: ``schedule.at(step)``. One noun serves all:
a constant has one point, a linear ramp two, a piecewise schedule many, and a callable is tabulated when the recipe is
built, so that a run folder's ``config.json`` is complete without any code.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """A function of the step, as points.

    Attributes:
        points: ``((step, value), ...)`` in rising step order; the first step is 0.
        interpolate: True joins the points by straight lines; False holds each value until the next point.
    """

    points: tuple[tuple[int, float], ...]
    interpolate: bool = False

    def at(self, step: int) -> float:
        """The value at ``step`` (0-based); the last point's value holds for ever after."""
        index = max(bisect_right(self.points, step, key=lambda point: point[0]) - 1, 0)
        step_0, value_0 = self.points[index]
        if not self.interpolate or index + 1 == len(self.points):
            return value_0
        step_1, value_1 = self.points[index + 1]
        return value_0 + (value_1 - value_0) * (step - step_0) / (step_1 - step_0)

    @property
    def values(self) -> tuple[float, ...]:
        """The points' values: since points are joined by lines at most, these bound every value."""
        return tuple(value for _, value in self.points)

    def to_json(self) -> Any:
        """A plain number for a constant, else ``{"points": ..., "interpolate": ...}``."""
        if len(self.points) == 1:
            return self.points[0][1]
        return {"points": [list(point) for point in self.points], "interpolate": self.interpolate}

    @classmethod
    def from_json(cls, value: Any) -> "Schedule":
        """The inverse of ``to_json``.

        Raises:
            ValueError: with the rule that ``value`` breaks.
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return constant(_as_float(value))
        if not isinstance(value, Mapping) or not set(value) <= {"points", "interpolate"} or "points" not in value:
            raise ValueError('must be a number, or {"points": [[step, value], ...], "interpolate": true|false}')
        try:
            given = [(_as_float(step), _as_float(number)) for step, number in value["points"]]
            points = tuple((int(step), number) for step, number in given)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError("points must be a list of [step, value] pairs of finite numbers") from error
        steps = [step for step, _ in points]
        if steps != [step for step, _ in given]:
            raise ValueError("steps must be whole numbers")
        if not points or steps[0] != 0 or any(a >= b for a, b in itertools.pairwise(steps)) or steps[-1] >= 1 << 31:
            raise ValueError("points must start at step 0 and rise in step, to 2147483647 at most")
        interpolate = value.get("interpolate", False)
        if not isinstance(interpolate, bool):
            raise ValueError("interpolate must be true or false")
        return cls(points, interpolate)


def _as_float(value: Any) -> float:
    if isinstance(value, bool | str):  # which Python would take for numbers
        raise ValueError("must be a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError("must be a number that is not larger than a float can be") from error


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return Schedule(((0, float(value)),))


def linear(start: float, end: float, num_steps: int) -> Schedule:
    """From ``start`` at step 0 to ``end`` at step ``num_steps``, and ``end`` from there on."""
    return Schedule(((0, float(start)), (num_steps, float(end))), interpolate=True)


def piecewise(values: Mapping[int, float]) -> Schedule:
    """``{step: value}``: each value holds from its step to the next one's."""
    return Schedule(tuple((step, float(value)) for step, value in sorted(values.items())))


def tabulate(function: Callable[[int], float], num_steps: int) -> Schedule:
    """Any function of the step, evaluated now at each of ``num_steps`` steps; equal neighbours are joined."""
    points: list[tuple[int, float]] = []
    for step in range(num_steps):
        value = float(function(step))
        if not points or points[-1][1] != value:
            points.append((step, value))
    return Schedule(tuple(points))
