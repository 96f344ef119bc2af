"""The loader's CPU time by stage, in milliseconds per image."""

import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdeit.train.batched_images import BatchedImages
from fastdeit.train.config import Config
from fastdeit.train.copying import HostBatch, copied, copied_ahead
from fastdeit.train.device import wait_for
from fastdeit.train.encoded_images import EncodedImages
from fastdeit.train.loading import TrainLoader
from fastdeit.train.ring import as_arrays
from fastdeit.train.sampling import Key, seed_sample

STAGES = ("read", "decode", "crop and resize", "augment", "collate", "copy")
IMAGES = 256  # that are timed
_WARM_UP = 8
_AT_ONCE = 16  # that are read, then planned, then decoded, then resized


@dataclass(frozen=True)
class DataStages:
    """CPU milliseconds an image.

    Attributes:
        ms: by stage. `augment` includes drawing the crop and planning and, of what the device augments, the host's share;
            `copy` is the training process's. With `decode_on: device`, `decode` is the host's share of decoding, cropping, resizing
            and copying.
        cores: of this machine that the process may use.
    """

    ms: dict[str, float]
    cores: int

    @property
    def total(self) -> float:
        return sum(self.ms.values())

    def report(self, step: float) -> str:
        """A table, and what a step that takes so many images a second needs."""
        lines = [f"{'stage':<16}{'CPU ms/image':>13}"]
        lines += [f"{name:<16}{value:>13.3f}" for name, value in self.ms.items()]
        lines.append(f"{'all':<16}{self.total:>13.3f}")
        rate = 1000 / self.total
        lines.append(f"loader: {rate:.0f} images/s per core, {rate * self.cores:.0f} on the {self.cores} cores here")
        lines.append(f"the step takes {step:.0f} images/s, which are {step / rate:.1f} cores of loading")
        return "\n".join(lines)


def measure_stages(loader: TrainLoader, config: Config, images: int = IMAGES) -> DataStages | None:
    """Makes images of an epoch in this process and adds up the time of each stage; None of a loader without whole batches.

    Files are read through the operating system's cache if they are in it.
    """
    source = getattr(loader.loader.dataset, "dataset", None)
    if not isinstance(source, BatchedImages | EncodedImages):
        return None
    loader.batches.set_epoch(0)
    size = loader.batches.batch_size
    keys = [key for batch, _ in zip(loader.batches, range(images // size + 1)) for key in batch]  # noqa: B905
    _, _, slot = source.ring.next_slot()
    memory, timed = as_arrays(slot), []
    make = _make_part if isinstance(source, EncodedImages) else _make_image
    for number, key in enumerate(keys[: images + _WARM_UP]):
        clock = _Clock()
        timed.append((clock, make(source, key, memory, number % size, clock)))
    for first in range(0, len(timed), _AT_ONCE):
        for _ in range(4):  # reading, plans, decoding, resizing
            for _, made in timed[first : first + _AT_ONCE]:
                next(made, None)
    clocks = [clock for clock, _ in timed[_WARM_UP:] if clock.stopped]
    count = len(clocks)
    if not count:
        return None
    spent = {name: sum(clock.spent.get(name, 0.0) for clock in clocks) for name in STAGES}
    batch = HostBatch(slot.tensors())
    if loader.decoding is not None:
        ticket = source[keys[:size]]
        batch = HostBatch((), decoded=functools.partial(loader.decoded, source.ring.read(ticket), ticket))
    copy = (copied_ahead if loader.device.type == "cuda" else copied)(iter([batch] * 2), loader.device)
    started = time.process_time()
    batches = list(copy)
    wait_for(loader.device)
    copied_at = time.process_time()
    for tensors in batches:
        loader.finish(*tensors)
    wait_for(loader.device)
    share = count / (len(batches) * size)
    spent["copy" if loader.decoding is None else "decode"] += (copied_at - started) * share
    spent["augment"] += (time.process_time() - copied_at) * share
    cores = len(os.sched_getaffinity(0))
    return DataStages({name: 1000 * seconds / count for name, seconds in spent.items()}, cores)


class _Clock:
    """Seconds that an image has taken, by stage.

    Attributes:
        stopped: whether the image is done.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.stopped = False
        self.start()

    def start(self) -> None:
        self.since = time.process_time()

    def lap(self, stage: str) -> None:
        """What has passed since `start` or the last lap was stage's."""
        now = time.process_time()
        self.spent[stage] = self.spent.get(stage, 0.0) + now - self.since
        self.since = now


def _make_image(source: Any, key: Key, memory: tuple, place: int, clock: _Clock) -> Iterator[None]:
    """Makes an image of `BatchedImages`; pauses where a run takes the same step with other images. Ends early where it cannot be
    read, which a run would name."""
    out, plans, flips, classes, _ = memory
    pipeline, images = source.pipeline, source.images
    clock.start()
    try:
        file, label = images.read(key.index)
        clock.lap("read")
        image_source = images.opened(file)
        clock.lap("decode")
        yield
        clock.start()
        seed_sample(source.seed, key.epoch, key.position)
        if pipeline.plans_first:
            planned = pipeline.planned(image_source, plans[place])
            clock.lap("augment")
            yield
            clock.start()
            part, mode = pipeline.cropped(planned), planned.mode
        else:
            part, mode = pipeline.part(image_source)
    except Exception:
        return
    clock.lap("decode")
    if pipeline.plans_first:
        yield
        clock.start()
        pipeline.resize_into(part, mode, out[place])
        clock.lap("crop and resize")
    else:
        image = pipeline.resized(part, mode)
        clock.lap("crop and resize")
        image, flips[place] = pipeline.augmented(image, plans[place])
        clock.lap("augment")
        pipeline.write(image, out[place])
    classes[place] = label
    clock.lap("collate")
    clock.stopped = True


def _make_part(source: Any, key: Key, memory: tuple, place: int, clock: _Clock) -> Iterator[None]:
    """As `_make_image`, for `EncodedImages`, which do not pause."""
    arena, plans, *_ = memory
    clock.start()
    try:
        file, _ = source.images.read(key.index)
        clock.lap("read")
        seed_sample(source.seed, key.epoch, key.position)
        content, *_ = source.pipeline.encoded(source.images.opened(file), plans[place])
    except Exception:
        return
    clock.lap("augment")
    fitting = content[: arena.size]
    arena.reshape(-1)[: len(fitting)] = np.frombuffer(fitting, np.uint8)
    clock.lap("collate")
    clock.stopped = True
    yield
