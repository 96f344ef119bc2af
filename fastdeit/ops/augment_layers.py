"""The operations of an augmentation plan in plain PyTorch, which truncate, clip and round where Pillow does."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdeit.kernels.augment.operations import Operation


def flipped(images: Tensor, flips: Tensor) -> Tensor:
    """Images (N, C, H, W) with the flips (N,) that `augment` describes."""
    for bit, dimension in ((1, 3), (2, 2)):
        images = torch.where((flips & bit).bool().view(-1, 1, 1, 1), images.flip(dimension), images)
    return images


def augmented_layer(images: Tensor, rows: Tensor, fill: Sequence[int]) -> Tensor:
    """Images (N, C, H, W) uint8 after the operation that each one's row (N, 8) of a plan says."""
    out = images.clone()
    kinds = rows[:, 0].long()
    for operation in Operation:
        chosen = (kinds == operation).nonzero()[:, 0]
        if operation is not Operation.NONE and len(chosen):
            out[chosen] = _OPERATIONS[operation](images[chosen], rows[chosen], fill)
    return out


def luma(images: Tensor) -> Tensor:
    """(N, H, W) int32: Pillow's conversion of (N, C, H, W) to grey."""
    levels = images.int()
    if images.shape[1] == 1:
        return levels[:, 0]
    return (levels[:, 0] * 19595 + levels[:, 1] * 38470 + levels[:, 2] * 7471 + 0x8000) >> 16


def _broadcast(arguments: Tensor) -> Tensor:
    return arguments.view(-1, 1, 1, 1)


