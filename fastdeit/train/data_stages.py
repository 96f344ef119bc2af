"""Where the loader's time goes: CPU milliseconds of an image in each stage of its making."""

import functools
import os
import time
from dataclasses import dataclass

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


@dataclass(frozen=True)
class DataStages:
    """CPU milliseconds an image.

    Attributes:
        ms: by stage. `decode` includes drawing the crop, `augment` planning it and, of what the device augments, the host's share;
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
    spent = dict.fromkeys(STAGES, 0.0)
    count = 0
    loader.batches.set_epoch(0)
    keys = [key for batch, _ in zip(loader.batches, range(images // loader.batches.batch_size + 1)) for key in batch]  # noqa: B905
    _, _, slot = source.ring.next_slot()
    for number, key in enumerate(keys[: images + _WARM_UP]):
        memory, place = as_arrays(slot), number % loader.batches.batch_size
        if isinstance(source, EncodedImages):
            made = _timed_file(source, key, memory, place)
        else:
            made = _timed_image(source, key, memory, place)
        if number < _WARM_UP or made is None:
            continue
        count += 1
        for name, seconds in made.items():
            spent[name] += seconds
    if not count:
        return None
    batch = HostBatch(slot.tensors())
    if loader.decoding is not None:
        ticket = source[keys[: loader.batches.batch_size]]
        batch = HostBatch((), decoded=functools.partial(loader.decoded, source.ring.read(ticket), ticket))
    copy = (copied_ahead if loader.device.type == "cuda" else copied)(iter([batch] * 2), loader.device)
    started = time.process_time()
    batches = list(copy)
    wait_for(loader.device)
    copied_at = time.process_time()
    for tensors in batches:
        loader.finish(*tensors)
    wait_for(loader.device)
    share = count / (len(batches) * loader.batches.batch_size)
    spent["copy" if loader.decoding is None else "decode"] += (copied_at - started) * share
    spent["augment"] += (time.process_time() - copied_at) * share
    cores = len(os.sched_getaffinity(0))
    return DataStages({name: 1000 * seconds / count for name, seconds in spent.items()}, cores)


def _timed_image(source: BatchedImages, key: Key, slot: tuple, place: int) -> dict[str, float] | None:
    """Seconds of the stages of an image of `BatchedImages` up to its slot; None of one that cannot be read."""
    out, plans, flips, classes, _ = slot
    pipeline, images = source.pipeline, source.images
    seed_sample(source.seed, key.epoch, key.position)
    times = [time.process_time()]
    try:
        file, label = images.read(key.index)
        times.append(time.process_time())
        part, interpolation = pipeline.part(images.opened(file))
    except Exception:  # the run names it
        return None
    times.append(time.process_time())
    image = pipeline.resized(part, interpolation)
    times.append(time.process_time())
    image, flips[place] = pipeline.augmented(image, plans[place])
    times.append(time.process_time())
    pipeline.write(image, out[place])
    classes[place] = label
    times.append(time.process_time())
    return {name: after - before for name, before, after in zip(STAGES, times, times[1:], strict=False)}


def _timed_file(source: EncodedImages, key: Key, slot: tuple, place: int) -> dict[str, float] | None:
    """As `_timed_image`, of an image of `EncodedImages`."""
    arena, plans, *_ = slot
    seed_sample(source.seed, key.epoch, key.position)
    times = [time.process_time()]
    try:
        file, _ = source.images.read(key.index)
        times.append(time.process_time())
        content, *_ = source.pipeline.encoded(source.images.opened(file), plans[place])
    except Exception:  # the run names it
        return None
    times.append(time.process_time())
    fitting = content[: arena.size]
    arena.reshape(-1)[: len(fitting)] = np.frombuffer(fitting, np.uint8)
    times.append(time.process_time())
    names = ("read", "augment", "collate")
    return {name: after - before for name, before, after in zip(names, times, times[1:], strict=False)}
