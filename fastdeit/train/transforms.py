"""timm's transforms of an image, as a configuration asks for them."""

from collections.abc import Callable, Iterator
from typing import Any

import timm.data
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torchvision import transforms

from fastdeit.train.config import Config
from fastdeit.train.transform_errors import NamedTransforms

POLICIES = (auto_augment.RandAugment, auto_augment.AutoAugment, auto_augment.AugMixAugment)
OPTIONS = {  # by the transform, the field of the configuration that asks for it
    RandomResizedCropAndInterpolation: "scale",
    transforms.RandomHorizontalFlip: "hflip",
    transforms.RandomVerticalFlip: "vflip",
    **dict.fromkeys(POLICIES, "aa"),
    transforms.ColorJitter: "color_jitter",
    transforms.RandomGrayscale: "grayscale_prob",
    transforms.GaussianBlur: "gaussian_blur_prob",
}


def train_transform(config: Config) -> NamedTransforms:
    """To a uint8 tensor; erasing and normalisation follow on the device. Raises ValueError for an unknown policy."""
    options = dict(
        is_training=True,
        scale=tuple(config.scale),
        ratio=tuple(config.ratio),
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter or None,
        color_jitter_prob=config.color_jitter_prob,
        grayscale_prob=config.grayscale_prob,
        gaussian_blur_prob=config.gaussian_blur_prob,
        auto_augment="3a" if config.three_augment else config.aa,
        interpolation=config.interpolation,
        mean=tuple(config.mean),
        std=tuple(config.std),
        use_prefetcher=True,
    )
    size = (config.in_chans, config.img_size, config.img_size)
    try:
        steps = timm.data.create_transform(size, **options).transforms
    except (AssertionError, ValueError, KeyError) as error:  # of what the policy's text says, by asserting
        raise ValueError(f"aa: timm cannot make {config.aa!r}: {error}") from error
    named = [(_option(step), step) for step in steps]
    if config.three_augment:
        named = [("three_augment" if option == "aa" else option, step) for option, step in named]
    if config.simple_random_crop:
        named[0] = ("simple_random_crop", simple_random_crop(config))
    for operation in policy_operations(named):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return NamedTransforms(named)


def eval_transform(config: Config) -> NamedTransforms:
    """To a normalised float32 tensor."""
    steps = timm.data.create_transform(
        (config.in_chans, config.img_size, config.img_size),
        interpolation="bilinear" if config.interpolation == "random" else config.interpolation,
        mean=tuple(config.mean),
        std=tuple(config.std),
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
    ).transforms
    return NamedTransforms([("crop_pct", step) for step in steps])


def simple_random_crop(config: Config) -> Callable[[Image.Image], Image.Image]:
    """DeiT III, section 3.2: the smaller side to the size of the input, 4 reflected pixels around it, a random square of it."""
    return transforms.Compose(
        [
            transforms.Resize(config.img_size, interpolation=str_to_interp_mode(config.interpolation)),
            transforms.RandomCrop(config.img_size, padding=4, padding_mode="reflect"),
        ]
    )


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's operation, for as few bits as its policies ask for: with none or fewer an image is black, which Pillow computed up to
    version 12 and refuses from 13 on."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def policy_operations(steps: list[tuple[str, Any]]) -> Iterator[auto_augment.AugmentOp]:
    """The operations that auto-augmentation chooses from, of all steps of a `NamedTransforms`."""
    for _, step in steps:
        if isinstance(step, auto_augment.AutoAugment):
            for operations in step.policy:
                yield from operations
        elif isinstance(step, POLICIES):
            yield from step.ops


def _option(step: Any) -> str:
    inner = step.transforms[0] if isinstance(step, transforms.RandomApply) else step
    return OPTIONS.get(type(inner), "img_size")
