"""Listen to what Megatron logs of a step and returns to no one: gradient norm and learning rate."""

from typing import Any

_NAMES = {"grad-norm": "grad_norm", "learning-rate": "lr"}


class ScalarTap:
    """Stands where Megatron expects a TensorBoard writer, and keeps the scalars that a step's metrics want."""

    def __init__(self) -> None:
        self._scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        """Megatron's call, once a scalar and step."""
        if name in _NAMES:
            self._scalars[_NAMES[name]] = float(value)

    def add_text(self, *args: Any, **kwargs: Any) -> None:
        """Megatron writes its arguments; config.json has them."""

    def flush(self) -> None:
        """Nothing is buffered."""

    def take(self) -> dict[str, float]:
        """The scalars since the last call."""
        scalars, self._scalars = self._scalars, {}
        return scalars
