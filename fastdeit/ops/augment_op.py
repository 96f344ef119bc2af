"""Image augmentation by a plan on uint8 batches: RandAugment's operations as Pillow computes them, to the bit.

Which operation an image gets is drawn elsewhere, see `fastdeit.train.plans`. There is no gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdeit import backends
from fastdeit.kernels.augment.operations import ROW, Operation
from fastdeit.ops import launchers
from fastdeit.ops.augment_layers import augmented_layer, flipped

_CHUNK = 1 << 22  # pixels that the reference has in float64 at once


def augment(
    images: Tensor,
    plan: Tensor,
    *,
    flips: Tensor | None = None,
    levels: Tensor | None = None,
    fill: Sequence[int] = (0, 0, 0),
) -> Tensor:
    """Flips each image, applies its operations in order, and maps its levels through a table.

    Equal to Pillow's ImageOps, ImageEnhance, Image.transform and Image.rotate bit for bit.

    Args:
        images: (B, C, H, W) uint8 of 1 or 3 channels. Contiguous and channels-last tensors are read as they are.
        plan: (B, L, 8) float64, L operations for each image as `fastdeit.kernels.augment.operations` has them. L may be 0.
        flips: (B,) uint8: 0 for none, 1 from left to right, 2 from top to bottom, 3 both, before the first operation; or None.
        levels: (C, 256) float32, the result for each level, such as its normalised value; or None: the levels themselves.
        fill: C levels, of the area that an affine operation brings in from outside the image.

    Returns:
        (B, C, H, W), contiguous: uint8, or float32 with levels.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a level does not fit, or a plan on the CPU has an unknown operation.
    """
    fill = _check(images, plan, flips, levels, fill)
    return _augment(images, plan, flips, levels, fill)


def augment_reference(
    images: Tensor,
    plan: Tensor,
    *,
    flips: Tensor | None = None,
    levels: Tensor | None = None,
    fill: Sequence[int] = (0, 0, 0),
) -> Tensor:
    """Reference of `augment` in plain PyTorch."""
    B, C, H, W = images.shape
    out = torch.empty((B, C, H, W), dtype=torch.uint8 if levels is None else levels.dtype, device=images.device)
    at_once = max(1, _CHUNK // (H * W))
    for part in (slice(start, start + at_once) for start in range(0, B, at_once)):
        chosen = images[part].contiguous()
        if flips is not None:
            chosen = flipped(chosen, flips[part])
        for layer in range(plan.shape[1]):
            chosen = augmented_layer(chosen, plan[part, layer], fill)
        if levels is not None:
            chosen = torch.stack([levels[c][chosen[:, c].int()] for c in range(C)], 1)
        out[part] = chosen
    return out


def why_reference(images: Tensor) -> str | None:
    """None when `augment` runs its kernels on images, else why it runs the reference."""
    return backends.why_reference(images.new_empty(0, dtype=torch.float32))  # levels are integers: the device decides


def _check(images, plan, flips, levels, fill) -> list[int]:
    for name, tensor, dtype in (
        ("images", images, torch.uint8),
        ("plan", plan, torch.float64),
        ("flips", flips, torch.uint8),
        ("levels", levels, torch.float32),
    ):
        if tensor is None and name in ("flips", "levels"):
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            given = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"{name}: expected a tensor of {dtype}, got {given}")
        if tensor.device != images.device:
            raise ValueError(f"{name}: expected device {images.device} as images has, got {tensor.device}")
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise ValueError(f"images: expected shape (B, 1 or 3, H, W) with pixels, got {tuple(images.shape)}")
    B, C, H, W = images.shape
    if C * H * W >= 2**31:
        raise ValueError(f"images: expected less than 2^31 elements an image, got {C} x {H} x {W}")
    if plan.dim() != 3 or plan.shape[::2] != (B, ROW):
        raise ValueError(f"plan: expected shape ({B}, any, {ROW}), got {tuple(plan.shape)}")
    if flips is not None and flips.shape != (B,):
        raise ValueError(f"flips: expected shape ({B},), got {tuple(flips.shape)}")
    if levels is not None and levels.shape != (C, 256):
        raise ValueError(f"levels: expected shape ({C}, 256), got {tuple(levels.shape)}")
    fill = list(fill)
    if len(fill) < C or not all(isinstance(v, int) and 0 <= v <= 255 for v in fill):
        raise ValueError(f"fill: expected {C} integers from 0 to 255, got {fill}")
    if plan.device.type == "cpu" and not backends.registered_path(plan):
        known = (plan[..., 0] == plan[..., 0].round()) & (plan[..., 0] >= 0) & (plan[..., 0] <= max(Operation))
        if not bool(known.all()):
            raise ValueError(f"plan: expected operations from 0 to {max(Operation)}, got {plan[..., 0][~known][0]:g}")
    return fill


@torch.library.custom_op("fastdeit::augment", mutates_args=())
def _augment(images: Tensor, plan: Tensor, flips: Tensor | None, levels: Tensor | None, fill: list[int]) -> Tensor:
    if why_reference(images) is not None or images.numel() == 0:
        return augment_reference(images, plan, flips=flips, levels=levels, fill=fill)
    if plan.shape[1] == 0:  # one operation that does nothing
        plan = plan.new_zeros((len(images), 1, ROW))
    plan = plan.contiguous()
    fill = (*fill, 0, 0)[:3]
    interleaved = not images.is_contiguous()
    if interleaved:
        images = images.contiguous(memory_format=torch.channels_last)
    last = plan.shape[1] - 1
    for layer in range(last + 1):
        rows = plan[:, layer]
        tables = launchers.augment_tables(images, rows, interleaved)
        images = launchers.augment_layer(
            images, rows, flips, tables, levels if layer == last else None, fill, interleaved
        )
        flips, interleaved = None, False
    return images


@_augment.register_fake
def _(images, plan, flips, levels, fill):
    return images.new_empty(images.shape, dtype=torch.uint8 if levels is None else levels.dtype)
