"""What else makes training images: timm's loader for the same recipe, and torchvision's and DALI's for one like it.

timm draws and computes what fastdeit does. torchvision's transforms v2 and DALI have a random crop, flips and a RandAugment of
their own, of two operations at magnitude 9: their images are others, and their work is about the same.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import timm.data
import torch

from fastdeit.train.config import Config, load_config
from fastdeit.train.transforms import policy_operations, posterize

BATCH, WORKERS = 64, 2

Epoch = Callable[[int], Iterator[int]]  # yields the number of images of each batch


def recipe(root: Path, **changes) -> Config:
    """DeiT-B's on the images of root."""
    return load_config("deit_base", dict(data=str(root), workers=WORKERS, batch_size=BATCH, repeated_aug=1, **changes))


def baselines(root: Path) -> dict[str, Epoch]:
    """By name, timm's first; what is not installed is not there."""
    found = {"timm": timm_loader(root), "torchvision transforms v2": _torchvision(root)}
    if find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None:
        found["DALI on the CPU"] = _dali(root)
    return found


def timm_loader(root: Path) -> Epoch:
    """timm's create_loader for the same recipe; its prefetcher is a GPU's."""
    config = recipe(root)
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(root / "train")),
        input_size=(3, config.img_size, config.img_size),
        batch_size=BATCH,
        is_training=True,
        use_prefetcher=False,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        auto_augment=config.aa,
        interpolation=config.interpolation,
        num_workers=WORKERS,
        persistent_workers=True,
        pin_memory=False,
    )
    transform = loader.dataset.transform
    transform.transforms = [*_before_tensor(transform), timm.data.transforms.ToNumpy()]
    for operation in policy_operations([("aa", step) for step in transform.transforms]):
        if operation.aug_fn is timm.data.auto_augment.posterize:
            operation.aug_fn = posterize  # Pillow 13 refuses what timm's policy asks for
    loader.collate_fn = timm.data.loader.fast_collate  # uint8, as with the prefetcher
    return lambda number: (len(classes) for _, classes in loader)


def _before_tensor(transform) -> list:
    return [
        t
        for t in transform.transforms
        if type(t).__name__ not in ("MaybeToTensor", "ToTensor", "Normalize", "RandomErasing")
    ]


def _torchvision(root: Path) -> Epoch:
    """Tensors throughout, as its documentation advises, in whole batches of uint8."""
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import InterpolationMode, v2

    config = recipe(root)
    bicubic = InterpolationMode.BICUBIC
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(config.img_size, config.scale, config.ratio, interpolation=bicubic, antialias=True),
            v2.RandomHorizontalFlip(config.hflip),
            v2.RandAugment(num_ops=2, magnitude=9, interpolation=InterpolationMode.BILINEAR),  # tensors have no bicubic
        ]
    )
    images = ImageFolder(str(root / "train"), transform, loader=lambda path: decode_image(path, mode=ImageReadMode.RGB))
    loader = torch.utils.data.DataLoader(
        images, BATCH, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True
    )
    return lambda number: (len(classes) for _, classes in loader)


def _dali(root: Path) -> Epoch:
    """A pipeline without a GPU, whose threads decode, crop, resize, flip and augment."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import rand_augment

    config = recipe(root)

    @pipeline_def(batch_size=BATCH, num_threads=WORKERS, device_id=None, enable_conditionals=True)
    def pipeline():
        files, classes = fn.readers.file(file_root=str(root / "train"), random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(
            files, device="cpu", random_area=list(config.scale), random_aspect_ratio=list(config.ratio)
        )
        images = fn.resize(images, size=[config.img_size] * 2, interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.flip(images, horizontal=fn.random.coin_flip(probability=config.hflip))
        return rand_augment.rand_augment(images, n=2, m=9), classes

    made = pipeline()
    made.build()
    batches = made.epoch_size("files") // BATCH

    def epoch(number: int) -> Iterator[int]:
        for _ in range(batches):
            made.run()
            yield BATCH

    return epoch
