"""Backward passes that have no derivative of their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastdeit.backends import in_functional_transform


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an autograd.Function's backward fail when it is differentiated, and only then.

    `once_differentiable` sees that coming only where the upstream gradient requires a gradient. Behind a sum it does not, though
    ours depends on the inputs too, and would pass for a constant: so the upstream gradient is made to require one.

    Nor do kernels take the batched gradients that vmap around a backward pass makes: they fail too.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if in_functional_transform():
            raise RuntimeError(
                "a backward pass inside vmap (is_grads_batched, vectorize=True): the kernels take one gradient at a time. "
                'Run the forward pass under fastdeit.use_backend("reference")'
            )
        if torch.is_grad_enabled():
            gradients = tuple(g if g is None else g.detach().requires_grad_() for g in gradients)
        return once(ctx, *gradients)

    return checked
