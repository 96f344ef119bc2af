"""`fastdeit eval`: top-1 of a checkpoint, from the checkpoint alone."""

import argparse
import json
from pathlib import Path

from fastdeit.train.extras import check_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="weights (.safetensors) of a run, or its folder for the last ones",
    )
    parser.add_argument("--data", metavar="digits|DIR", help="other images than those of the run's val/")
    parser.add_argument(
        "--labels",
        metavar="real|FILE",
        help="which classes count as right for an image of --data: ReaL's labels, or a JSON list or object "
        "(docs/evaluation.md)",
    )
    parser.add_argument("--device", help="by default the run's, or a GPU if there is one")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    check_extras()
    from fastdeit.train.reporting import results_table

    path = weights_file(args.checkpoint)
    results = evaluate_checkpoint(path, args.data, args.device, args.labels)
    print(json.dumps(results, indent=2) if args.json else results_table({path.name: results}))
    return 0


def weights_file(checkpoint: str) -> Path:
    """A run folder's last weights, or the file itself."""
    path = Path(checkpoint)
    return path / "last.safetensors" if path.is_dir() else path


def evaluate_checkpoint(
    path: Path, data: str | None = None, device: str | None = None, labels: str | None = None
) -> dict[str, float]:
    """Top-1 by readout on the validation images, and their loss, as `engine.evaluate` gives them; with labels top-1 alone.

    Args:
        path: weights that a run has written.
        data: other images than the run's.
        device: other than the run's.
        labels: as `LabelMap` takes it.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is not there, truncated, not of fastdeit or of another model, the data has
            other classes, or labels do not fit model and data.
    """
    from fastdeit.train.checkpoints import load_weights, read_metadata
    from fastdeit.train.datasets import load_data
    from fastdeit.train.device import reproducible, select_device
    from fastdeit.train.engine import evaluate
    from fastdeit.train.label_maps import LabelMap, evaluate_labelled, labelled_images
    from fastdeit.train.models import create_student
    from fastdeit.train.sampling import eval_loader

    config, classes, _ = read_metadata(path)
    config = config.replace(data=data or config.data, device=device or config.device)
    with reproducible(config):
        target = select_device(config)
        if labels is not None:
            images = labelled_images(config, Path(config.data), LabelMap(labels, classes))
        else:
            found = load_data(config)
            if found.classes != classes:
                raise ValueError(
                    f"data: {config.data} has the classes {found.classes}, {path} was trained on {classes}"
                )
            images = found.val
        model = create_student(config, len(classes), target)
        load_weights(model, path)
        loader = eval_loader(images, config.batch_size, config.workers, pin_memory=target.type == "cuda")
        return (evaluate if labels is None else evaluate_labelled)(model, loader, config, target)
