"""Prepares image files for an optimized model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdeit.inference.model import OptimizedModel


def preparation(model: OptimizedModel) -> Callable[[Any], Tensor]:
    """A function from a Pillow image to a tensor (K, H, W): resized, cropped, and normalised unless the model takes uint8.

    Raises:
        ValueError: the model does not know how.
    """
    import timm.data

    known = model.preprocessing
    if known.crop_pct is None or known.interpolation is None or known.mean is None or known.std is None:
        raise ValueError("does not say how images are resized and normalised, since the model's configuration did not")
    raw = model.options.images == "uint8"
    transform = timm.data.create_transform(
        (model.architecture.in_chans, *model.architecture.img_size),
        interpolation="bilinear" if known.interpolation == "random" else known.interpolation,
        mean=known.mean,
        std=known.std,
        crop_pct=known.crop_pct,
        crop_mode=known.crop_mode,
        use_prefetcher=raw,  # which leaves out the normalisation
    )
    return lambda image: torch.as_tensor(transform(image))
