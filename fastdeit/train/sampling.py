"""Random data derived from keys alone, so that a run resumes exactly and any number of workers gives the same images.

(seed, epoch) orders an epoch, (seed, epoch, position) seeds what happens to one image, and (seed, step, rank) what happens inside a
step: erasing, mixup, dropout, drop path.
"""

import random
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, Subset

from fastdeit.train.error_passing import ErrorPassingLoader
from fastdeit.train.image_files import UnreadableImageError
from fastdeit.train.transform_errors import TransformError, described

Made = TypeVar("Made")


class Key(NamedTuple):
    """What a training image depends on besides the seed."""

    epoch: int
    position: int  # in the epoch, over all ranks
    index: int  # of the image in the data set


def derive_seed(purpose: str, *key: int) -> int:
    """A 63-bit seed, independent for every purpose and every key."""
    text = ",".join(map(str, key)).encode()
    return int.from_bytes(blake2b(text, digest_size=8, person=purpose.encode()[:16]).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and PyTorch on all devices: transforms draw from the first, timm's mixup from the second."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """To be called before a step's first random number."""
    seed_everything(derive_seed("step", seed, step, rank))


def seed_sample(seed: int, epoch: int, position: int) -> None:
    """To be called before an image's transforms, in the process that runs them."""
    derived = derive_seed("sample", seed, epoch, position)
    random.seed(derived)
    np.random.seed(derived % 2**32)
    torch.default_generator.manual_seed(derived)  # 1.5 us; torch.manual_seed visits every device


class Sample(NamedTuple):
    image: Tensor
    label: int
    unreadable: tuple[str, ...]  # what could not be read in its place


def keyed(make: Callable[[int], Made], key: Key, seed: int, length: int, max_bad: int = 0) -> tuple[Made, list[str]]:
    """Calls make for the key's index, with all random numbers seeded by the key; returns its result and unreadable images' errors.

    An unreadable image is replaced by the next readable one, with the same key.

    Args:
        length: of the data set.
        max_bad: most unreadable images in a row that are replaced.

    Raises:
        UnreadableImageError: more than max_bad images in a row.
        TransformError: make raised anything else.
    """
    unreadable: list[str] = []
    while True:
        seed_sample(seed, key.epoch, key.position)
        index = (key.index + len(unreadable)) % length
        try:
            return make(index), unreadable
        except UnreadableImageError as error:
            unreadable.append(str(error))
            if len(unreadable) > min(max_bad, length - 1):
                raise
        except Exception as error:
            raise TransformError(
                f"{error if isinstance(error, TransformError) else f'data: image {index}: {described(error)}'} "
                f"(seed {seed}, epoch {key.epoch}, position {key.position}, image {index} of {length})"
            ) from error


class KeyedDataset(Dataset):
    """A map-style data set of (image, class) whose random transforms depend on `Key` and seed alone.

    Unreadable images and errors are those of `keyed`.
    """

    def __init__(self, dataset: Dataset, seed: int, max_bad: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.max_bad = max_bad

    def __getitem__(self, key: Key) -> Sample:
        (image, label), unreadable = keyed(self.dataset.__getitem__, key, self.seed, len(self.dataset), self.max_bad)
        return Sample(image, label, tuple(unreadable))

    def __len__(self) -> int:
        return len(self.dataset)


class EpochBatches(Sampler[list[Key]]):
    """The batches of one epoch for one rank, each of batch_size keys; what does not fill a batch on every rank is left out.

    With repeats every image that an epoch takes comes so many times in a row, hence, where there are as many ranks, on different
    ones (repeated augmentation, Hoffer et al. 2020); the epoch keeps its length and takes fewer images.

    `set_epoch` chooses the epoch and the batch to start at.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, repeats: int = 1
    ) -> None:
        self.length = length
        self.repeats = repeats
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.epoch = epoch
        self.first_batch = first_batch

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        for batch in range(self.first_batch, self.first_batch + len(self)):
            yield [Key(self.epoch, p, order[p // self.repeats]) for p in self.positions(batch)]

    def positions(self, batch: int) -> range:
        """The positions in the epoch, over all ranks, of the samples of an epoch's batch on this rank."""
        stride = self.batch_size * self.world_size
        return range(batch * stride + self.rank, (batch + 1) * stride, self.world_size)

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size) - self.first_batch


class StreamShare(IterableDataset):
    """A rank's share of a stream that is read whole: every world_size-th image from rank on, so that each image is read once."""

    def __init__(self, stream: Any, rank: int, world_size: int) -> None:
        self.stream = stream
        self.share = rank, world_size

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return self.stream.share(*self.share)


def eval_loader(
    dataset: Dataset, batch_size: int, workers: int, pin_memory: bool, rank: int = 0, world_size: int = 1
) -> ErrorPassingLoader:
    """Every image once, in order; of several processes each takes every world_size-th, from its rank on."""
    if world_size > 1 and isinstance(dataset, IterableDataset):
        dataset = StreamShare(dataset, rank, world_size)
    elif world_size > 1:
        dataset = Subset(dataset, range(rank, len(dataset), world_size))
    return ErrorPassingLoader(dataset, batch_size=batch_size, num_workers=workers, pin_memory=pin_memory)
