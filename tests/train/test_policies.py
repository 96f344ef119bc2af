"""Every operation of every policy, at the ends of its range; `make test-pillow` runs it on the newest Pillow."""

import random

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from fastdeit.train.config import Config, load_config, shipped_configs
from fastdeit.train.transform_errors import TransformFailure
from fastdeit.train.transforms import policy_operations, posterize, train_transform

SHIPPED = sorted({(c.aa, c.three_augment) for c in map(load_config, shipped_configs())} - {(None, False)}, key=str)
NEIGHBOURS = [
    "v0",
    "v0r",
    "original",
    "originalr",
    "3a",
    "rand-m10-inc1",
    "rand-m1-mstd0.1",
    "rand-m9-mstd0.5-inc1",
    "rand-m15-mmax20-inc1",
    "rand-m9-n3-mstd101",
    "augmix-m9-mstd0.5",
    "augmix-m5-w4-d2",
]
POLICIES = [*SHIPPED, *((policy, False) for policy in NEIGHBOURS if (policy, False) not in SHIPPED)]


def operations(policy, three_augment, channels):
    config = Config(
        aa=policy, three_augment=three_augment, in_chans=channels, mean=[0.4] * channels, std=[0.2] * channels
    )
    return list(policy_operations(train_transform(config.replace(img_size=32)).steps))


def photograph(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy, three_augment", POLICIES, ids=str)
def test_every_operation_runs_at_its_lowest_and_its_highest_magnitude(policy, three_augment, channels, monkeypatch):
    image = photograph(channels)
    found = operations(policy, three_augment, channels)
    assert found
    for operation in found:
        operation.prob, operation.magnitude_std = 1.0, 0
        for magnitude in (0, operation.magnitude_max or 10):
            operation.magnitude = magnitude
            for draw in (0.0, 0.999):  # both signs of those that have one
                monkeypatch.setattr(random, "random", lambda draw=draw: draw)
                result = operation(image)
                assert (result.mode, result.size) == (image.mode, image.size), operation


def test_configurations_ship_policies():
    assert ("rand-m9-mstd0.5-inc1", False) in SHIPPED and (None, True) in SHIPPED


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", range(-4, 9))
def test_posterizing_keeps_the_highest_bits_and_none_gives_black(bits, channels):
    """Pillow's table, as every version up to 12 computed it for any number of bits."""
    image = photograph(channels)
    mask = ~(2 ** (8 - bits) - 1)
    expected = np.array([value & mask for value in range(256)])[np.asarray(image)]
    assert np.array_equal(np.asarray(posterize(image, bits)), expected)


def test_the_recipes_policy_posterizes_to_none_where_the_noise_reaches_ten():
    black = []
    for operation in operations("rand-m9-mstd0.5-inc1", False, 3):
        if operation.name == "PosterizeIncreasing":
            operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0
            black.append(np.asarray(operation(photograph(3))))
    assert len(black) == 1 and not black[0].any()


def test_timm_itself_is_left_as_it_is():
    operations("rand-m9-mstd0.5-inc1", False, 3)
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize is not posterize


@pytest.mark.parametrize(
    "policy, images",
    [
        ("rand-m9-mstd0.5-inc1", 1500),
        ("rand-m10-inc1", 100),
        ("rand-m1-mstd0.1", 100),
        ("v0", 400),
        ("augmix-m9-mstd0.5", 100),
    ],
)
def test_many_images_pass_through_the_whole_transform(policy, images):
    """So many that Pillow's refusal was met: by one image in 650 under the first policy, by more under the others."""
    config = Config(aa=policy, img_size=16)
    transform, image = train_transform(config), photograph(3)
    random.seed(0)
    try:
        shapes = {tuple(transform(image).shape) for _ in range(images)}
    except TransformFailure as failure:
        raise AssertionError(failure.option) from failure.__cause__
    assert shapes == {(3, 16, 16)}
