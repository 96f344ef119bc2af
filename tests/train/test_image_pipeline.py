"""Training images are timm's, bit for bit, whatever decodes, augments and batches them: on photographs, by their keys."""

import io
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastdeit import ops
from fastdeit.benchmarks.photographs import fitted
from fastdeit.train.config import load_config
from fastdeit.train.decoders import create_decoder, is_installed
from fastdeit.train.device_stage import why_augmented_on_cpu
from fastdeit.train.image_pipeline import ImagePipeline, split_flips
from fastdeit.train.image_sources import DecodedImage, image_source
from fastdeit.train.plans import Planner, why_not_planned
from fastdeit.train.sampling import seed_sample
from fastdeit.train.transforms import train_transform

SIZE = 48
POLICIES = {
    "the recipe": dict(aa="rand-m9-mstd0.5-inc1"),
    "every operation, hard": dict(aa="rand-m10-n3-p1-inc1"),
    "beyond timm's range": dict(aa="rand-m40-n2-p1-mmax40-inc1"),  # rotations by right angles, posterizing to nothing
    "not increasing": dict(aa="rand-m9-n2-mstd101"),
    "weighted": dict(aa="rand-m9-n3-p1-tweights"),
    "3-augment's choices": dict(aa="rand-m7-n3-p1-t3aw-inc1"),  # with blurs
    "random interpolation": dict(aa="rand-m9-p1-inc1", interpolation="random"),
    "bilinear": dict(aa="rand-m9-p1-inc1", interpolation="bilinear"),
    "nearest": dict(aa="rand-m9-n3-p1-inc1", interpolation="nearest"),  # resampling that a plan has not
    "original": dict(aa="original-mstd0.5"),
    "originalr": dict(aa="originalr"),
    "v0": dict(aa="v0"),
    "v0r": dict(aa="v0r-mstd1"),
    "three_augment": dict(aa=None, three_augment=True, color_jitter=0.3),
    "colours": dict(aa=None, color_jitter=0.4, grayscale_prob=0.3, gaussian_blur_prob=0.3),
    "some colours": dict(aa=None, color_jitter=0.4, color_jitter_prob=0.5),
    "flips alone": dict(aa=None, vflip=0.5),
    "crops alone": dict(aa=None, hflip=0.0),
    "simple_random_crop": dict(aa="rand-m9-mstd0.5-inc1", simple_random_crop=True, vflip=0.5),
}


def config_of(**changes):
    return load_config("deit_base", dict(img_size=SIZE, **changes))


@pytest.fixture(scope="module")
def files():
    """JPEG files of the photographs."""
    written = []
    for image in fitted(160, 120):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        written.append(file.getvalue())
    return written


def timms(config, files, keys):
    """What timm's transforms make of the files, decoded by Pillow."""
    mode = "L" if config.in_chans == 1 else "RGB"
    transform, images = train_transform(config), []
    for key in keys:
        image = image_source(files[key % len(files)], mode, None).image()
        seed_sample(3, 1, key)
        images.append(transform(image))
    return torch.stack(images), [torch.rand(1), np.random.rand()]


def ours(config, files, keys, *, planned, decoder=None):
    mode = "L" if config.in_chans == 1 else "RGB"
    pipeline = ImagePipeline(train_transform(config), (SIZE, SIZE), mode, config.resize, planned)
    images = np.zeros((len(keys), SIZE, SIZE, pipeline.channels), np.uint8)
    rows = np.full((len(keys), pipeline.layers, 8), np.nan)  # of the batch before
    flips = np.zeros(len(keys), np.uint8)
    for place, key in enumerate(keys):
        source = image_source(files[key % len(files)], mode, decoder)
        seed_sample(3, 1, key)
        flips[place] = pipeline(source, images[place], rows[place])
    left = [torch.rand(1), np.random.rand()]
    given = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(rows)
    if not planned:
        assert not flips.any()
        return given[0].contiguous(), left
    return ops.augment(*given, flips=torch.from_numpy(flips), fill=pipeline.planner.fill), left


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("policy", POLICIES)
def test_planned_augmentation_is_timms(policy, in_chans, files):
    grey = dict(in_chans=1, mean=[0.4], std=[0.2]) if in_chans == 1 else {}
    config = config_of(**POLICIES[policy], **grey)
    keys = range(36 if in_chans == 3 else 12)
    expected, left = timms(config, files, keys)
    got, left_of_ours = ours(config, files, keys, planned=True)
    assert torch.equal(got, expected)
    assert left == left_of_ours  # the random numbers that come next


