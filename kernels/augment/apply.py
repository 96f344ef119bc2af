"""One layer of an augmentation plan applied to a batch of images, each by its own operation, with Pillow's arithmetic.

The first layer also flips and takes images as a loader has them, channels last; the last one can replace levels by normalised
values. Pillow resamples in float64 and truncates, so that fused multiply-adds would differ in the last bit: they are off.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastdeit.kernels.augment.operations import Operation
from fastdeit.kernels.augment.tables import FIRST, LAST, blended, luma
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.launch import cdiv, launch

BLOCK, PART, NUM_WARPS = (
    512,
    128,
    4,
)  # pixels of a program, and those of them that an affine operation has in registers at once
COLOR = tl.constexpr(Operation.COLOR.value)
SHARPNESS = tl.constexpr(Operation.SHARPNESS.value)
AFFINE = tl.constexpr(Operation.AFFINE.value)


@triton.jit
def _pixel(x, y, flips, FLIPS: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """The number in memory of the pixel that is at (x, y) after flips."""
    if FLIPS:
        x = tl.where((flips & 1) != 0, W - 1 - x, x)
        y = tl.where((flips & 2) != 0, H - 1 - y, y)
    return y * W + x


@triton.jit
def _store(out_ptr, at, channel, level, levels_ptr, inside):
    """Writes levels, or what they stand for in levels_ptr (C, 256)."""
    if levels_ptr is None:
        tl.store(out_ptr + at, level.to(tl.uint8), inside)
    else:
        tl.store(out_ptr + at, tl.load(levels_ptr + channel * 256 + level.to(tl.int32), inside), inside)


@triton.jit
def _clamped(i, last):
    return tl.minimum(tl.maximum(i, 0), last)  # no NaN: pixel numbers


@triton.jit
def _cubic(a, b, c, d, t):
    """Pillow's cubic through four float64 values, a = -1, at t between the two in the middle."""
    return b + t * ((-a + c) + t * ((2 * (a - b) + c - d) + t * (-a + b - c + d)))


@triton.jit
def _resampled_row(
    ptr,
    x,
    y,
    t,
    flips,
    inside,
    BICUBIC: tl.constexpr,
    FLIPS: tl.constexpr,
    PIXEL: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
):
    """Row y at x + t, for whole numbers x: of the four or two nearest pixels, those outside being the border's."""
    y = _clamped(y, H - 1)
    b = tl.load(ptr + _pixel(_clamped(x, W - 1), y, flips, FLIPS, H, W) * PIXEL, inside, other=0).to(tl.float64)
    c = tl.load(ptr + _pixel(_clamped(x + 1, W - 1), y, flips, FLIPS, H, W) * PIXEL, inside, other=0).to(tl.float64)
    if BICUBIC:
        a = tl.load(ptr + _pixel(_clamped(x - 1, W - 1), y, flips, FLIPS, H, W) * PIXEL, inside, other=0).to(tl.float64)
        d = tl.load(ptr + _pixel(_clamped(x + 2, W - 1), y, flips, FLIPS, H, W) * PIXEL, inside, other=0).to(tl.float64)
        value = _cubic(a, b, c, d, t)
    else:
        value = b + t * (c - b)
    return value


