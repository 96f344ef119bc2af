"""What the device does to a batch: the same as timm does, from the step's seed alone."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastdeit.train.augmentation import BatchAugmentation
from fastdeit.train.config import Config
from fastdeit.train.datasets import train_transform
from fastdeit.train.engine import create_criterion
from fastdeit.train.sampling import seed_sample, seed_step

CPU = torch.device("cpu")
PLAIN = Config(img_size=16, mixup=0.0, cutmix=0.0, smoothing=0.0, reprob=0.0, distillation_type="none")


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator), torch.arange(8) % 5


def augmented(config, step=0, epoch=0, rank=0):
    seed_step(config.seed, step, rank)
    return BatchAugmentation(config, 5, CPU)(*batch(), epoch)


def test_images_are_normalised_as_timm_does_on_the_host():
    images, targets = augmented(PLAIN)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PLAIN.mean, PLAIN.std))
    torch.testing.assert_close(images, (batch()[0] / 255 - mean) / std)
    assert torch.equal(targets, batch()[1])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_a_batch_depends_on_seed_step_and_rank_alone(mode):
    config = PLAIN.replace(mixup=0.8, cutmix=1.0, reprob=0.5, mixup_mode=mode)
    first = augmented(config)
    torch.rand(3), np.random.rand(3), random.random()
    assert all(torch.equal(a, b) for a, b in zip(first, augmented(config), strict=True))
    for other in (augmented(config, step=1), augmented(config, rank=1), augmented(config.replace(seed=1))):
        assert not torch.equal(first[0], other[0])


def test_erasing_replaces_regions_and_leaves_the_rest():
    plain, erased = augmented(PLAIN)[0], augmented(PLAIN.replace(reprob=1.0, remode="const"))[0]
    changed = (plain != erased).any(1)
    share = changed.float().mean((1, 2))
    assert (share > 0).all() and (share < 0.5).all()
    assert (erased.movedim(1, -1)[changed] == 0).all()


def test_mixing_ends_at_its_epoch():
    config = PLAIN.replace(mixup=0.8, smoothing=0.1, mixup_off_epoch=3)
    mixed, soft = augmented(config, epoch=2)
    plain, targets = augmented(config, epoch=3)
    assert not torch.equal(mixed, plain) and torch.equal(plain, augmented(PLAIN)[0])
    assert soft.shape == targets.shape == (8, 5)
    assert torch.equal(targets.argmax(1), batch()[1]) and targets.max().item() == pytest.approx(0.92)


def test_binary_targets_are_one_for_every_class_in_the_mixture():
    """DeiT III: each class that a mixed image contains."""
    config = PLAIN.replace(mixup=0.8, bce_loss=True, bce_target_thresh=0.0)
    _, targets = augmented(config)
    classes = batch()[1]
    expected = (torch.nn.functional.one_hot(classes, 5) + torch.nn.functional.one_hot(classes.flip(0), 5)) > 0
    assert torch.equal(targets, expected.float())
    logits = torch.randn(8, 5)
    loss = create_criterion(config, None)(None, logits, targets)
    torch.testing.assert_close(loss, torch.nn.functional.binary_cross_entropy_with_logits(logits, targets))


def test_binary_cross_entropy_without_mixing_has_targets_of_every_class():
    _, targets = augmented(PLAIN.replace(bce_loss=True, smoothing=0.1))
    assert targets.shape == (8, 5) and targets.sum(1).tolist() == pytest.approx([1.0] * 8)


def picture():
    y, x = np.mgrid[:40, :60]
    return Image.fromarray(np.stack([4 * x, 6 * y, (x * y) % 256], -1).astype(np.uint8))


def test_three_augment_is_one_of_grey_solarized_and_blurred():
    config = PLAIN.replace(three_augment=True, aa=None, scale=[1.0, 1.0], ratio=[1.5, 1.5], hflip=0.0, img_size=40)
    transform, seen = train_transform(config), set()
    plain = picture().resize((40, 40), Image.Resampling.BICUBIC)
    solarized = torch.from_numpy(np.array(ImageOps.solarize(plain))).movedim(-1, 0)
    for position in range(24):
        seed_sample(0, 0, position)
        image = transform(picture())
        grey = bool((image[0] == image[1]).all() and (image[1] == image[2]).all())
        seen.add("grey" if grey else "solarized" if (image == solarized).float().mean() > 0.8 else "blurred")
    assert seen == {"grey", "solarized", "blurred"}


def test_a_simple_random_crop_keeps_the_scale_and_moves_at_most_four_pixels():
    config = PLAIN.replace(simple_random_crop=True, aa=None, hflip=0.0, img_size=40)
    transform = train_transform(config)
    whole = torch.from_numpy(np.array(picture())).movedim(-1, 0)
    padded = torch.nn.functional.pad(whole.float(), (4, 4, 4, 4), mode="reflect")
    windows = padded.unfold(1, 40, 1).unfold(2, 40, 1)
    crops = []
    for position in range(6):
        seed_sample(0, 0, position)
        crop = transform(picture()).float()
        places = (windows == crop[:, None, None]).all(-1).all(-1).all(0).nonzero()
        assert len(places) == 1
        crops.append(tuple(places[0].tolist()))
    assert len(set(crops)) > 1 and all(0 <= top <= 8 for top, _ in crops)
