"""Rates of the loader and of training, in images per second: `fastdeit train --measure-data`."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdeit.train.cached_labels import CachedTeacher
from fastdeit.train.config import Config
from fastdeit.train.data_stages import DataStages, measure_stages
from fastdeit.train.datasets import Data, load_data
from fastdeit.train.device import reproducible, select_device, wait_for
from fastdeit.train.engine import Trainer
from fastdeit.train.loading import Batch
from fastdeit.train.models import create_student, create_teacher, quickened
from fastdeit.train.run import teacher_config

WARM_UP = (
    5  # batches before the clock starts: workers start, memory is allocated, kernels are compiled, a step is recorded
)


@dataclass(frozen=True)
class DataRates:
    """Rates of each part alone, in images per second."""

    loader: float  # from files to the device
    step: float  # training on a batch that is there already, with the teacher
    device: str
    workers: int
    stages: DataStages | None = None  # None where workers do not make whole batches

    @property
    def bottleneck(self) -> str:
        return "loader" if self.loader < self.step else "device"

    def __str__(self) -> str:
        lines = [
            f"loader         {self.loader:10.1f} images/s with {self.workers} workers",
            f"training step  {self.step:10.1f} images/s on {self.device}",
        ]
        if self.bottleneck == "loader":
            waits = 1 - self.loader / self.step
            lines.append(f"The loader is the bottleneck: {self.device} would wait {100 * waits:.0f} % of the time.")
        else:
            lines.append(f"{self.device} is the bottleneck: the loader is {self.loader / self.step:.2f} times as fast.")
        if self.device == "cpu":
            lines.append("On a CPU both take the same cores, so that together they are slower than either.")
        if self.stages is not None:
            lines += ["", self.stages.report(self.step)]
        return "\n".join(lines)


def measure_data(config: Config, seconds: float = 20.0) -> DataRates:
    """Times the loader alone and the training step alone, each for about so many seconds. Trains a throw-away model."""
    with reproducible(config):
        device, data = select_device(config), load_data(config)
        model = create_student(config, len(data.classes), device)
        trainer = Trainer(config, model, _teacher(config, data, device), data.train, len(data.classes))
        stages = measure_stages(trainer.loader, config)
        loader, batch = _loader_rate(trainer, seconds)
        step = _step_rate(trainer, batch, seconds)
        return DataRates(loader, step, device.type, config.workers, stages)


def _teacher(config: Config, data: Data, device: torch.device) -> nn.Module | None:
    if config.distillation_type == "none":
        return None
    if config.teacher_cache is not None:
        return CachedTeacher(config, data, device)
    if config.teacher_epochs:
        own = create_student(teacher_config(config), len(data.classes), device)
        return own.eval().requires_grad_(False)
    return quickened(create_teacher(config, len(data.classes), device, data.classes), device)


def _loader_rate(trainer: Trainer, seconds: float) -> tuple[float, Batch]:
    """Images a second that reach the device, and one of their batches. Epochs follow one another as long as it takes."""
    images, started, seen = 0, None, 0
    for epoch in range(10**6):
        trainer.batches.set_epoch(epoch)
        for batch in trainer.loader:
            seen += 1
            if started is None:
                started = time.monotonic() if seen >= WARM_UP else None
                continue
            images += len(batch[1])
            wait_for(trainer.device)
            if time.monotonic() - started > seconds:
                return images / (time.monotonic() - started), batch
    raise AssertionError("time has passed")


class _Repeated:
    """A loader that yields one batch again and again."""

    def __init__(self, batch: Batch, times: int) -> None:
        self.batch = batch
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.times):
            yield tuple(t.clone() for t in self.batch)  # augmentation may work in place


class _Silent:
    def update(self, n: int = 1) -> Any:
        pass


def _step_rate(trainer: Trainer, batch: Batch, seconds: float) -> float:
    def timed(steps: int) -> float:
        trainer.step = 0
        trainer.loader = _Repeated(batch, min(steps, trainer.schedule.updates_per_epoch))
        wait_for(trainer.device)
        started = time.monotonic()
        trainer.train_epoch(0, _Silent())
        wait_for(trainer.device)
        return (time.monotonic() - started) / len(trainer.loader)

    once = timed(WARM_UP)
    return len(batch[1]) / timed(max(1, round(seconds / once)))
