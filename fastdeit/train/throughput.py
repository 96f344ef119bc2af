"""Images a second without a data loader, by the method of the DeiT paper's Table 5: largest batch that fits, mean of 30 runs."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastdeit.train.config import Config
from fastdeit.train.device import reproducible, select_device
from fastdeit.train.distributed import SINGLE
from fastdeit.train.models import create_student, quickened, untrained_teacher

RUNS, WARM_UP = 30, 5
LIMIT = 4096  # images; more do not run faster


@dataclass(frozen=True)
class Throughput:
    """batch_size images a run; images_per_second over the mean time of `runs` runs; deviation of the runs' time, a share of it."""

    batch_size: int
    images_per_second: float
    deviation: float
    runs: int
    peak_bytes: int | None  # of device memory, None on a CPU

    def __str__(self) -> str:
        memory = f", peak memory {self.peak_bytes / 2**30:.2f} GiB" if self.peak_bytes is not None else ""
        return (
            f"{self.images_per_second:,.1f} images/s: batches of {self.batch_size}, mean of {self.runs} runs, "
            f"deviation {100 * self.deviation:.1f}%{memory}"
        )


def measure(
    step: Callable[[int], object],
    device: torch.device,
    batch_size: int | None = None,
    runs: int = RUNS,
    limit: int = LIMIT,
) -> Throughput:
    """Times `step(batch_size)`, which runs a batch of synthetic images through a model or a training step.

    Args:
        step: raises torch.OutOfMemoryError for a batch that does not fit.
        device: where it computes.
        batch_size: by default the largest that fits, up to limit.
        runs: timed, after WARM_UP that are not.

    Raises:
        ValueError: runs is below 1.
        torch.OutOfMemoryError: not even one image fits, or not the given batch.
    """
    if runs < 1:
        raise ValueError(f"runs: expected at least 1, got {runs}")
    if batch_size is None:
        batch_size = largest_batch(step, device, limit)
    for _ in range(WARM_UP):
        step(batch_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [_seconds(step, batch_size, device) for _ in range(runs)]
    mean = statistics.mean(seconds)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Throughput(batch_size, batch_size / mean, statistics.pstdev(seconds) / mean, runs, peak)


def largest_batch(step: Callable[[int], object], device: torch.device, limit: int = LIMIT) -> int:
    """The largest batch that fits: doubled while it does, then narrowed down to an eighth.

    Raises:
        torch.OutOfMemoryError: a single image does not fit.
    """
    fits, size = 0, 1
    while size <= limit and _fits(step, size, device):
        fits, size = size, 2 * size
    if not fits:
        raise torch.OutOfMemoryError("not even one image fits into the memory of the device")
    grain = max(1, fits // 8)
    low, high = fits // grain, min(size, limit + 1) // grain  # in grains: the first fits, the second does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(step, middle * grain, device) else (low, middle)
    return low * grain


def _fits(step: Callable[[int], object], size: int, device: torch.device) -> bool:
    try:
        step(size)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return True
    except torch.OutOfMemoryError:
        pass
    gc.collect()  # the traceback held the tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return False


def _seconds(step: Callable[[int], object], batch_size: int, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        step(batch_size)
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step(batch_size)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def training_throughput(config: Config, batch_size: int | None = None, runs: int = RUNS) -> Throughput:
    """Images per second of the whole training step (augmentation on the device, teacher, student, update, moving average).

    No data is needed: the images are synthetic, and there is no loader. The teacher has its initial weights, which cost the same.

    Args:
        config: of the run, which says all but the data.
        batch_size: by default the largest that fits on a GPU, and config's on a CPU.
        runs: timed.

    Raises:
        ValueError: runs or batch_size is below 1, the batch does not fit the recipe, or config takes cached labels.
    """
    from fastdeit.train.engine import Trainer, share_of_batch

    if config.teacher_cache is not None:
        raise ValueError(
            "teacher_cache: labels belong to images, and these are synthetic; leave the cache out to time the step"
        )
    device = select_device(config)
    classes = config.num_classes or (10 if config.data == "digits" else 1000)
    if batch_size is None and device.type == "cpu":
        batch_size = config.batch_size
    if batch_size is not None:
        share_of_batch(config.replace(batch_size=batch_size), SINGLE)
    unit = config.grad_accum_steps * (2 if config.mixes else 1)  # what a batch must be a multiple of
    if config.drop_path_mode == "skip":  # a sample must be left of each part
        unit *= math.ceil(1 / (1 - config.drop_path))
    config = config.replace(
        batch_size=unit, workers=0, repeated_aug=1, img_size_schedule=None, aa_schedule=None
    )  # of the last phase
    with reproducible(config):
        teacher = None
        if config.distillation_type != "none":
            teacher = quickened(untrained_teacher(config, classes, device), device)
        trainer = Trainer(config, create_student(config, classes, device), teacher, range(unit), classes)
        trainer.model.train()
        batches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def step(size: int) -> None:
            size = -(-size // unit) * unit
            if size not in batches:
                batches.clear()
                trainer.whole_step.forget()  # a recorded step is of one size
                shape = (size, config.in_chans, config.img_size, config.img_size)
                pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
                batches[size] = pixels, torch.randint(0, classes, (size,), device=device)
            trainer.step = 0
            trainer._train_step(0, *(t.clone() for t in batches[size]))

        return measure(step, device, batch_size, runs)
