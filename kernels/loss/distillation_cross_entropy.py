"""Launches of the distillation loss's kernels, and their configuration. Nothing waits for the host."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from fastdeit.kernels.loss.distillation_cross_entropy_kernels import (
    STATISTICS,
    distillation_cross_entropy_backward_kernel,
    distillation_cross_entropy_forward_kernel,
    loss_sum_forward_kernel,
)
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.launch import launch

_LARGEST_BLOCK = 2048
_SUM_BLOCK, _SUM_WARPS = 1024, 4


@dataclass(frozen=True)
class Config:
    block: int  # classes per step of a program
    num_warps: int


def select_config(classes: int) -> Config:
    """A row in one block where it fits, 8 classes per thread: a 16-byte load of each of up to four streams."""
    block = min(triton.next_power_of_2(classes), _LARGEST_BLOCK)
    return Config(block, num_warps=min(max(block // 256, 1), 8))


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """x with unit stride along its classes: itself unless its layout has none."""
    return x if x is None or x.dim() == 1 or x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _vector(classes: int, *tensors: torch.Tensor | None) -> int:
    """The largest power of two up to 16 that divides C and every stride between rows."""
    vector = classes & -classes
    for x in tensors:
        if x is not None and x.dim() == 2 and x.shape[0] > 1 and x.stride(0):
            vector = min(vector, x.stride(0) & -x.stride(0))
    return min(vector, 16)


def _is_soft(target: torch.Tensor | None) -> bool:
    return target is not None and target.is_floating_point()


def _weights(kind: str, base: str, alpha: float) -> tuple[float, float]:
    """The weights of the base and the distillation term; 1 for a term that is alone."""
    if kind == "none":
        return 1.0, 0.0
    return (0.0, 1.0) if base == "none" else (1.0 - alpha, alpha)


def distillation_cross_entropy_forward(
    logits: torch.Tensor | None,
    dist_logits: torch.Tensor | None,
    target: torch.Tensor | None,
    teacher: torch.Tensor | None,
    kind: str,
    base: str,
    alpha: float,
    tau: float,
    label_smoothing: float,
    soft_divisor: str,
    reduction: str,
    out_dtype: torch.dtype,
    *,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Arguments as the op's, in what it allows. dist_logits is None where it is logits, logits are None with base "none".

    Returns the loss in out_dtype and, if they are to be kept for backward, statistics (B, STATISTICS) fp32 and hard distillation's
    labels (B,) int32.
    """
    head = dist_logits if logits is None else logits
    batch, classes = head.shape
    reduced = reduction != "none"
    loss = head.new_empty(() if reduced else (batch,), dtype=out_dtype)
    statistics = head.new_empty(batch, STATISTICS.value, dtype=torch.float32) if keep else None
    labels = head.new_empty(batch, dtype=torch.int32) if keep and kind == "hard" else None
    if batch == 0:
        return loss.fill_(float("nan") if reduction == "mean" else 0.0), statistics, labels
    rows = head.new_empty(batch, dtype=torch.float32) if reduced else loss
    tensors = [_rows(x) for x in (logits, dist_logits, target, teacher)]
    base_weight, dist_weight = _weights(kind, base, alpha)
    if kind == "soft":
        dist_weight *= tau**2 / (classes if soft_divisor == "numel" else 1)
    config = select_config(classes)
    launch(
        distillation_cross_entropy_forward_kernel,
        (batch,),
        (
            *tensors,
            rows,
            statistics,
            labels,
            *map(_stride, tensors),
            base_weight,
            dist_weight,
            float(label_smoothing),
            1.0 / tau if kind == "soft" else 1.0,
        ),
        (
            classes,
            config.block,
            _vector(classes, *tensors),
            base,
            kind,
            _is_soft(target),
            teacher is not None and not _is_soft(teacher),
        ),
        config.num_warps,
    )
    if reduced:
        divisor = float(batch if reduction == "mean" else 1)
        launch(loss_sum_forward_kernel, (1,), (rows, loss, batch, divisor), (_SUM_BLOCK,), _SUM_WARPS)
    return loss, statistics, labels


