"""Tensors that cases call ops with, and how they call them."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def randn(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(*shape) * scale + shift).to(dtype)


def under_autocast(function: Callable, enabled: bool = True) -> Callable:
    """The function under bfloat16 autocast, but for the float64 oracle."""

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        exact = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        with torch.autocast("cpu", BF16, enabled=enabled and not exact):
            return function(*args, **kwargs)

    return call


def scales(samples: int) -> Tensor:
    """Drop-path factors: dropped and kept samples."""
    return torch.tensor([0.0, 1 / 0.9] * samples)[:samples]


def mlp_weights(dtype: torch.dtype, channels: int, hidden: int) -> list[Tensor]:
    return [
        randn(hidden, channels, dtype=dtype, scale=channels**-0.5),
        randn(hidden, dtype=dtype, scale=0.1),
        randn(channels, hidden, dtype=dtype, scale=hidden**-0.5),
        randn(channels, dtype=dtype, scale=0.1),
    ]


def norm_weights(dtype: torch.dtype, channels: int) -> list[Tensor]:
    return [randn(channels, dtype=dtype, scale=0.3, shift=1), randn(channels, dtype=dtype, scale=0.2)]
