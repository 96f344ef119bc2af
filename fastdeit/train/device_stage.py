"""The part of image preprocessing that runs on the device: flips, augmentation and normalisation, in passes over the batch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fastdeit.ops import augment
from fastdeit.train.config import Config
from fastdeit.train.datasets import Images
from fastdeit.train.decoders import with_decoder
from fastdeit.train.image_pipeline import split_flips
from fastdeit.train.plans import Planner, why_not_planned
from fastdeit.train.transform_errors import NamedTransforms


class DeviceStage:
    """Makes of a batch as workers leave it (images, classes) as `TrainLoader` gives them.

    Args:
        config: of the run.
        planner: of the plans; None where workers have done everything.
        device: of the batches.
    """

    def __init__(self, config: Config, planner: Planner | None, device: torch.device) -> None:
        self.planned = planner is not None
        self.fill = planner.fill if planner is not None else (0, 0, 0)
        self.levels = normalised_levels(config, device) if device.type == "cuda" else None

    def __call__(self, images: Tensor, plans: Tensor, flips: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), normalised float32 on a GPU and uint8 on a CPU, and classes.

        Args:
            images: (B, H, W, C) uint8.
            plans, flips: as `fastdeit.ops.augment` has them.
        """
        images = images.permute(0, 3, 1, 2)
        if self.planned or self.levels is not None:
            return augment(images, plans, flips=flips, levels=self.levels, fill=self.fill), classes
        # Convolutions choose their algorithm by strides. Those of one channel fit two layouts: always (B, C, H, W)'s, as above.
        return images.contiguous().flatten(1).view(images.shape), classes


def normalised_levels(config: Config, device: torch.device) -> Tensor:
    """(C, 256) float32: each level as `BatchAugmentation` normalises it, to the bit."""
    mean, std = (torch.tensor(v, device=device).view(-1, 1) * 255 for v in (config.mean, config.std))
    return torch.arange(256, device=device).float().expand(len(mean), 256).sub(mean).div_(std)


def why_not_batched(dataset: Any) -> str | None:
    """None where workers make whole batches of the data set, else why they make single images."""
    if isinstance(dataset, IterableDataset):
        return "a stream gives its images one by one"
    if not hasattr(dataset, "source_of") or not isinstance(getattr(dataset, "transform", None), NamedTransforms):
        return "the data set decodes and transforms its images itself"
    return None


def why_augmented_on_cpu(config: Config, dataset: Any, device: torch.device) -> str | None:
    """None where flips and auto-augmentation run on the device, else why workers do them."""
    if config.augment_on == "cpu":
        return "augment_on is cpu"
    if config.augment_on == "auto" and device.type != "cuda":
        return f"the device is the {device.type.upper()} itself"
    reason = why_not_batched(dataset)
    return reason if reason is not None else why_not_planned(split_flips(dataset.transform)[1])


def check_decoded_on_device(config: Config, dataset: Any, device: torch.device) -> None:
    """Raises ValueError where config wants the device to decode what it cannot decode."""
    if config.decode_on != "device":
        return
    reason = why_not_batched(dataset)
    if reason is None and not isinstance(dataset, Images):
        reason = "they are in memory, decoded"
    if reason is None:
        reason = why_augmented_on_cpu(config, dataset, device)
    if reason is not None:
        raise ValueError(f"decode_on: the images cannot be decoded on the device: {reason}; set decode_on to cpu")


def describe_loader(config: Config, dataset: Any, device: torch.device) -> str:
    """What makes the training images, and where, in a line; reasons where something is not done as it could be.

    Raises:
        ValueError: as `check_decoded_on_device`.
    """
    check_decoded_on_device(config, dataset, device)
    reason = why_augmented_on_cpu(config, dataset, device)
    parts = [
        f"decoder {with_decoder(config).decoder}" if config.data != "digits" else "images in memory",
        f"resize {config.resize}" + (", both on the device" if config.decode_on == "device" else ""),
        "flips and augmentation on the device" if reason is None else f"flips and augmentation on the CPU: {reason}",
    ]
    single = why_not_batched(dataset)
    if single is not None:
        parts.append(f"image by image: {single}")
    return f"loader: {'; '.join(parts)}"
