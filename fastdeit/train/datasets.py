"""The images: scikit-learn's digits or a folder, checked before training, with timm's transforms."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import Dataset

from fastdeit.train.config import Config

DIGITS_VALIDATION = 360  # of 1,797, stratified; the split does not depend on the run's seed


@dataclass(frozen=True)
class Data:
    train: Dataset
    val: Dataset
    classes: tuple[str, ...]


def load_data(config: Config) -> Data:
    """Training and validation images with the transforms that config asks for.

    Raises:
        ValueError: the folder lacks train/ or val/, a class is empty or is in one of the two only.
    """
    mode = "L" if config.in_chans == 1 else "RGB"
    if config.data == "digits":
        return _digits(mode, config)
    root = Path(config.data)
    classes = check_image_folder(root)
    train, val = (
        timm.data.create_dataset(
            "", root=str(root / split), split=split, search_split=False, input_img_mode=mode, is_training=training
        )
        for split, training in (("train", True), ("val", False))
    )
    train.transform = train_transform(config)
    val.transform = eval_transform(config)
    return Data(train, val, classes)


def check_image_folder(root: Path) -> tuple[str, ...]:
    """The classes of root/train/CLASS/ and root/val/CLASS/. Raises ValueError that names what is missing."""
    if not root.is_dir():
        raise ValueError(f"data: {root} is neither `digits` nor a folder")
    found = {}
    for split in ("train", "val"):
        folder = root / split
        if not folder.is_dir():
            raise ValueError(f"data: {root} has no folder {split}/; expected train/CLASS/ and val/CLASS/ with images")
        found[split] = {d.name for d in folder.iterdir() if d.is_dir()}
        if not found[split]:
            raise ValueError(f"data: {folder} is empty; expected one folder of images per class")
        for name in sorted(found[split]):
            if not any(f.suffix.lower() in get_img_extensions() for f in (folder / name).rglob("*")):
                raise ValueError(f"data: {folder / name} has no image ({', '.join(get_img_extensions())})")
    for here, there in (("train", "val"), ("val", "train")):
        missing = sorted(found[here] - found[there])
        if missing:
            names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ValueError(f"data: {root / there} lacks {names}, which {root / here} has; both need the same classes")
    return tuple(sorted(found["train"]))


def train_transform(config: Config) -> Callable[[Image.Image], Any]:
    return timm.data.create_transform(
        (config.in_chans, config.img_size, config.img_size),
        is_training=True,
        scale=tuple(config.scale),
        ratio=tuple(config.ratio),
        hflip=config.hflip,
        color_jitter=config.color_jitter or None,
        auto_augment=config.aa,
        interpolation=config.interpolation,
        mean=tuple(config.mean),
        std=tuple(config.std),
        re_prob=config.reprob,
        re_mode=config.remode,
    )


def eval_transform(config: Config) -> Callable[[Image.Image], Any]:
    return timm.data.create_transform(
        (config.in_chans, config.img_size, config.img_size),
        interpolation=config.interpolation,
        mean=tuple(config.mean),
        std=tuple(config.std),
        crop_pct=config.crop_pct,
    )


class ArrayDataset(Dataset):
    """Images in memory. images (N, H, W) uint8, classes (N,)."""

    def __init__(
        self, images: np.ndarray, classes: np.ndarray, mode: str, transform: Callable[[Image.Image], Any]
    ) -> None:
        self.images = [Image.fromarray(image).convert(mode) for image in images]
        self.classes = classes.tolist()
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.classes[index]

    def __len__(self) -> int:
        return len(self.classes)


def _digits(mode: str, config: Config) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    size = (config.img_size, config.img_size)
    images = np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in images])
    train, val = train_test_split(
        np.arange(len(images)), test_size=DIGITS_VALIDATION, stratify=digits.target, random_state=0
    )
    return Data(
        ArrayDataset(images[train], digits.target[train], mode, train_transform(config)),
        ArrayDataset(images[val], digits.target[val], mode, eval_transform(config)),
        tuple(map(str, digits.target_names)),
    )
