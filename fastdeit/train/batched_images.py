"""Whole batches made in a worker, straight into a slot of the ring."""

from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from fastdeit.train.image_pipeline import ImagePipeline, PlannedImage
from fastdeit.train.image_sources import EncodedJpeg
from fastdeit.train.ring import Ring, Ticket, as_arrays
from fastdeit.train.sampling import Key, keyed

HELD_BYTES = 2**24  # of files that wait to be decoded, and of images that wait to be resized


class _Waiting(NamedTuple):
    """An image that is planned, and still to be decoded and resized."""

    key: Key
    place: int  # in the batch
    planned: PlannedImage


class BatchedImages(Dataset):
    """Batches of a map-style data set by their lists of keys; an image depends on its `Key` and the seed alone.

    Where plans can be drawn first, they are drawn for many images in a row; these are decoded next, and resized last. Taking turns
    costs more time, since each evicts the others' code from the processor's caches.

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
        waiting: list[_Waiting] = []
        held = 0
        for place, key in enumerate(keys):
            if not self.pipeline.plans_first:
                unreadable += self.made(key, place, memory)
                continue
            one, messages = self._planned(key, place, memory)
            unreadable += messages
            if _is_left_to_decode(one.planned):
                waiting.append(one)
                held += len(one.planned.source.data)
            if held > HELD_BYTES:
                unreadable += self._decoded(waiting, memory)
                waiting, held = [], 0
        unreadable += self._decoded(waiting, memory)
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

    def _planned(self, key: Key, place: int, memory: tuple[np.ndarray, ...]) -> tuple["_Waiting", list[str]]:
        """Draws what is random about an image. What is not a common JPEG, or is decoded already, is made at once."""
        images, plans, flips, classes, _ = memory

        def make(index: int) -> tuple[PlannedImage, int]:
            with self.images.naming_errors(index):
                source, label = self.images.source_of(index)
                planned = self.pipeline.planned(source, plans[place])
                if not _is_left_to_decode(planned):
                    self.pipeline.finish(planned, images[place])
                return planned, label

        (planned, label), messages = keyed(make, key, self.seed, len(self.images), self.max_bad)
        flips[place], classes[place] = planned.flips, label
        return _Waiting(key, place, planned), messages

    def _decoded(self, waiting: list["_Waiting"], memory: tuple[np.ndarray, ...]) -> list[str]:
        """Decodes and resizes planned images; what is unreadable."""
        unreadable: list[str] = []
        crops: list[tuple[_Waiting, Any]] = []
        held = 0
        for one in waiting:
            try:
                crops.append((one, self.pipeline.cropped(one.planned)))
            except Exception:  # from the beginning, which names what fails, or takes another image
                unreadable += self.made(one.key, one.place, memory)
            held += 3 * one.planned.source.width * one.planned.source.height  # a crop may be a view of the whole image
            if held > HELD_BYTES:
                unreadable += self._resized(crops, memory)
                crops, held = [], 0
        return unreadable + self._resized(crops, memory)

    def _resized(self, crops: list[tuple["_Waiting", Any]], memory: tuple[np.ndarray, ...]) -> list[str]:
        """Resizes decoded crops; what is unreadable."""
        unreadable: list[str] = []
        for (key, place, planned), crop in crops:
            try:
                self.pipeline.resize_into(crop, planned.mode, memory[0][place])
            except Exception:
                unreadable += self.made(key, place, memory)
        return unreadable

    def __len__(self) -> int:
        return len(self.images)


def _is_left_to_decode(planned: PlannedImage) -> bool:
    return planned.image is None and isinstance(planned.source, EncodedJpeg)
