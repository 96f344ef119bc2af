"""Batches that a worker leaves encoded, for the device to decode, crop and resize: `decode_on: device`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from torchvision.transforms.functional import InterpolationMode

from fastdeit.train.batched_images import BatchedImages
from fastdeit.train.decoders import Box
from fastdeit.train.image_pipeline import ImagePipeline
from fastdeit.train.image_sources import image_source
from fastdeit.train.ring import Batch, Ring, Ticket, as_arrays
from fastdeit.train.sampling import Key, keyed

COLUMNS = 8  # of a `Part` in the ring
INTERPOLATIONS = ("bilinear", "bicubic")
OUTSIDE = -1


class Part(NamedTuple):
    """How an image lies in a batch's memory, and what is to be made of it.

    Attributes:
        start: of its first byte, or OUTSIDE where the ticket has it.
        length: in bytes.
        encoded: whether this is a JPEG file, or the image as it is to be, (height, width, channels) uint8.
        box: of the file's image, to be resized.
        interpolation: number in INTERPOLATIONS.
    """

    start: int
    length: int
    encoded: bool
    box: Box
    interpolation: int

    def row(self) -> tuple[int, ...]:
        return self.start, self.length, self.encoded, *self.box, self.interpolation

    @classmethod
    def of_row(cls, row: Sequence[int]) -> "Part":
        start, length, encoded, *box, interpolation = row
        return cls(start, length, bool(encoded), Box(*box), interpolation)


class EncodedImages(Dataset):
    """Batches of common JPEG files as they are, each with its random crop and its plan, by their lists of keys.

    The files lie in the memory that images of the final size would take. What does not fit goes with the ticket. Other files, and
    images that a plan cannot describe, are made whole here: which images are depends on the file and the key alone.

    Args:
        images: `Images` of datasets.py.
        pipeline: plans an image.
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
        arena, plans, flips, classes, parts = as_arrays(batch)
        arena, used = arena.reshape(-1), 0
        unreadable: list[str] = []
        beyond: dict[int, bytes] = {}
        for place, key in enumerate(keys):

            def make(index: int, place: int = place) -> tuple[bytes, bool, Box, InterpolationMode, int, int]:
                with self.images.naming_errors(index):
                    source, label = self.images.source_of(index)
                    return *self.pipeline.encoded(source, plans[place]), label

            made, messages = keyed(make, key, self.seed, len(self.images), self.max_bad)
            content, encoded, box, mode, flips[place], classes[place] = made
            unreadable += messages
            start, end = used, used + len(content)
            if end <= len(arena):
                arena[start:end] = np.frombuffer(content, np.uint8)
                used = end
            else:
                start, beyond[place] = OUTSIDE, content
            parts[place] = Part(start, len(content), encoded, box, INTERPOLATIONS.index(mode.value)).row()
        return Ticket(slot, number, unreadable, beyond, keys)

    def made_here(self, key: Key, batch: Batch, place: int, out: np.ndarray) -> list[str]:
        """Makes an image that the device's decoder refuses, by Pillow, with its plan, flips and class in batch; what is unreadable.

        Raises as a worker that makes images.
        """
        whole = BatchedImages(_ByPillow(self.images), self.pipeline, self.ring, self.seed, self.max_bad)
        return whole.made(key, place, as_arrays(batch), out)

    def __len__(self) -> int:
        return len(self.images)


class _ByPillow:
    """`Images` of which Pillow decodes all."""

    def __init__(self, images: Any) -> None:
        self.images = images
        self.naming_errors = images.naming_errors

    def source_of(self, index: int) -> tuple[Any, int]:
        file, label = self.images.read(index)
        return image_source(file, self.images.mode, None, self.images.max_megapixels), label

    def __len__(self) -> int:
        return len(self.images)
