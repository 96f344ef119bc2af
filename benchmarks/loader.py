"""The loader beside timm's: images per CPU second of the whole process tree, in paired turns, on JPEG files of photographs.

`python -m fastdeit.benchmarks.loader` prints a table. CPU time rather than elapsed time is compared, since what a GPU needs of a
machine is cores. Each turn takes a DataLoader of every candidate through the same number of batches; ratios are those of a turn.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import timm.data
import torch

from fastdeit.benchmarks.photographs import fitted
from fastdeit.train.config import Config, load_config
from fastdeit.train.datasets import load_data
from fastdeit.train.decoders import is_installed
from fastdeit.train.loading import TrainLoader
from fastdeit.train.sampling import EpochBatches
from fastdeit.train.transforms import policy_operations, posterize

BATCH, WORKERS = 64, 2
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
    """By name, a function that yields the number of images of each batch of an epoch."""

    def ours(**changes) -> Callable[[int], Iterator[int]]:
        config = _config(root, **changes)
        train = load_data(config).train
        batches = EpochBatches(len(train), BATCH, config.seed)
        loader = TrainLoader(train, batches, config, torch.device("cpu"))
        loader.finish = lambda images, plans, flips, classes: (images, classes)  # the device's work, not the loader's

        def epoch(number: int) -> Iterator[int]:
            batches.set_epoch(number)
            return (len(classes) for _, classes in loader)

        return epoch

    found = {"timm": _timms(root), "fastdeit, everything on the CPU": ours(augment_on="cpu")}
    for decoder in ("pillow", "torchvision", "simplejpeg", "nvimgcodec"):
        if is_installed(decoder):
            found[f"fastdeit, {decoder}, exact"] = ours(augment_on="device", decoder=decoder)
            found[f"fastdeit, {decoder}, resize torch"] = ours(augment_on="device", decoder=decoder, resize="torch")
    return found


def measure(root: Path, turns: int, warm_up: int = 1) -> list[Figure]:
    """Takes all candidates through an epoch in each turn, in another order each time."""
    runs = candidates(root)
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


def _config(root: Path, **changes) -> Config:
    return load_config("deit_base", dict(data=str(root), workers=WORKERS, batch_size=BATCH, repeated_aug=1, **changes))


def _timms(root: Path) -> Callable[[int], Iterator[int]]:
    """timm's create_loader for the same recipe; its prefetcher is a GPU's."""
    config = _config(root)
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(root / "train")),
        input_size=(3, config.img_size, config.img_size),
        batch_size=BATCH,
        is_training=True,
        use_prefetcher=False,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        auto_augment=config.aa,
        interpolation=config.interpolation,
        num_workers=WORKERS,
        persistent_workers=True,
        pin_memory=False,
    )
    transform = loader.dataset.transform
    transform.transforms = [*_before_tensor(transform), timm.data.transforms.ToNumpy()]
    for operation in policy_operations([("aa", step) for step in transform.transforms]):
        if operation.aug_fn is timm.data.auto_augment.posterize:
            operation.aug_fn = posterize  # Pillow 13 refuses what timm's policy asks for
    loader.collate_fn = timm.data.loader.fast_collate  # uint8, as with the prefetcher
    return lambda number: (len(classes) for _, classes in loader)


def _before_tensor(transform) -> list:
    return [
        t
        for t in transform.transforms
        if type(t).__name__ not in ("MaybeToTensor", "ToTensor", "Normalize", "RandomErasing")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="epochs of each candidate (default: 5)")
    parser.add_argument("--copies", type=int, default=64, metavar="N", help="files of each photograph (default: 64)")
    parser.add_argument("--size", choices=SIZES, default="500x375", help="of the files (default: 500x375)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), SIZES[arguments.size], arguments.copies)
        started = time.monotonic()
        print(f"{'':<40}{'images/CPU s':>14}{'of timm':>9}")
        for figure in measure(Path(folder), arguments.turns):
            print(f"{figure.name:<40}{figure.images_per_cpu_second:>14.1f}{figure.ratio:>9.2f}")
        print(f"{arguments.size}, {WORKERS} workers, {arguments.turns} turns, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
