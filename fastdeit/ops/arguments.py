"""Checks of arguments that several ops share. They raise before any work begins."""

import warnings
from typing import Any

import torch
from torch import Tensor


def check_float(name: str, tensor: Any, optional: bool = False) -> None:
    """A floating-point tensor with strides: not sparse, nested or of MKL-DNN."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        allowed = "a floating-point tensor or None" if optional else "a floating-point tensor"
        raise TypeError(f"{name}: expected {allowed}, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    check_strided(name, tensor)


def check_strided(name: str, tensor: Tensor) -> None:
    """A tensor whose elements lie at strides in one block of memory."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.").removeprefix("_")
        raise TypeError(f"{name}: expected a dense tensor (torch.strided), got a {layout} one")


def check_beside(name: str, tensor: Any, x: Tensor, x_name: str = "x", optional: bool = False) -> None:
    """A floating-point tensor on x's device."""
    check_float(name, tensor, optional)
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} as {x_name} has, got {tensor.device}")


def check_vector(name: str, tensor: Any, size: int, x: Tensor) -> None:
    """None, or a floating-point tensor (size,) on x's device."""
    if tensor is None:
        return
    check_beside(name, tensor, x, optional=True)
    if tensor.shape != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(tensor.shape)}")


def check_residual(residual: Any, outputs: int, x: Tensor) -> None:
    """None, or a floating-point tensor (..., outputs) on the device of x (..., C)."""
    if residual is None:
        return
    check_beside("residual", residual, x, optional=True)
    shape = (*x.shape[:-1], outputs)
    if residual.shape != shape:
        raise ValueError(f"residual: expected shape {shape}, got {tuple(residual.shape)}")


def check_drop_path_scale(x: Tensor, drop_path_scale: Tensor | None) -> None:
    """None, or one float32 factor per sample of x (float64 for the oracle), without gradient."""
    if drop_path_scale is None:
        return
    check_beside("drop_path_scale", drop_path_scale, x, optional=True)
    if drop_path_scale.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"drop_path_scale: expected float32, got {drop_path_scale.dtype}")
    if x.dim() < 2 or drop_path_scale.shape != x.shape[:1]:
        given = tuple(drop_path_scale.shape)
        raise ValueError(f"drop_path_scale: expected one factor per sample of x {tuple(x.shape)}, got {given}")
    if drop_path_scale.requires_grad:
        raise ValueError("drop_path_scale: expected a tensor without gradient, got one that requires it")


def check_recompute(recompute: Any) -> None:
    """None, or what backward computes again rather than that forward saves it."""
    if recompute not in (None, "preactivation"):
        raise ValueError(f"recompute: expected 'preactivation' or None, got {recompute!r}")


def instead_of_lean(lean: bool) -> str | None:
    """What `recompute` is where `lean` was given, its former spelling."""
    warnings.warn("lean is deprecated: pass recompute='preactivation'", DeprecationWarning, stacklevel=4)
    return "preactivation" if lean else None
