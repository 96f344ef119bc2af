"""`fastdeit cache-teacher`: runs the teacher once, so that later runs read its labels instead."""

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastdeit.commands.train import add_config_arguments, overrides_of
from fastdeit.train.config import Config, load_config
from fastdeit.train.extras import check_extras
from fastdeit.train.signals import Stopped, StopRequest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastdeit.train.datasets import Data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels", metavar="FILE", help="file to write (default: NAME.labels); an interrupted run continues"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="number of processes of the training run that will read them (default: 1)",
    )
    add_config_arguments(parser)
    parser.usage = "fastdeit cache-teacher [-h] [--config NAME|FILE] [--labels FILE] [--ranks N] [--FIELD VALUE ...]"


def run(args: argparse.Namespace) -> int:
    check_extras()
    from fastdeit.train import workers
    from fastdeit.train.cached_labels import LabelFile, check_header, label_header, teacher_hash
    from fastdeit.train.datasets import load_data
    from fastdeit.train.device import reproducible, select_device
    from fastdeit.train.failures import RunFailedError
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
        teacher = create_teacher(config, len(data.classes), device, data.classes)
        positions = len(data.train) // config.batch_size * config.batch_size
        try:
            compute(config, data, teacher, device, path, args.ranks, positions * config.epochs)
        except Stopped as stopped:
            print(f"fastdeit cache-teacher: {stopped}", file=sys.stderr)
            return stopped.exit_code
        except RunFailedError as error:
            print(f"fastdeit cache-teacher: {error}", file=sys.stderr)
            return 1
        finally:
            workers.end_workers()
    print(f"{path}: {config.epochs} epochs of {positions} labels, SHA-256 {LabelFile(path).check_whole()}")
    print(f"fastdeit train ... --teacher-cache {path}")
    return 0


def compute(
    config: Config, data: "Data", teacher: "nn.Module", device: "torch.device", path: Path, ranks: int, total: int
) -> None:
    """Leaves the labels in path, with a progress bar.

    Raises:
        Stopped: a signal asked for it; what there is is kept.
        RunFailedError: an error ended it in the middle, and what there is is kept.
        ValueError, WriteError: it could not begin.
    """
    from tqdm import tqdm

    from fastdeit.train import failures
    from fastdeit.train.cached_labels import cache_labels, partial_file

    partial, done = partial_file(path), 0
    kept = f"The labels so far are in {partial}; the same command goes on"
    with StopRequest().listening() as stop, tqdm(total=total, desc="teacher", unit="image", disable=None) as bar:
        steps = cache_labels(config, data, teacher, device, path, ranks)
        try:
            for done in steps:
                bar.update(done - bar.n)
                if stop.number is not None and done < total:
                    steps.close()
                    raise Stopped(stop.number, f"{done} of {total} labels are there. {kept}")
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT, kept) from None
        except Exception as error:
            if isinstance(error, Stopped) or (not done and isinstance(error, ValueError | OSError)):
                raise
            raise failures.RunFailedError(f"{failures.cause(error)}. {kept if partial.exists() else ''}") from error