def _blend(base: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """Image.blend: float32, truncated, clipped."""
    base, factors = base.float(), _broadcast(factors.float())
    return (base + factors * (images.float() - base)).clamp(0, 255).to(torch.uint8)


def _mapped(images: Tensor, tables: Tensor) -> Tensor:
    """Levels replaced by those of tables (N, C, 256)."""
    return tables.gather(-1, images.flatten(2).long()).view_as(images)


def _histograms(images: Tensor) -> Tensor:
    """(N, C, 256) int64."""
    levels = images.flatten(2).long()
    return torch.zeros((*levels.shape[:2], 256), dtype=torch.int64, device=images.device).scatter_add_(
        -1, levels, torch.ones_like(levels)
    )


def _range(histograms: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest level that occurs, (N, C, 1) each."""
    occurs = (histograms > 0).byte()
    return occurs.argmax(-1, keepdim=True), 255 - occurs.flip(-1).argmax(-1, keepdim=True)


def _autocontrast(images, rows, fill):
    low, high = _range(_histograms(images))
    levels = torch.arange(256, device=images.device, dtype=torch.float64)
    # Tensor by tensor: PyTorch takes a number divided by a tensor as a multiplication by the reciprocal.
    scale = torch.full_like(low, 255, dtype=torch.float64) / (high - low).clamp(min=1).double()
    stretched = (levels * scale + -low.double() * scale).clamp(0, 255)
    return _mapped(images, torch.where(high > low, stretched, levels).to(torch.uint8))


def _equalize(images, rows, fill):
    counts = _histograms(images)
    low, high = _range(counts)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, high)) // 255
    spread = (step // 2 + counts.cumsum(-1) - counts) // step.clamp(min=1)
    levels = torch.arange(256, device=images.device)
    return _mapped(images, torch.where((high > low) & (step > 0), spread.clamp(max=255), levels).to(torch.uint8))


def _posterize(images, rows, fill):
    bits = rows[:, 2].clamp(0, 8).long()
    return images & _broadcast((255 << (8 - bits)) & 255).to(torch.uint8)


def _solarize(images, rows, fill):
    return torch.where(images < _broadcast(rows[:, 2]), images, 255 - images)


def _solarize_add(images, rows, fill):
    brighter = (images.int() + _broadcast(rows[:, 2].int())).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def _contrast(images, rows, fill):
    grey = luma(images).flatten(1).long()
    mean = (2 * grey.sum(1) + grey.shape[1]) // (2 * grey.shape[1])  # rounded to the nearest level
    return _blend(_broadcast(mean), images, rows[:, 2])


def _color(images, rows, fill):
    return _blend(luma(images)[:, None], images, rows[:, 2])


def _sharpness(images, rows, fill):
    smooth = images.clone()
    if min(images.shape[2:]) >= 3:  # ImageFilter.SMOOTH: weight 5 in the middle, 1 around it, and the border as it is
        total = _sums(images.float())
        smooth[..., 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)
    return _blend(smooth, images, rows[:, 2])


def _sums(levels: Tensor) -> Tensor:
    """Weighted sums of 3 x 3 pixels, whole numbers."""
    return F.avg_pool2d(levels, 3, 1, divisor_override=1) + 4 * levels[..., 1:-1, 1:-1]


def _affine(images, rows, fill):
    out = torch.empty_like(images)
    for bicubic in (True, False):
        chosen = ((rows[:, 1] > 0) == bicubic).nonzero()[:, 0]
        if len(chosen):
            out[chosen] = _moved(images[chosen], rows[chosen, 2:8], bicubic, fill)
    return out


def _moved(images: Tensor, matrices: Tensor, bicubic: bool, fill: Sequence[int]) -> Tensor:
    """Image.transform with AFFINE: float64, cubic with a = -1, the border's pixels beyond the border, truncated."""
    N, C, H, W = images.shape
    column = torch.arange(W, device=images.device, dtype=torch.float64) + 0.5
    line = torch.arange(H, device=images.device, dtype=torch.float64)[:, None] + 0.5
    a, b, c, d, e, f = (matrices[:, i].view(-1, 1, 1) for i in range(6))
    u, v = a * column + b * line + c, d * column + e * line + f
    outside = (u < 0) | (u >= W) | (v < 0) | (v >= H)
    u, v = u - 0.5, v - 0.5
    left, top = u.floor(), v.floor()
    tx, ty = (u - left)[:, None], (v - top)[:, None]
    left, top = left.long(), top.long()
    pixels = images.flatten(2)

    def at(dx: int, dy: int) -> Tensor:
        where = (top + dy).clamp(0, H - 1) * W + (left + dx).clamp(0, W - 1)
        return pixels.gather(2, where.view(N, 1, -1).expand(-1, C, -1)).view(N, C, H, W).double()

    if bicubic:
        value = _cubic(*(_cubic(*(at(dx, dy) for dx in (-1, 0, 1, 2)), tx) for dy in (-1, 0, 1, 2)), ty)
    else:
        above, below = (at(0, dy) + tx * (at(1, dy) - at(0, dy)) for dy in (0, 1))
        value = above + ty * (below - above)
    filled = torch.tensor(fill[:C], device=images.device, dtype=torch.uint8).view(1, C, 1, 1)
    return torch.where(outside[:, None], filled, value.clamp(0, 255).to(torch.uint8))


def _cubic(a: Tensor, b: Tensor, c: Tensor, d: Tensor, t: Tensor) -> Tensor:
    return b + t * ((-a + c) + t * ((2 * (a - b) + c - d) + t * (-a + b - c + d)))


_OPERATIONS = {
    Operation.AUTOCONTRAST: _autocontrast,
    Operation.EQUALIZE: _equalize,
    Operation.INVERT: lambda images, rows, fill: 255 - images,
    Operation.POSTERIZE: _posterize,
    Operation.SOLARIZE: _solarize,
    Operation.SOLARIZE_ADD: _solarize_add,
    Operation.CONTRAST: _contrast,
    Operation.BRIGHTNESS: lambda images, rows, fill: _blend(torch.zeros_like(images), images, rows[:, 2]),
    Operation.COLOR: _color,
    Operation.SHARPNESS: _sharpness,
    Operation.AFFINE: _affine,
}
