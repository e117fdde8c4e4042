"""Backwards that are differentiated once, and say so if asked for more.

The losses' gradients are written by kernels, which autograd cannot see through. PyTorch's own ``once_differentiable`` refuses a
second derivative too, but names neither the loss nor a way out.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from megatron_distill.errors import LossError

Gradients = tuple[Tensor | None, ...]


class _Refuse(torch.autograd.Function):
    """The identity, whose derivative is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise LossError(
            "loss = differentiated twice: its gradient is written by kernels that have no derivative. Second derivatives "
            "of a loss over a vocabulary are not offered. Take create_graph=True away, or write the loss in plain PyTorch."
        )


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorates the backward of an autograd function: it runs without a graph, and its own derivative is a ``LossError``."""

    @wraps(backward)
    def run(ctx: Any, *upstream: Tensor) -> Gradients:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(None if grad is None else _Refuse.apply(grad.requires_grad_()) for grad in gradients)

    return run
