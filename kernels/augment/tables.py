"""Tables of levels: what an operation that maps levels to levels makes of each of the 256, for an image and channel."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastdeit.kernels.augment.operations import Operation
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.launch import launch

BLOCK, NUM_WARPS = 4096, 4
FIRST = tl.constexpr(Operation.AUTOCONTRAST.value)
LAST = tl.constexpr(Operation.BRIGHTNESS.value)
AUTOCONTRAST = tl.constexpr(Operation.AUTOCONTRAST.value)
EQUALIZE = tl.constexpr(Operation.EQUALIZE.value)
INVERT = tl.constexpr(Operation.INVERT.value)
POSTERIZE = tl.constexpr(Operation.POSTERIZE.value)
SOLARIZE = tl.constexpr(Operation.SOLARIZE.value)
SOLARIZE_ADD = tl.constexpr(Operation.SOLARIZE_ADD.value)
CONTRAST = tl.constexpr(Operation.CONTRAST.value)


@triton.jit
def luma(red, green, blue):
    """Pillow's conversion to grey, of int32 levels."""
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def blended(base, level, factor):
    """Pillow's Image.blend in float32, as a level (int32). Every operation is rounded by itself: compile without fused ones."""
    value = base + factor * (level.to(tl.float32) - base)
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)  # no NaN: levels and a finite factor


@triton.jit
def _histogram(
    image_ptr,
    channel,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(256,) int32: how often each level is in a channel."""
    PIXEL: tl.constexpr = C if INTERLEAVED else 1
    CHANNEL: tl.constexpr = 1 if INTERLEAVED else H * W
    counts = tl.zeros((256,), tl.int32)
    for start in range(0, H * W, BLOCK):
        at = start + tl.arange(0, BLOCK)
        levels = tl.load(image_ptr + channel * CHANNEL + at * PIXEL, at < H * W, other=0).to(tl.int32)
        counts += tl.histogram(levels, 256, mask=at < H * W)
    return counts


@triton.jit
def _mean_luma(
    image_ptr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
):
    """The mean of the grey image, rounded to the nearest level."""
    PIXEL: tl.constexpr = C if INTERLEAVED else 1
    CHANNEL: tl.constexpr = 1 if INTERLEAVED else H * W
    total = tl.zeros((BLOCK,), tl.int32)  # 2^31 / 255 pixels for each element
    for start in range(0, H * W, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < H * W
        grey = tl.load(image_ptr + at * PIXEL, inside, other=0).to(tl.int32)
        if C == 3:
            green = tl.load(image_ptr + CHANNEL + at * PIXEL, inside, other=0).to(tl.int32)
            blue = tl.load(image_ptr + 2 * CHANNEL + at * PIXEL, inside, other=0).to(tl.int32)
            grey = luma(grey, green, blue)
        total += tl.where(inside, grey, 0)
    return (2 * tl.sum(total.to(tl.int64)) + H * W) // (2 * H * W)


@triton.jit(do_not_specialize=["plan_stride"])
def augment_tables_kernel(
    images_ptr,  # (B, C, H, W) uint8, or in the order (B, H, W, C) if INTERLEAVED
    plan_ptr,  # (B, ROW) float64
    tables_ptr,  # (B, C, 256) uint8
    plan_stride,  # from one image's row to the next one's
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program writes the table of one image (program id 0) and channel (program id 1), if the image's operation has one."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1)
    row_ptr = plan_ptr + image * plan_stride
    operation = tl.load(row_ptr).to(tl.int32)
    if (operation < FIRST) | (operation > LAST):
        return
    argument = tl.load(row_ptr + 2)
    image_ptr = images_ptr + image * (C * H * W)
    level = tl.arange(0, 256)
    mapped = level
    if (operation == AUTOCONTRAST) | (operation == EQUALIZE):
        counts = _histogram(image_ptr, channel, H, W, C, INTERLEAVED, BLOCK)
        low = tl.min(tl.where(counts > 0, level, 255))
        high = tl.max(tl.where(counts > 0, level, 0))
        if operation == AUTOCONTRAST:
            scale = 255.0 / tl.where(high > low, high - low, 1).to(tl.float64)
            value = level.to(tl.float64) * scale + (-low).to(tl.float64) * scale
            value = tl.minimum(tl.maximum(value, 0.0), 255.0)  # no NaN: the scale is finite
            mapped = tl.where(high > low, value.to(tl.int32), level)
        else:
            step = (H * W - tl.sum(tl.where(level == high, counts, 0))) // 255
            before = tl.cumsum(counts, 0) - counts
            spread = (step // 2 + before) // tl.where(step > 0, step, 1)
            spread = tl.minimum(spread, 255)  # no NaN: integers
            mapped = tl.where((high > low) & (step > 0), spread, level)
    elif operation == INVERT:
        mapped = 255 - level
    elif operation == POSTERIZE:
        kept = tl.minimum(tl.maximum(argument, 0.0), 8.0).to(tl.int32)  # no NaN: a number of bits
        mapped = level & (255 << (8 - kept))
    elif operation == SOLARIZE:
        mapped = tl.where(level.to(tl.float64) < argument, level, 255 - level)
    elif operation == SOLARIZE_ADD:
        brighter = tl.minimum(level + argument.to(tl.int32), 255)  # no NaN: integers
        mapped = tl.where(level < 128, brighter, level)
    else:
        base = 0.0
        if operation == CONTRAST:
            base = _mean_luma(image_ptr, H, W, C, INTERLEAVED, BLOCK).to(tl.float32)
        mapped = blended(base, level, argument.to(tl.float32))
    tl.store(tables_ptr + (image * C + channel) * 256 + level, mapped.to(tl.uint8))


def augment_tables(images: torch.Tensor, plan: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Tables (B, C, 256) uint8; those of images whose operation needs none hold anything.

    Args:
        images: (B, C, H, W) uint8, contiguous or, if interleaved, channels last.
        plan: (B, ROW) float64, dense rows.
    """
    B, C, H, W = images.shape
    tables = torch.empty((B, C, 256), dtype=torch.uint8, device=images.device)
    args = (images, plan, tables, plan.stride(0))
    launch(augment_tables_kernel, (B, C), args, (H, W, C, interleaved, BLOCK), NUM_WARPS, fp_fusion=False)
    return tables


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Colour images of 224 pixels, as a loader copies them; those that a layer leaves take fewer registers."""
    types = dict(images_ptr="*u8", plan_ptr="*fp64", tables_ptr="*u8", plan_stride="i32")
    constants = dict(H=224, W=224, C=3, INTERLEAVED=True, BLOCK=BLOCK)
    yield AotConfig(augment_tables_kernel, types, constants, NUM_WARPS, 1, "interleaved", matrix=False, fp_fusion=False)
