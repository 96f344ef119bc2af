"""Whole batches made in a worker, straight into a slot of the ring."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from fastdeit.train.image_pipeline import ImagePipeline
from fastdeit.train.ring import Ring, Ticket, as_arrays
from fastdeit.train.sampling import Key, keyed


class BatchedImages(Dataset):
    """Batches of a map-style data set by their lists of keys; an image depends on its `Key` and the seed alone.

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
        out, plans, flips, classes, _ = as_arrays(batch)
        unreadable: list[str] = []
        for place, key in enumerate(keys):
            (flips[place], classes[place]), messages = self.made(key, out[place], plans[place])
            unreadable += messages
        return Ticket(slot, number, unreadable)

    def made(self, key: Key, out: np.ndarray, rows: np.ndarray) -> tuple[tuple[int, int], list[str]]:
        """Makes an image as `ImagePipeline` does; its flips and class, and the unreadable images that it stands in for."""

        def make(index: int) -> tuple[int, int]:
            with self.images.naming_errors(index):
                source, label = self.images.source_of(index)
                return self.pipeline(source, out, rows), label

        return keyed(make, key, self.seed, len(self.images), self.max_bad)

    def __len__(self) -> int:
        return len(self.images)
