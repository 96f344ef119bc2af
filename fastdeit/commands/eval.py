"""`fastdeit eval`: top-1 of a checkpoint, from the checkpoint alone; or how many images a second its model takes."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastdeit.train.extras import check_extras

if TYPE_CHECKING:
    from fastdeit.train.throughput import Throughput

CLASSES = 1000  # of a model that no checkpoint gives the classes of: ImageNet's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", metavar="PATH", help="weights (.safetensors), or a run folder for its last weights"
    )
    source.add_argument(
        "--config", metavar="NAME|FILE", help="with --throughput: time the model of this configuration, without weights"
    )
    parser.add_argument("--data", metavar="digits|DIR", help="evaluate these images instead of the run's val/")
    parser.add_argument(
        "--labels",
        metavar="real|FILE",
        help="labels for the images of --data: ReaL's labels, or a JSON list or object (docs/evaluation.md)",
    )
    parser.add_argument("--device", help="device to use (default: the run's, or a GPU if there is one)")
    add_image_limit(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    speed = parser.add_argument_group("throughput, by the method of the DeiT paper's Table 5")
    speed.add_argument("--throughput", action="store_true", help="time the model on synthetic images instead")
    speed.add_argument(
        "--batch-size", type=int, metavar="N", help="images per call (default: the largest batch that fits on a GPU)"
    )
    speed.add_argument("--runs", type=int, metavar="N", help="timed runs (default: 30)")


def run(args: argparse.Namespace) -> int:
    check_extras()
    from fastdeit.train.reporting import results_table

    path = weights_file(args.checkpoint) if args.checkpoint is not None else None
    if args.throughput:
        for option in ("data", "labels", "max_image_megapixels"):
            if getattr(args, option) is not None:
                raise ValueError(f"--{option.replace('_', '-')}: --throughput takes synthetic images")
        found = inference_throughput(path, args.config, args.device, args.batch_size, args.runs)
        print(json.dumps(dataclasses.asdict(found), indent=2) if args.json else found)
        return 0
    if path is None:
        raise ValueError("--config: is for --throughput; a configuration has no weights to evaluate, use --checkpoint")
    for option in ("batch_size", "runs"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')}: is for --throughput")
    results = evaluate_checkpoint(path, args.data, args.device, args.labels, args.max_image_megapixels)
    print(json.dumps(results, indent=2) if args.json else results_table({path.name: results}))
    return 0


def add_image_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-image-megapixels", type=float, metavar="N", help="refuse larger images (default: the run's limit)"
    )


def given(option: str, value: str) -> str:
    """value. Raises ValueError where it is empty, as it is from a variable that is not set."""
    if not value.strip():
        raise ValueError(f"{option}: expected a path, got an empty text; is a variable not set?")
    return value


def weights_file(checkpoint: str) -> Path:
    """A run folder's last weights, or the file itself."""
    path = Path(given("--checkpoint", checkpoint))
    return path / "last.safetensors" if path.is_dir() else path


def inference_throughput(
    checkpoint: Path | None,
    config: str | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    runs: int | None = None,
) -> "Throughput":
    """Images a second through the model of a checkpoint or of a configuration, in its precision, under inference mode.

    On a CPU, where no batch is too large, batch_size is by default the configuration's.

    Raises:
        FileNotFoundError, ValueError: checkpoint or configuration are not there or no good, batch_size or runs is below 1.
    """
    import torch

    from fastdeit.train import throughput
    from fastdeit.train.checkpoints import load_weights, read_metadata
    from fastdeit.train.config import load_config, with_options
    from fastdeit.train.device import autocast, select_device
    from fastdeit.train.models import create_student

    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {batch_size}")
    if checkpoint is not None:
        settings, classes, _ = read_metadata(checkpoint)
    else:
        settings, classes = load_config(config or "digits"), range(CLASSES)
    settings = with_options(settings, device=device)
    target = select_device(settings)
    model = create_student(settings, len(classes), target)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    model.eval()
    if batch_size is None and target.type == "cpu":
        batch_size = settings.batch_size

    @torch.inference_mode()
    def step(size: int) -> None:
        images = torch.zeros(size, settings.in_chans, settings.img_size, settings.img_size, device=target)
        with autocast(settings, target):
            model(images)

    return throughput.measure(step, target, batch_size, throughput.RUNS if runs is None else runs)


def evaluate_checkpoint(
    path: Path,
    data: str | None = None,
    device: str | None = None,
    labels: str | None = None,
    max_megapixels: float | None = None,
) -> dict[str, float]:
    """Top-1 by readout on the validation images, and their loss, as `engine.evaluate` gives them; with labels top-1 alone.

    Args:
        path: weights that a run has written.
        data: other images than the run's.
        device: other than the run's.
        labels: as `LabelMap` takes it.
        max_megapixels: in place of the run's max_image_megapixels.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is not there, truncated, not of fastdeit or of another model, the data has
            other classes, or labels do not fit model and data.
    """
    from fastdeit.train.checkpoints import load_weights, read_metadata
    from fastdeit.train.class_names import class_difference
    from fastdeit.train.config import with_options
    from fastdeit.train.datasets import load_validation
    from fastdeit.train.device import reproducible, select_device
    from fastdeit.train.evaluation import evaluate
    from fastdeit.train.label_maps import LabelMap, evaluate_labelled, labelled_images
    from fastdeit.train.models import create_student
    from fastdeit.train.sampling import eval_loader

    config, classes, _ = read_metadata(path)
    config = with_options(config, data=data, device=device, max_image_megapixels=max_megapixels)
    with reproducible(config):
        target = select_device(config)
        if labels is not None:
            images = labelled_images(config, Path(config.data), LabelMap(labels, classes))
        else:
            images, found = load_validation(config)
            different = class_difference(found, classes)
            if different is not None:
                raise ValueError(f"data: {path} was trained on other classes: beside them {config.data} {different}")
        model = create_student(config, len(classes), target)
        load_weights(model, path)
        loader = eval_loader(images, config.batch_size, config.workers, pin_memory=target.type == "cuda")
        return (evaluate if labels is None else evaluate_labelled)(model, loader, config, target)
