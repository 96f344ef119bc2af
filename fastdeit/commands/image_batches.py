"""Batches of image files, prepared for an optimized model."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastdeit.inference.images import preparation
from fastdeit.inference.model import OptimizedModel

MOST = 512  # images of a folder


def batch_reader(model: OptimizedModel, max_megapixels: float | None = None) -> Callable[[Sequence[Path]], Tensor]:
    """A function from paths to a batch on the model's device.

    Args:
        max_megapixels: of an image; by default that of training.

    Raises:
        ValueError: the model does not know how images are prepared.
    """
    from fastdeit.train.config import Config
    from fastdeit.train.image_files import read_image

    prepare, mode = preparation(model), "L" if model.architecture.in_chans == 1 else "RGB"
    limit = Config.max_image_megapixels if max_megapixels is None else max_megapixels
    return lambda paths: torch.stack([prepare(read_image(path, mode, limit)) for path in paths]).to(model.device)


def labelled_images(folder: Path, model: OptimizedModel, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Batches of at most MOST images of a folder, taken evenly from all there are.

    Their labels are the folders that they are in, or what the model predicts where all are in one.
    """
    from fastdeit.commands.predict import image_files

    read, paths = batch_reader(model), image_files([folder])
    paths = paths[:: -(-len(paths) // MOST)]
    folders, found = sorted({path.parent for path in paths}), []
    for start in range(0, len(paths), size):
        chosen = paths[start : start + size]
        images = read(chosen)
        labels = torch.tensor([folders.index(path.parent) for path in chosen])
        found.append((images.cpu(), labels if len(folders) > 1 else model(images).argmax(-1)))
    return found
