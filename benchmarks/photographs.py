"""Photographs that come with scikit-learn and scikit-image: what the loader is tested and measured on."""

from functools import cache
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageOps

OF_SCIKIT_IMAGE = ("astronaut", "chelsea", "coffee", "rocket")


@cache
def photographs() -> tuple[Image.Image, ...]:
    """Colour photographs at their own sizes: two of scikit-learn, and four of scikit-image where that is installed."""
    from sklearn.datasets import load_sample_images

    arrays = list(load_sample_images().images)
    if find_spec("skimage") is not None:
        import skimage.data

        arrays += [getattr(skimage.data, name)() for name in OF_SCIKIT_IMAGE]
    return tuple(Image.fromarray(np.ascontiguousarray(array)) for array in arrays)


def fitted(width: int, height: int) -> list[Image.Image]:
    """The photographs scaled and cropped to a size."""
    return [ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC) for image in photographs()]
