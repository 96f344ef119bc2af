"""Backward passes that have no derivative of their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an autograd.Function's backward fail when it is differentiated, and only then.

    `once_differentiable` sees that coming only where the upstream gradient requires a gradient. Behind a sum it does not, though
    ours depends on the inputs too, and would pass for a constant: so the upstream gradient is made to require one.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            gradients = tuple(g if g is None else g.detach().requires_grad_() for g in gradients)
        return once(ctx, *gradients)

    return checked
