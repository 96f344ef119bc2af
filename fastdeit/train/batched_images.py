"""Whole batches made in a worker, straight into a slot of the ring."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from fastdeit.train.image_pipeline import ImagePipeline, PlannedImage
from fastdeit.train.image_sources import ImageSource
from fastdeit.train.ring import Ring, Ticket, as_arrays
from fastdeit.train.sampling import Key, keyed, seed_sample

HELD_BYTES = 2**25  # of images that wait, as large as they are decoded


class _Waiting:
    """An image between two steps of its making.

    Attributes:
        key, place: the image's, and where it lies in the batch.
        source, label: once it is read.
        planned: once its random numbers are drawn.
        crop: once it is decoded.
    """

    __slots__ = ("crop", "key", "label", "place", "planned", "source")
    source: ImageSource
    label: int
    planned: PlannedImage
    crop: Any

    def __init__(self, key: Key, place: int) -> None:
        self.key, self.place = key, place


class BatchedImages(Dataset):
    """Batches of a map-style data set by their lists of keys; an image depends on its `Key` and the seed alone.

    Where plans can be drawn before an image is decoded, many images are read in a row, then planned, then decoded, then resized.
    Taking turns costs more time, since each of these evicts the others' code from the processor's caches.

    Unreadable images are replaced as `keyed` has it.

    Args:
        images: `Images` or `ArrayDataset` of datasets.py.
        pipeline: makes an image.
        ring: holds the batches; __getitem__ gives their tickets.
        seed: of the run.
        max_bad: most images in a row that may be replaced.
    """

    def __init__(self, images: Any, pipeline: ImagePipeline, ring: Ring, seed: int, max_bad: int) -> None:
        self.images = images
        self.pipeline = pipeline
        self.ring = ring
        self.seed = seed
        self.max_bad = max_bad

    def __getitem__(self, keys: list[Key]) -> Ticket:
        slot, number, batch = self.ring.next_slot()
        memory = as_arrays(batch)
        unreadable: list[str] = []
        if not self.pipeline.plans_first:
            for place, key in enumerate(keys):
                unreadable += self.made(key, place, memory)
            return Ticket(slot, number, unreadable)
        group: list[_Waiting] = []
        held = 0
        for place, key in enumerate(keys):
            one = _Waiting(key, place)
            if self._done(self._read, one, memory, unreadable):
                group.append(one)
                held += 3 * one.source.width * one.source.height  # a crop may be a view of the whole image
            if held > HELD_BYTES or place == len(keys) - 1:
                for step in (self._plan, self._decode, self._resize):
                    group = [one for one in group if self._done(step, one, memory, unreadable)]
                group, held = [], 0
        return Ticket(slot, number, unreadable)

    def made(self, key: Key, place: int, memory: tuple[np.ndarray, ...], out: np.ndarray | None = None) -> list[str]:
        """Makes an image as `ImagePipeline` does, and returns the unreadable images that it stands in for.

        Args:
            memory: of a `ring.Batch`.
            out: for the image, by default its place in memory.
        """
        images, plans, flips, classes, _ = memory

        def make(index: int) -> tuple[int, int]:
            with self.images.naming_errors(index):
                source, label = self.images.source_of(index)
                return self.pipeline(source, images[place] if out is None else out, plans[place]), label

        (flips[place], classes[place]), messages = keyed(make, key, self.seed, len(self.images), self.max_bad)
        return messages

    def _done(
        self,
        step: Callable[[_Waiting, tuple[np.ndarray, ...]], None],
        one: _Waiting,
        memory: tuple[np.ndarray, ...],
        unreadable: list[str],
    ) -> bool:
        """Whether the step succeeds. An image for which it fails is made anew, which names what fails, or takes another image."""
        try:
            step(one, memory)
        except Exception:
            unreadable += self.made(one.key, one.place, memory)
            return False
        return True

    def _read(self, one: _Waiting, memory: tuple[np.ndarray, ...]) -> None:
        one.source, one.label = self.images.source_of(one.key.index)

    def _plan(self, one: _Waiting, memory: tuple[np.ndarray, ...]) -> None:
        _, plans, flips, classes, _ = memory
        seed_sample(self.seed, one.key.epoch, one.key.position)
        one.planned = self.pipeline.planned(one.source, plans[one.place])
        flips[one.place], classes[one.place] = one.planned.flips, one.label

    def _decode(self, one: _Waiting, memory: tuple[np.ndarray, ...]) -> None:
        if one.planned.image is None:
            one.crop = self.pipeline.cropped(one.planned)

    def _resize(self, one: _Waiting, memory: tuple[np.ndarray, ...]) -> None:
        out = memory[0][one.place]
        if one.planned.image is None:
            self.pipeline.resize_into(one.crop, one.planned.mode, out)
        else:
            self.pipeline.write(one.planned.image, out)

    def __len__(self) -> int:
        return len(self.images)
