"""`fastdeit predict`: what a checkpoint sees in images."""

import argparse
import json
from pathlib import Path
from typing import Any

from fastdeit.commands.eval import add_image_limit, given, weights_file
from fastdeit.train.extras import check_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="weights (.safetensors), or a run folder for its last weights",
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
    predictions = predict(weights_file(args.checkpoint), paths, args.top, args.device, args.max_image_megapixels)
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
    """By path the `top` likeliest classes, with the probability that the model's own prediction gives them.

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
        found = {}
        for start in range(0, len(paths), config.batch_size):
            batch = paths[start : start + config.batch_size]
            with autocast(config, target):
                logits = model(torch.stack([pixels_of(path) for path in batch]).to(target))
            probabilities, indices = logits.float().softmax(1).topk(min(top, len(classes)))
            for path, values, chosen in zip(batch, probabilities.tolist(), indices.tolist(), strict=True):
                found[str(path)] = [
                    {"class": classes[i], "probability": p} for i, p in zip(chosen, values, strict=True)
                ]
    return found


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
