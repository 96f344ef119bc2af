"""The loader beside timm's: images per CPU second of the whole process tree, in paired turns, on JPEG files of photographs.

`fastdeit bench loader` prints a table. CPU time rather than elapsed time is compared, since what a GPU needs of a
machine is cores. Each turn takes a DataLoader of every candidate through the same number of batches; ratios are those of a turn.
A batch counts when it is in the training process's memory: what follows, the copy to the device above all, is nobody's.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdeit.benchmarks.baselines.loader_baselines import BATCH, WORKERS, baselines, recipe
from fastdeit.benchmarks.photographs import fitted
from fastdeit.train.datasets import load_data
from fastdeit.train.decoders import is_installed
from fastdeit.train.extras import check_extras
from fastdeit.train.loading import TrainLoader
from fastdeit.train.sampling import EpochBatches

SIZES = {"500x375": (500, 375), "256 short side": (341, 256)}


@dataclass(frozen=True)
class Figure:
    """Of a candidate: images per CPU second, and the ratio to timm's in the same turn; medians over the turns."""

    name: str
    images_per_cpu_second: float
    ratio: float


def write_photographs(root: Path, size: tuple[int, int], copies: int) -> None:
    """root/train and root/val with the photographs as JPEG files of quality 90, two classes of them."""
    for split in ("train", "val"):
        for number, image in enumerate(fitted(*size)):
            folder = root / split / f"class-{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(copies if split == "train" else 1):
                # Mirrored and shifted, so that no two files are alike.
                shifted = image.transform(image.size, 0, (1, 0, copy % 7, 0, 1, copy % 5))
                shifted.save(folder / f"{number}-{copy}.jpg", quality=90)


def candidates(root: Path) -> dict[str, Callable[[int], Iterator[int]]]:
    """By name, a function that yields the number of images of each batch of an epoch; timm's first."""

    def ours(**changes) -> Callable[[int], Iterator[int]]:
        config = recipe(root, **changes)
        train = load_data(config).train
        batches = EpochBatches(len(train), BATCH, config.seed)
        loader = TrainLoader(train, batches, config, torch.device("cpu"))

        def epoch(number: int) -> Iterator[int]:
            batches.set_epoch(number)
            return (len(batch.tensors[0]) for batch in loader.host_batches())

        return epoch

    found = baselines(root)
    found["fastdeit, everything on the CPU"] = ours(augment_on="cpu")
    for decoder in ("pillow", "torchvision", "simplejpeg", "nvimgcodec"):
        if is_installed(decoder):
            found[f"fastdeit, {decoder}, exact"] = ours(augment_on="device", decoder=decoder)
            found[f"fastdeit, {decoder}, resize torch"] = ours(augment_on="device", decoder=decoder, resize="torch")
    return found


def measure(root: Path, turns: int, warm_up: int = 1, only: Sequence[str] = ("",)) -> list[Figure]:
    """Takes timm and the candidates whose names have one of `only` through an epoch in each turn, in another order each time."""
    found = candidates(root)
    runs = {name: run for name, run in found.items() if name == "timm" or any(part in name for part in only)}
    names = list(runs)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            before = _cpu_seconds()
            images = sum(runs[name](turn))
            spent = _cpu_seconds() - before
            if turn >= warm_up:
                rates[name].append(images / spent)
    return [
        Figure(
            name,
            statistics.median(rates[name]),
            statistics.median(rate / base for rate, base in zip(rates[name], rates["timm"], strict=True)),
        )
        for name in names
    ]


def _cpu_seconds() -> float:
    """Of this process and its workers, those alive included."""
    ticks = os.sysconf("SC_CLK_TCK")
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="epochs of each candidate (default: 5)")
    parser.add_argument("--copies", type=int, default=128, metavar="N", help="files of each photograph (default: 128)")
    parser.add_argument("--size", choices=SIZES, default="500x375", help="of the files (default: 500x375)")
    parser.add_argument("--only", action="append", metavar="TEXT", help="candidates with this in their name, and timm")


def run(arguments: argparse.Namespace) -> int:
    for name in ("turns", "copies"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    check_extras()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), SIZES[arguments.size], arguments.copies)
        started = time.monotonic()
        print(f"{'':<40}{'images/CPU s':>14}{'of timm':>9}")
        for figure in measure(Path(folder), arguments.turns, only=arguments.only or ("",)):
            print(f"{figure.name:<40}{figure.images_per_cpu_second:>14.1f}{figure.ratio:>9.2f}")
        print(f"{arguments.size}, {WORKERS} workers, {arguments.turns} turns, {time.monotonic() - started:.0f} s")
    return 0
