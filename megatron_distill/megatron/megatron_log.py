"""Listen to what Megatron logs of a step and returns to no one: gradient norm and learning rate.

A patch (``backend.prepare`` has all that every run makes): megatron-core 0.19 computes both inside its loop,
hands them to its TensorBoard writer, and gives no callback a look at them. So the writer that Megatron made (with
``--tensorboard-dir``), or the empty seat, is wrapped: what Megatron says goes on to the writer, and two scalars are kept.
``tests/megatron/test_megatron_log.py`` fails when Megatron hands them out itself.
"""

from typing import Any

_NAMES = {"grad-norm": "grad_norm", "learning-rate": "lr"}


class ScalarTap:
    """Sits where Megatron expects its TensorBoard writer, and keeps the scalars that a step's metrics want."""

    def __init__(self, writer: Any = None) -> None:
        """Keep scalars, and pass all that is said on to ``writer``, if there is one."""
        self._writer = writer
        self._scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Megatron's call, once a scalar and step."""
        if name in _NAMES:
            self._scalars[_NAMES[name]] = float(value)
        if self._writer is not None:
            self._writer.add_scalar(name, value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Whatever else Megatron calls (``add_text``, ``flush``, ...): the writer's, or nothing."""
        return getattr(self._writer, name) if self._writer is not None else lambda *args, **kwargs: None

    def take(self) -> dict[str, float]:
        """The scalars since the last call."""
        scalars, self._scalars = self._scalars, {}
        return scalars


def tap_scalars() -> ScalarTap:
    """Wrap Megatron's TensorBoard writer, on the rank that logs (the last); Megatron is initialised by then."""
    from megatron.training import global_vars

    tap = ScalarTap(global_vars.get_tensorboard_writer())
    global_vars._GLOBAL_TENSORBOARD_WRITER = tap
    return tap