@triton.jit
def _store_affine(
    image_ptr,
    out_ptr,
    row_ptr,
    levels_ptr,
    at,
    flips,
    fill_0,
    fill_1,
    fill_2,
    FLIPS: tl.constexpr,
    PIXEL: tl.constexpr,
    CHANNEL: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    PART: tl.constexpr,
):
    """Writes the pixels `at` (PART,) of an image that is moved by the matrix in its row of the plan."""
    inside = at < H * W
    column, line = (at % W).to(tl.float64) + 0.5, (at // W).to(tl.float64) + 0.5
    u = tl.load(row_ptr + 2) * column + tl.load(row_ptr + 3) * line + tl.load(row_ptr + 4)
    v = tl.load(row_ptr + 5) * column + tl.load(row_ptr + 6) * line + tl.load(row_ptr + 7)
    found = inside & (u >= 0) & (u < W) & (v >= 0) & (v < H)
    u, v = u - 0.5, v - 0.5
    left, top = tl.floor(u), tl.floor(v)
    tx, ty = u - left, v - top
    left, top = left.to(tl.int32), top.to(tl.int32)
    bicubic = tl.load(row_ptr + 1) > 0
    for channel in tl.static_range(C):
        ptr = image_ptr + channel * CHANNEL
        value = tl.zeros((PART,), tl.float64)
        if bicubic:
            a = _resampled_row(ptr, left, top - 1, tx, flips, found, True, FLIPS, PIXEL, H, W)
            b = _resampled_row(ptr, left, top, tx, flips, found, True, FLIPS, PIXEL, H, W)
            c = _resampled_row(ptr, left, top + 1, tx, flips, found, True, FLIPS, PIXEL, H, W)
            d = _resampled_row(ptr, left, top + 2, tx, flips, found, True, FLIPS, PIXEL, H, W)
            value = _cubic(a, b, c, d, ty)
        else:
            b = _resampled_row(ptr, left, top, tx, flips, found, False, FLIPS, PIXEL, H, W)
            c = _resampled_row(ptr, left, top + 1, tx, flips, found, False, FLIPS, PIXEL, H, W)
            value = b + ty * (c - b)
        level = tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)  # no NaN: sums of levels
        fill = fill_0 if channel == 0 else (fill_1 if channel == 1 else fill_2)
        _store(out_ptr, channel * (H * W) + at, channel, tl.where(found, level, fill), levels_ptr, inside)


