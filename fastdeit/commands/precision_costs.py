"""What `fastdeit verify MODEL --precision` prints: the cost of a precision of `optimize_for_inference`."""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdeit.commands.image_batches import labelled_images
from fastdeit.inference.architecture import FORMATS
from fastdeit.inference.model import OptimizedModel
from fastdeit.inference.optimizing import optimize_for_inference

BATCH, RANDOM_IMAGES = 32, 64


def run(args: argparse.Namespace, model: nn.Module) -> int:
    """Prints the report on a model, in evaluation mode on its device; returns 0.

    Raises:
        ValueError: the model or the images do not fit, or there are too few images.
    """
    device = next(model.parameters()).device
    plain = optimize_for_inference(model, "bf16")  # which has the transform of images
    batches = _random(plain.architecture) if args.images is None else _of_folder(args.images, plain)
    options = {"exclude": args.exclude} if args.precision in FORMATS else {}
    if args.exclude and not options:
        raise ValueError(f"--exclude: expected nothing for {args.precision}, in which no layer is quantized")
    if args.precision in FORMATS:
        options["calibration"] = [tuple(t.to(device) for t in pair) for pair in batches[::2]]
    found = optimize_for_inference(model, args.precision, **options).report(batches[1::2])
    if args.json:
        layers = [layer._asdict() for layer in found.layers]
        print(json.dumps({**found._asdict(), "layers": layers, "random_images": args.images is None}, indent=2))
        return 0
    print(found)
    if args.images is None:
        print(
            "\nThe images were random: errors of layers are indicative, agreement means nothing. --images FOLDER takes real ones."
        )
    return 0


def _random(architecture) -> list[tuple[Tensor, Tensor]]:
    """Batches of random images, each with another label: calibration needs several, and a model may give all images one class."""
    torch.manual_seed(0)
    images = torch.randn(RANDOM_IMAGES, architecture.in_chans, *architecture.img_size)
    labels = torch.arange(RANDOM_IMAGES)
    return list(zip(images.split(RANDOM_IMAGES // 2), labels.split(RANDOM_IMAGES // 2), strict=True))


def _of_folder(folder: Path, model: OptimizedModel) -> list[tuple[Tensor, Tensor]]:
    """Batches of images with their classes; every second batch is for calibration."""
    batches = labelled_images(folder, model, BATCH)
    if len(batches) < 2:
        images, labels = batches[0]
        if len(images) < 4:
            raise ValueError(
                f"--images: expected at least 4 images, half of them to calibrate with, got {len(images)} in {folder}"
            )
        batches = [(images[half::2], labels[half::2]) for half in (0, 1)]
    return batches
