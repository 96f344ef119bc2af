"""`fastdeit eval`: top-1 of a checkpoint, from the checkpoint alone."""

import argparse
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
    parser.add_argument("--device", help="by default the run's, or a GPU if there is one")


def run(args: argparse.Namespace) -> int:
    check_extras()
    from fastdeit.train.reporting import results_table

    path = Path(args.checkpoint)
    path = path / "last.safetensors" if path.is_dir() else path
    results = evaluate_checkpoint(path, args.data, args.device)
    print(results_table({path.name: results}))
    return 0


def evaluate_checkpoint(path: Path, data: str | None = None, device: str | None = None) -> dict[str, float]:
    """Loss and top-1 by readout on the validation images, as `engine.evaluate` gives them.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is not there, truncated, not of fastdeit or of another model, or the data has
            other classes.
    """
    from fastdeit.train.checkpoints import load_weights, read_metadata
    from fastdeit.train.datasets import load_data
    from fastdeit.train.device import reproducible, select_device
    from fastdeit.train.engine import evaluate
    from fastdeit.train.models import create_student
    from fastdeit.train.sampling import eval_loader

    config, classes, _ = read_metadata(path)
    config = config.replace(data=data or config.data, device=device or config.device)
    with reproducible(config):
        target = select_device(config)
        images = load_data(config)
        if images.classes != classes:
            raise ValueError(f"data: {config.data} has the classes {images.classes}, {path} was trained on {classes}")
        model = create_student(config, len(classes), target)
        load_weights(model, path)
        loader = eval_loader(images.val, config.batch_size, config.workers, pin_memory=target.type == "cuda")
        return evaluate(model, loader, config, target)
