"""Data that depends on nothing but keys, so that a run resumes exactly and any number of workers gives the same images.

(seed, epoch) orders an epoch, (seed, epoch, position) seeds what happens to one image, and (seed, step, rank) what happens inside a
step: mixup, dropout, drop path.
"""

import random
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


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


class KeyedDataset(Dataset):
    """A map-style data set of (image, class) whose random transforms depend on `Key` and seed alone."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        seed = derive_seed("sample", self.seed, key.epoch, key.position)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # 1.5 us; torch.manual_seed visits every device
        return self.dataset[key.index]

    def __len__(self) -> int:
        return len(self.dataset)


class EpochBatches(Sampler[list[Key]]):
    """The batches of one epoch for one rank, each of batch_size keys; what does not fill a batch on every rank is left out.

    `set_epoch` chooses the epoch and the batch to start at.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.length = length
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
        stride = self.batch_size * self.world_size
        for batch in range(self.first_batch, self.length // stride):
            start = batch * stride + self.rank
            positions = range(start, (batch + 1) * stride, self.world_size)
            yield [Key(self.epoch, position, order[position]) for position in positions]

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size) - self.first_batch


def train_loader(dataset: Dataset, batches: EpochBatches, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """Batches of (images (B, C, H, W), classes (B,)) in the order of `batches`, whose epoch is set before each pass.

    Raises:
        ValueError: fewer images than one batch.
    """
    if not len(batches):
        raise ValueError(f"batch_size: {batches.batch_size} is more than the {batches.length} training images")
    keyed = KeyedDataset(dataset, batches.seed)
    return DataLoader(keyed, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory)


def eval_loader(dataset: Dataset, batch_size: int, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """Every image once, in order."""
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers, pin_memory=pin_memory)
