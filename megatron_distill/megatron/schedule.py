"""Let a step of Megatron begin with what must come before it, and have as many micro-batches as that says.

A patch, for two things that megatron-core 0.19 lets nobody do. Its loop calls nobody between a checkpoint and the next step,
and what may take long (an evaluation, rollouts) should find the step before it saved. And it hands its schedule the number
of micro-batches that the batch sizes make, where a step may have as many as its tokens fill. So the schedule that the loop
asks for is wrapped: every rank calls it once a step, at the same point, before any pipeline begins. Megatron's own count, by
which it warms up the learning rate and numbers samples, stays what the batch sizes make. ``tests/megatron/test_layouts.py``
fails without it.

Parameters are in sync there under ``--overlap-param-gather`` too: before the callback after a step Megatron has taken its
forward hooks away, which gathers all parameters at once, and no optimizer steps before the next forward pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def begin_with(before: Callable[[], int]) -> None:
    """Make every schedule of this process run ``before()``, and then as many micro-batches as it returns.

    Once, before ``pretrain``. The time that ``before`` takes is not the step's: Megatron's own clock stands still, as it does
    in its validation, and so is autograd off.
    """
    import megatron.training.training as training

    choose = training.get_forward_backward_func

    def choose_wrapped(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        schedule = choose(*args, **kwargs)

        @functools.wraps(schedule)
        def wrapped(*, num_microbatches: int, **options: Any) -> Any:
            clock = training.get_timers()("interval-time")
            clock.stop()
            with torch.no_grad():
                count = before()
            clock.start()
            return schedule(num_microbatches=count, **options)

        return wrapped

    training.get_forward_backward_func = choose_wrapped