def test_the_recipe_at_full_size(files):
    config = load_config("deit_base", dict(img_size=224))
    mine, transform = ImagePipeline(train_transform(config), (224, 224), "RGB", "pillow", True), train_transform(config)
    for key in range(8):
        image, rows = np.zeros((1, 224, 224, 3), np.uint8), np.zeros((1, mine.layers, 8))
        source = image_source(files[key % len(files)], "RGB", None)
        seed_sample(0, 0, key)
        flips = mine(source, image[0], rows[0])
        planned = torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(rows)
        seed_sample(0, 0, key)
        expected = transform(source.image())
        flips = torch.tensor([flips], dtype=torch.uint8)
        assert torch.equal(ops.augment(*planned, flips=flips, fill=mine.planner.fill)[0], expected)


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("decoder", ["nvimgcodec", "simplejpeg", "torchvision"])
def test_a_decoder_makes_no_difference(decoder, planned, files):
    if not is_installed(decoder):
        pytest.skip(f"{decoder} is not installed")
    for changes in ({}, dict(in_chans=1, mean=[0.4], std=[0.2]), dict(simple_random_crop=True)):
        config = config_of(aa="rand-m9-mstd0.5-inc1", **changes)
        got, _ = ours(config, files, range(12), planned=planned, decoder=create_decoder(decoder))
        assert torch.equal(got, timms(config, files, range(12))[0])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_torchs_resize_is_near_pillows(interpolation, files):
    config = config_of(aa=None, interpolation=interpolation)
    exact, left = ours(config, files, range(24), planned=True)
    near, left_of_near = ours(config.replace(resize="torch"), files, range(24), planned=True)
    difference = (exact.int() - near.int()).abs().float()
    assert 0 < difference.mean() < 0.1 and difference.max() <= 8 and left == left_of_near


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_torchs_resize_is_interpolate_in_the_batchs_memory(interpolation, mode):
    """Enlarged, reduced, of one row, of one column, and a view of a larger image."""
    config = config_of(aa=None, interpolation=interpolation, resize="torch")
    pipeline = ImagePipeline(train_transform(config), (SIZE, SIZE), mode, "torch", True)
    generator = np.random.default_rng(0)
    for height, width in ((7, 9), (96, 131), (1, 60), (60, 1), (SIZE, SIZE)):
        whole = generator.integers(0, 256, (height + 2, width + 3, pipeline.channels), np.uint8)
        for crop in (np.ascontiguousarray(whole[1:-1, 1:-2]), whole[1:-1, 1:-2]):
            batch = np.zeros((2, SIZE, SIZE, pipeline.channels), np.uint8)
            pipeline.resize_into(crop, pipeline.crop.interpolation, batch[1])
            tensor = torch.from_numpy(crop.copy())[None].permute(0, 3, 1, 2)
            expected = F.interpolate(tensor, (SIZE, SIZE), mode=interpolation, antialias=True)
            assert torch.equal(torch.from_numpy(batch[1]).permute(2, 0, 1), expected[0]) and not batch[0].any()


@pytest.mark.parametrize(
    "size", [(341, 256), (900, 40), (30, 700), (1, 1)]
)  # of some no crop of the recipe's shapes is found
def test_crops_are_timms(size):
    config = config_of(aa=None, scale=[0.6, 1.0])
    transform = train_transform(config)
    pipeline = ImagePipeline(transform, (SIZE, SIZE), "RGB", "torch", True)
    crop, image = transform.steps[0][1], Image.new("RGB", size)
    for key in range(20):
        seed_sample(3, 1, key)
        (left, top, width, height), _ = pipeline.drawn_crop(DecodedImage(image))
        after = random.random()
        seed_sample(3, 1, key)
        assert crop.get_params(image, crop.scale, crop.ratio) == (top, left, height, width)
        assert random.random() == after


