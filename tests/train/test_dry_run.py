"""The description of a run that is not made."""

import pytest
import torch

from fastdeit.train.distributed import World
from fastdeit.train.dry_run import describe

ONE, TWO = World(), World(0, 2)
HERE = "" if torch.cuda.is_available() else " on one GPU"


@pytest.mark.parametrize(
    "changes, world, expected",
    [
        (dict(), ONE, f"cuda_graphs: off;{HERE} steps can be recorded and replayed"),
        (dict(cuda_graphs=True), ONE, f"cuda_graphs: on;{HERE} steps can be recorded and replayed"),
        (dict(opt="sgd"), ONE, f"cuda_graphs: off;{HERE} steps cannot be recorded: the update of sgd"),
        (dict(cuda_graphs=True, device="cpu"), ONE, "cuda_graphs: on; steps cannot be recorded: graphs are CUDA's"),
        (dict(cuda_graphs=True), TWO, "steps cannot be recorded: 2 processes exchange gradients"),
    ],
)
def test_it_says_whether_steps_can_be_recorded(make_small_config, changes, world, expected):
    assert expected in describe(make_small_config(**changes), world)


def test_a_batch_that_the_processes_cannot_share_is_refused(small_config):
    with pytest.raises(ValueError, match="batch_size: 32 images cannot be shared evenly by 5 processes"):
        describe(small_config, World(0, 5))


def test_what_loads_the_images(make_small_config):
    text = describe(make_small_config(decoder="pillow", aa="augmix-m3", augment_on="device"))
    assert "loader: decoder pillow; resize pillow; flips and augmentation on the CPU: aa: AugMix mixes images" in text
    text = describe(make_small_config(decoder="torchvision", augment_on="device", resize="torch"))
    assert "loader: decoder torchvision; resize torch; flips and augmentation on the device\n" in text
