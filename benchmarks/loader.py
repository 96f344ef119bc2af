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

from fastdeit.benchmarks.baselines.loader_baselines import BATCH, WORKERS, baselines, recipe, timm_loader
from fastdeit.benchmarks.photographs import fitted
from fastdeit.train.datasets import load_data
from fastdeit.train.decoders import is_installed
from fastdeit.train.extras import check_extras
from fastdeit.train.loading import TrainLoader
from fastdeit.train.sampling import EpochBatches

FULL_SIZE = "500x375"
SIZES = {FULL_SIZE: (500, 375), "256 short side": (341, 256)}


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


def candidates(root: Path, originals: Path | None = None) -> dict[str, Callable[[int], Iterator[int]]]:
    """By name, a function that yields the number of images of each batch of an epoch; timm's first.

    Args:
        originals: the same images at full size, which timm's loader reads as well.
    """

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
    if originals is not None:
        found[f"timm on {FULL_SIZE}"] = timm_loader(originals)
    found["fastdeit, everything on the CPU"] = ours(augment_on="cpu")
    for decoder in ("pillow", "torchvision", "simplejpeg", "nvimgcodec"):
        if is_installed(decoder):
            found[f"fastdeit, {decoder}, exact"] = ours(augment_on="device", decoder=decoder)
            found[f"fastdeit, {decoder}, resize torch"] = ours(augment_on="device", decoder=decoder, resize="torch")
    return found


def measure(
    root: Path, turns: int, warm_up: int = 1, only: Sequence[str] = ("",), originals: Path | None = None
) -> list[Figure]:
    """Takes timm and the candidates whose names have one of `only` through an epoch in each turn, in another order each time."""
    found = candidates(root, originals)
    runs = {name: run for name, run in found.items() if name.startswith("timm") or any(part in name for part in only)}
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
        try:
            children = (task / "children").read_text().split()
        except FileNotFoundError:  # a thread that has ended
            continue
        for child in children:
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
        root, originals = Path(folder) / "images", None
        write_photographs(root, SIZES[arguments.size], arguments.copies)
        if arguments.size != FULL_SIZE:
            originals = Path(folder) / "originals"
            write_photographs(originals, SIZES[FULL_SIZE], arguments.copies)
        started = time.monotonic()
        print(f"{'':<40}{'images/CPU s':>14}{'of timm':>9}")
        for figure in measure(root, arguments.turns, only=arguments.only or ("",), originals=originals):
            print(f"{figure.name:<40}{figure.images_per_cpu_second:>14.1f}{figure.ratio:>9.2f}")
        print(f"{arguments.size}, {WORKERS} workers, {arguments.turns} turns, {time.monotonic() - started:.0f} s")
    return 0
