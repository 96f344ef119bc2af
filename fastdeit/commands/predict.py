"""`fastdeit predict`: a checkpoint's most probable classes for images."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdeit.commands.eval import add_image_limit, given, weights_file
from fastdeit.train.extras import check_extras

BATCH = 64  # images at once, of an optimized model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--checkpoint", metavar="PATH", help="weights (.safetensors), or a run folder for its last weights"
    )
    weights.add_argument(
        "--optimized", metavar="FILE", help="a frozen model, as fastdeit export or OptimizedModel.save wrote it"
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes to print per image (default: 5)")
    parser.add_argument("--device", help="device to use (default: the run's, or a GPU if there is one)")
    add_image_limit(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    check_extras()
    if args.top < 1:
        raise ValueError(f"--top: expected at least 1, got {args.top}")
    paths = [Path(given("IMAGE", path)) for path in args.images]
    if args.optimized is not None:
        file = Path(given("--optimized", args.optimized))
        predictions = predict_optimized(file, paths, args.top, args.device, args.max_image_megapixels)
    else:
        checkpoint = weights_file(args.checkpoint)
        predictions = predict(checkpoint, paths, args.top, args.device, args.max_image_megapixels)
    if args.json:
        print(json.dumps(predictions, indent=2))
        return 0
    for path, classes in predictions.items():
        print(path.encode(errors="backslashreplace").decode())
        for entry in classes:
            print(f"  {100 * entry['probability']:6.2f} %  {entry['class']}")
    return 0


def predict(
    checkpoint: Path,
    images: list[Path],
    top: int = 5,
    device: str | None = None,
    max_megapixels: float | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """The `top` most probable classes by path, with the probability that the model's prediction gives them.

    Args:
        checkpoint: weights that a run has written.
        images: files, or folders, of which every image is taken.
        top: classes an image, at most those that there are.
        device: other than the run's.
        max_megapixels: in place of the run's max_image_megapixels.

    Raises:
        FileNotFoundError: an image or the checkpoint is not there.
        ValueError: one cannot be read, or the checkpoint is of another model.
    """
    import torch

    from fastdeit.train.checkpoints import load_weights, read_metadata
    from fastdeit.train.config import with_options
    from fastdeit.train.device import autocast, reproducible, select_device
    from fastdeit.train.image_files import read_image
    from fastdeit.train.models import create_student
    from fastdeit.train.transform_errors import TransformFailure
    from fastdeit.train.transforms import eval_transform

    config, classes, _ = read_metadata(checkpoint)
    config = with_options(config, device=device, max_image_megapixels=max_megapixels)
    paths = image_files(images)
    transform, mode = eval_transform(config), "L" if config.in_chans == 1 else "RGB"

    def pixels_of(path: Path) -> torch.Tensor:
        try:
            return transform(read_image(path, mode, config.max_image_megapixels))
        except TransformFailure as failure:
            raise failure.on(str(path)) from failure

    with reproducible(config), torch.inference_mode():
        target = select_device(config)
        model = create_student(config, len(classes), target)
        load_weights(model, checkpoint)
        model.eval()
        found: dict[str, list[dict[str, Any]]] = {}
        for start in range(0, len(paths), config.batch_size):
            batch = paths[start : start + config.batch_size]
            with autocast(config, target):
                logits = model(torch.stack([pixels_of(path) for path in batch]).to(target))
            found |= _likeliest(batch, logits.float().softmax(1), top, classes)
    return found


def predict_optimized(
    file: Path, images: list[Path], top: int = 5, device: str | None = None, max_megapixels: float | None = None
) -> dict[str, list[dict[str, Any]]]:
    """As `predict`, by a file of `OptimizedModel.save`.

    Raises:
        FileNotFoundError: an image or the file is not there.
        ValueError: one cannot be read, or the file does not say how images are prepared.
    """

    from fastdeit.commands.explain import device as device_named
    from fastdeit.commands.image_batches import batch_reader
    from fastdeit.inference.file import load_optimized

    model = load_optimized(file, device_named(device))
    try:
        read = batch_reader(model, max_megapixels)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    classes = model.preprocessing.class_names or tuple(map(str, range(model.architecture.classes)))
    paths = image_files(images)
    found: dict[str, list[dict[str, Any]]] = {}
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        scores = model(read(batch)).float()
        found |= _likeliest(
            batch, scores / 2 if model.options.readout == "softmax_sum" else scores.softmax(1), top, classes
        )
    return found


def _likeliest(paths: list[Path], probabilities: Any, top: int, classes: Sequence[str]) -> dict[str, list[dict]]:
    values, indices = probabilities.topk(min(top, len(classes)))
    return {
        str(path): [{"class": classes[i], "probability": p} for i, p in zip(chosen, each, strict=True)]
        for path, each, chosen in zip(paths, values.tolist(), indices.tolist(), strict=True)
    }


def image_files(paths: list[Path]) -> list[Path]:
    """The files themselves, and in place of a folder its images in natural order."""
    from fastdeit.train.image_folders import images_below, no_image

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = images_below(path)
            if not inside:
                raise FileNotFoundError(no_image(path))
            files += map(Path, inside)
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such image")
    return files