@triton.jit(do_not_specialize=["plan_stride", "fill_0", "fill_1", "fill_2"])
def augment_apply_kernel(
    images_ptr,  # (B, C, H, W) uint8, or in the order (B, H, W, C) if INTERLEAVED
    out_ptr,  # (B, C, H, W) uint8, or of levels' dtype
    plan_ptr,  # (B, ROW) float64
    flips_ptr,  # (B,) uint8: 1 flips from left to right, 2 from top to bottom, 3 both, before the operation; or None
    tables_ptr,  # (B, C, 256) uint8
    levels_ptr,  # (C, 256): what is written in place of each level; or None
    plan_stride,  # from one image's row to the next one's
    fill_0,
    fill_1,
    fill_2,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """A program writes BLOCK pixels (program id 1) of one image (program id 0)."""
    PIXEL: tl.constexpr = C if INTERLEAVED else 1
    CHANNEL: tl.constexpr = 1 if INTERLEAVED else H * W
    FLIPS: tl.constexpr = flips_ptr is not None
    image = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x, y = at % W, at // W
    inside = at < H * W
    image_ptr = images_ptr + image * (C * H * W)
    out_ptr += image * (C * H * W)
    flips = 0
    if FLIPS:
        flips = tl.load(flips_ptr + image).to(tl.int32)
    row_ptr = plan_ptr + image * plan_stride
    operation = tl.load(row_ptr).to(tl.int32)

    if operation == AFFINE:
        for start in range(0, BLOCK, PART):
            part = tl.program_id(1) * BLOCK + start + tl.arange(0, PART)
            _store_affine(
                image_ptr,
                out_ptr,
                row_ptr,
                levels_ptr,
                part,
                flips,
                fill_0,
                fill_1,
                fill_2,
                FLIPS,
                PIXEL,
                CHANNEL,
                H,
                W,
                C,
                PART,
            )
    elif operation == SHARPNESS:
        factor = tl.load(row_ptr + 2).to(tl.float32)
        within = inside & (x > 0) & (x < W - 1) & (y > 0) & (y < H - 1)
        for channel in tl.static_range(C):
            ptr = image_ptr + channel * CHANNEL
            level = tl.load(ptr + _pixel(x, y, flips, FLIPS, H, W) * PIXEL, inside, other=0).to(tl.int32)
            total = 4 * level
            for dy in tl.static_range(-1, 2):
                for dx in tl.static_range(-1, 2):
                    near = _pixel(x + dx, y + dy, flips, FLIPS, H, W) * PIXEL
                    total += tl.load(ptr + near, within, other=0).to(tl.int32)
            smooth = tl.where(within, (2 * total + 13) // 26, level).to(tl.float32)  # Pillow's SMOOTH leaves the border
            _store(out_ptr, channel * (H * W) + at, channel, blended(smooth, level, factor), levels_ptr, inside)
    elif (operation == COLOR) & (C == 3):
        factor = tl.load(row_ptr + 2).to(tl.float32)
        source = _pixel(x, y, flips, FLIPS, H, W) * PIXEL
        red = tl.load(image_ptr + source, inside, other=0).to(tl.int32)
        green = tl.load(image_ptr + CHANNEL + source, inside, other=0).to(tl.int32)
        blue = tl.load(image_ptr + 2 * CHANNEL + source, inside, other=0).to(tl.int32)
        grey = luma(red, green, blue).to(tl.float32)
        _store(out_ptr, at, 0, blended(grey, red, factor), levels_ptr, inside)
        _store(out_ptr, H * W + at, 1, blended(grey, green, factor), levels_ptr, inside)
        _store(out_ptr, 2 * H * W + at, 2, blended(grey, blue, factor), levels_ptr, inside)
    else:
        source = _pixel(x, y, flips, FLIPS, H, W) * PIXEL
        for channel in tl.static_range(C):
            level = tl.load(image_ptr + channel * CHANNEL + source, inside, other=0)
            if (operation >= FIRST) & (operation <= LAST):
                level = tl.load(tables_ptr + (image * C + channel) * 256 + level.to(tl.int32), inside, other=0)
            _store(out_ptr, channel * (H * W) + at, channel, level, levels_ptr, inside)


def augment_layer(
    images: torch.Tensor,
    plan: torch.Tensor,
    flips: torch.Tensor | None,
    tables: torch.Tensor,
    levels: torch.Tensor | None,
    fill: tuple[int, int, int],
    interleaved: bool,
) -> torch.Tensor:
    """Images (B, C, H, W) after one operation each, contiguous, uint8 or of levels' dtype.

    Args:
        images: (B, C, H, W) uint8, contiguous or, if interleaved, channels last.
        plan: (B, ROW) float64 with dense rows.
        tables: of `augment_tables`.
        flips: (B,) uint8 as the kernel has it, or None.
        levels: (C, 256), contiguous, or None.
        fill: levels of what an affine operation brings in from outside, one for each of three channels.
    """
    B, C, H, W = images.shape
    out = torch.empty((B, C, H, W), dtype=torch.uint8 if levels is None else levels.dtype, device=images.device)
    launch(
        augment_apply_kernel,
        (B, cdiv(H * W, BLOCK)),
        (images, out, plan, flips, tables, levels, plan.stride(0), *fill),
        (H, W, C, interleaved, BLOCK, PART),
        NUM_WARPS,
        fp_fusion=False,
    )
    return out


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """Colour images of 224 pixels: the first of several layers, and the last."""
    types = dict(images_ptr="*u8", plan_ptr="*fp64", tables_ptr="*u8")
    types |= dict.fromkeys(("plan_stride", "fill_0", "fill_1", "fill_2"), "i32")
    constants = dict(H=224, W=224, C=3, BLOCK=BLOCK, PART=PART)
    first, last = dict(flips_ptr="*u8"), dict(levels_ptr="*fp32")
    for label, found, interleaved in (
        ("first", types | first | dict(out_ptr="*u8"), True),
        ("last", types | last | dict(out_ptr="*fp32"), False),
    ):
        constexprs = constants | dict(INTERLEAVED=interleaved)
        yield AotConfig(augment_apply_kernel, found, constexprs, NUM_WARPS, 1, label, matrix=False, fp_fusion=False)
