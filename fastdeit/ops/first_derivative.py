"""Backward passes that have no derivative of their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_is_batched, _is_legacy_batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an autograd.Function's backward fail when it is differentiated, and only then.

    `once_differentiable` sees that coming only where the upstream gradient requires a gradient. Behind a sum it does not, though
    ours depends on the inputs too, and would pass for a constant: so the upstream gradient is made to require one.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        try:
            if not torch.is_grad_enabled():
                return backward(ctx, *gradients)
            return once(ctx, *(g if g is None else g.detach().requires_grad_() for g in gradients))
        except RuntimeError as error:  # a batched tensor has no memory that a kernel could be given
            if any(g is not None and (_is_batched(g) or _is_legacy_batched(g)) for g in gradients):
                raise RuntimeError(
                    "a backward pass inside vmap (is_grads_batched, vectorize=True): the kernels take one gradient at a time. "
                    'Run the forward pass under fastdeit.use_backend("reference")'
                ) from error
            raise

    return checked
