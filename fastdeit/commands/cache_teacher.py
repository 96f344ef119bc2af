"""`fastdeit cache-teacher`: runs the teacher once, so that later runs need its labels alone."""

import argparse
from pathlib import Path

from fastdeit.commands.train import add_config_arguments, overrides_of
from fastdeit.train.config import load_config
from fastdeit.train.extras import check_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labels", metavar="FILE", help="where to (default: NAME.labels); an interrupted run goes on")
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes of the training that is to use them (default: 1)"
    )
    add_config_arguments(parser)
    parser.usage = "fastdeit cache-teacher [-h] [--config NAME|FILE] [--labels FILE] [--ranks N] [--FIELD VALUE ...]"


def run(args: argparse.Namespace) -> int:
    check_extras()
    from tqdm import tqdm

    from fastdeit.train.cached_labels import LabelFile, cache_labels, check_header, label_header, teacher_hash
    from fastdeit.train.datasets import load_data
    from fastdeit.train.device import reproducible, select_device
    from fastdeit.train.models import create_teacher

    config = load_config(args.config or "digits", overrides_of(args))
    if args.ranks < 1:
        raise ValueError(f"ranks: expected at least 1, got {args.ranks}")
    if config.distillation_type != "hard":
        raise ValueError(f"distillation_type: labels serve hard distillation, got {config.distillation_type}")
    if config.teacher_epochs:
        raise ValueError("teacher_epochs: expected 0 and the teacher's weights as teacher_checkpoint")
    path = Path(args.labels or f"{config.name}.labels")
    with reproducible(config):
        device, data = select_device(config), load_data(config)
        if path.exists():
            file = LabelFile(path)
            header = label_header(config, data, device, args.ranks, teacher_hash(config, len(data.classes)))
            check_header(file.header, {**header, "epochs": config.epochs}, path)
            print(f"{path} is complete, SHA-256 {file.check_whole()}")
            return 0
        teacher = create_teacher(config, len(data.classes), device)
        positions = len(data.train) // config.batch_size * config.batch_size
        with tqdm(total=positions * config.epochs, desc="teacher", unit="image", disable=None) as bar:
            for done in cache_labels(config, data, teacher, device, path, args.ranks):
                bar.update(done - bar.n)
    print(f"{path}: {config.epochs} epochs of {positions} labels, SHA-256 {LabelFile(path).check_whole()}")
    print(f"fastdeit train ... --teacher-cache {path}")
    return 0
