"""What happens to an image depends on its key alone."""

import numpy as np
import pytest
import torch

from fastdeit.train import sampling
from fastdeit.train.config import Config
from fastdeit.train.loading import TrainLoader
from fastdeit.train.sampling import EpochBatches, Key


class Noise(torch.utils.data.Dataset):
    """An image that is all random, from each of the three generators that transforms draw from."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        import random

        return torch.tensor([index, torch.rand(()).item(), random.random(), np.random.rand()]), 0


def epoch_of(workers, epoch=3, first_batch=0, seed=5):
    batches = EpochBatches(20, 4, seed)
    batches.set_epoch(epoch, first_batch)
    loader = TrainLoader(Noise(), batches, Config(workers=workers), torch.device("cpu"))
    return torch.cat([images for images, _ in loader])


def test_any_number_of_workers_gives_the_same_images():
    torch.manual_seed(1)
    here = epoch_of(workers=0)
    torch.manual_seed(2)
    assert torch.equal(here, epoch_of(workers=2))


def test_an_epoch_can_start_in_its_middle():
    assert torch.equal(epoch_of(0)[8:], epoch_of(0, first_batch=2))


@pytest.mark.parametrize("change", [dict(epoch=4), dict(seed=6)])
def test_another_epoch_or_seed_gives_other_images(change):
    here, there = epoch_of(0), epoch_of(0, **change)
    assert not torch.equal(here[:, 0], there[:, 0])
    assert not set(here[:, 1].tolist()) & set(there[:, 1].tolist())


def test_an_epoch_has_every_image_once_in_another_order():
    indices = epoch_of(0)[:, 0].long().tolist()
    assert sorted(indices) == list(range(20)) != indices


def test_the_same_image_twice_in_an_epoch_is_augmented_differently():
    keyed = sampling.KeyedDataset(Noise(), seed=0)
    assert not torch.equal(keyed[Key(0, 1, 7)][0], keyed[Key(0, 2, 7)][0])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_batches_of_one_process(world_size):
    """With the global batch kept: each key belongs to one rank, whose batch is a slice of the whole one."""
    whole = list(EpochBatches(50, 6, seed=1))
    parts = [list(EpochBatches(50, 6 // world_size, 1, rank, world_size)) for rank in range(world_size)]
    assert len(whole) == len(parts[0]) == 8
    for batch, *slices in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(key for keys in slices for key in keys)


def test_seeds_differ_by_purpose_and_every_part_of_the_key():
    seeds = [
        sampling.derive_seed(p, *k) for p in ("step", "sample") for k in ((0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 12))
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_step_draws_the_same_whatever_was_drawn_before():
    draws = []
    for before in (0, 3):
        torch.rand(before), np.random.rand(before)
        sampling.seed_step(seed=1, step=2)
        draws.append((torch.rand(()).item(), np.random.rand()))
    assert draws[0] == draws[1]


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size: 32 is more than the 20 training images"):
        TrainLoader(Noise(), EpochBatches(20, 32, 0), Config(), torch.device("cpu"))