def test_torchs_resize_of_grey_images(files):
    config = config_of(aa=None, in_chans=1, mean=[0.4], std=[0.2])
    exact, near = (ours(config.replace(resize=r), files, range(12), planned=False)[0] for r in ("pillow", "torch"))
    assert (exact.int() - near.int()).abs().float().mean() < 0.2


def test_a_pipeline_goes_to_another_process(files):
    """As it does where workers are spawned; timm's policy in it was changed to take recorders."""
    config = config_of(aa="rand-m9-n3-p1-inc1")
    pipeline = ImagePipeline(train_transform(config), (SIZE, SIZE), "RGB", "pillow", True)
    found = []
    for one in (pipeline, pickle.loads(pickle.dumps(pipeline))):
        out, rows = np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros((pipeline.layers, 8))
        seed_sample(3, 1, 5)
        found.append((one(image_source(files[0], "RGB", None), out, rows), out, rows))
    assert found[0][0] == found[1][0] and all(
        np.array_equal(a, b) for a, b in zip(*(f[1:] for f in found), strict=True)
    )


def test_a_policy_still_works_on_images(files):
    """One transform may serve plans and images."""
    config = config_of(aa="rand-m9-n3-p1-inc1")
    transform = train_transform(config)
    Planner(split_flips(transform)[1])
    image = image_source(files[0], "RGB", None).image()
    seed_sample(0, 0, 0)
    got = transform(image)
    seed_sample(0, 0, 0)
    assert torch.equal(got, train_transform(config)(image))


def test_what_cannot_be_planned_is_named():
    augmix = train_transform(config_of(aa="augmix-m5"))
    reason = why_not_planned(split_flips(augmix)[1])
    assert reason == "aa: AugMix mixes images that were augmented in several ways, which no plan can say"
    with pytest.raises(ValueError, match="AugMix"):
        ImagePipeline(augmix, (SIZE, SIZE), "RGB", "pillow", True)
    from torchvision import transforms

    assert "hue" in why_not_planned([("color_jitter", transforms.ColorJitter(0.1, 0.1, 0.1, 0.1))])
    assert "Pad has no operation" in why_not_planned([("aa", transforms.Pad(1))])


def test_where_augmentation_runs(make_small_config):
    from fastdeit.train.datasets import load_data

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    config = make_small_config(aa="rand-m9-mstd0.5-inc1")
    train = load_data(config).train
    assert why_augmented_on_cpu(config, train, cpu) == "the device is the CPU itself"
    assert why_augmented_on_cpu(config.replace(augment_on="device"), train, cpu) is None
    assert why_augmented_on_cpu(config, train, gpu) is None
    assert why_augmented_on_cpu(config.replace(augment_on="cpu"), train, gpu) == "augment_on is cpu"
    assert why_augmented_on_cpu(config, [(0, 0)], gpu) == "the data set decodes and transforms its images itself"
    mixed = make_small_config(aa="augmix-m3", augment_on="device")
    assert why_augmented_on_cpu(mixed, load_data(mixed).train, cpu).startswith("aa: AugMix")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(resize="torch", simple_random_crop=True), "resize: torch is for random crops"),
        (dict(resize="torch", interpolation="nearest"), "resize: torch is for bilinear and bicubic"),
        (dict(resize="opencv"), "resize: expected one of pillow, torch, got 'opencv'"),
        (
            dict(decoder="turbo"),
            "decoder: expected one of auto, nvimgcodec, simplejpeg, torchvision, pillow, got 'turbo'",
        ),
        (dict(augment_on="gpu"), "augment_on: expected one of auto, cpu, device, got 'gpu'"),
    ],
)
def test_options_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)