def distillation_cross_entropy_backward(
    dloss: torch.Tensor,
    logits: torch.Tensor | None,
    dist_logits: torch.Tensor | None,
    target: torch.Tensor | None,
    teacher: torch.Tensor | None,
    statistics: torch.Tensor,
    labels: torch.Tensor | None,
    kind: str,
    base: str,
    alpha: float,
    tau: float,
    label_smoothing: float,
    soft_divisor: str,
    reduction: str,
    *,
    need_logits: bool = True,
    need_dist: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of logits and dist_logits in their dtypes, contiguous, None where there is none or it is not needed.

    dloss has forward's shape; the other tensors are forward's arguments and results.
    """
    head = dist_logits if logits is None else logits
    batch, classes = head.shape

    def empty(x, needed):
        return torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and needed else None

    dlogits, ddist = empty(logits, need_logits), empty(dist_logits, need_dist)
    if batch == 0 or (dlogits is None and ddist is None):
        return dlogits, ddist
    base_scale, dist_scale = _weights(kind, base, alpha)
    if base == "binary_cross_entropy":
        base_scale /= classes
    if kind == "soft":
        dist_scale *= tau / (classes if soft_divisor == "numel" else 1)
    if reduction == "mean":
        base_scale, dist_scale = base_scale / batch, dist_scale / batch
    # A head whose gradient is not needed is not read.
    if dlogits is None:
        base, logits, target = "none", None, None
    if ddist is None and dist_logits is not None:
        kind, dist_logits = "none", None
    if kind != "soft":
        teacher = None
    tensors = [_rows(x) for x in (logits, dist_logits, target, teacher)]
    config = select_config(classes)
    launch(
        distillation_cross_entropy_backward_kernel,
        (batch, triton.cdiv(classes, config.block)),
        (
            dloss,
            *tensors,
            statistics,
            labels if kind == "hard" else None,
            dlogits,
            ddist,
            dloss.stride(0) if dloss.dim() else 0,
            *map(_stride, tensors),
            base_scale,
            dist_scale,
            float(label_smoothing),
            1.0 / tau if kind == "soft" else 1.0,
        ),
        (classes, config.block, _vector(classes, *tensors), base, kind, _is_soft(target)),
        config.num_warps,
    )
    return dlogits, ddist


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """DeiT's training under bf16 autocast at ImageNet-1k's 1000 classes, an fp32 model, and soft distillation at 21841 classes."""
    for classes, low, base, kind, soft_target, teacher_labels in (
        (1000, "*bf16", "cross_entropy", "hard", True, False),  # mixup
        (1000, "*bf16", "cross_entropy", "hard", False, True),  # cached labels
        (1000, "*bf16", "cross_entropy", "soft", True, False),
        (1000, "*bf16", "binary_cross_entropy", "hard", True, False),  # DeiT III
        (1000, "*bf16", "cross_entropy", "none", True, False),
        (1000, "*fp32", "cross_entropy", "hard", True, False),
        (21841, "*bf16", "cross_entropy", "soft", True, False),
    ):
        config = select_config(classes)
        tile = dict(C=classes, BLOCK=config.block, VECTOR=_vector(classes), BASE=base, KIND=kind)
        strides = dict.fromkeys(("logits_stride", "dist_stride", "target_stride", "teacher_stride"), "i32")
        scalars = dict.fromkeys(("label_smoothing", "inverse_tau"), "fp32")
        common = dict(logits_ptr=low, target_ptr="*fp32" if soft_target else "*i64", statistics_ptr="*fp32")
        if kind != "none":
            common |= dict(dist_ptr=low)
        if kind == "hard":
            common |= dict(teacher_label_ptr="*i32")
        forward = common | dict(loss_ptr="*fp32", base_weight="fp32", dist_weight="fp32") | strides | scalars
        backward = common | dict(dloss_ptr="*fp32", dloss_stride="i32", dlogits_ptr=low) | strides | scalars
        backward |= dict(base_scale="fp32", dist_scale="fp32")
        if kind != "none":
            forward |= dict(teacher_ptr="*i16" if teacher_labels else low)
            backward |= dict(ddist_ptr=low)
        if kind == "soft":
            backward |= dict(teacher_ptr=low)
        label = f"C={classes} {low[1:]} {base} {kind} {'soft target' if soft_target else 'labels'}"
        labels = dict(SOFT_TARGET=soft_target)
        for kernel, signature, constexprs in (
            (distillation_cross_entropy_forward_kernel, forward, labels | dict(TEACHER_LABELS=teacher_labels)),
            (distillation_cross_entropy_backward_kernel, backward, labels),
        ):
            yield AotConfig(kernel, signature, tile | constexprs, config.num_warps, 1, label, matrix=False)
    signature = dict(row_loss_ptr="*fp32", loss_ptr="*fp32", B="i32", divisor="fp32")
    yield AotConfig(loss_sum_forward_kernel, signature, dict(BLOCK=_SUM_BLOCK), _SUM_WARPS, 1, "fp32", matrix=False)
