"""Digits and image folders, and the folders that are refused."""

import shutil

import pytest
import torch

from fastdeit.train.config import load_config
from fastdeit.train.datasets import check_image_folder, load_data


def test_digits_are_split_once_and_by_class():
    data = load_data(load_config("digits", dict(seed=1)))
    again = load_data(load_config("digits", dict(seed=2)))
    assert (len(data.train), len(data.val), len(data.classes)) == (1437, 360, 10)
    assert data.val.classes == again.val.classes
    counts = torch.bincount(torch.tensor(data.val.classes))
    assert counts.min() >= 34 and counts.max() <= 38


def test_no_digit_is_in_both_splits():
    data = load_data(load_config())
    train = {image.tobytes() for image in data.train.images}
    assert not train & {image.tobytes() for image in data.val.images}


@pytest.mark.parametrize("channels, mean", [(1, [0.3]), (3, [0.3, 0.3, 0.3])])
def test_images_have_the_size_and_channels_of_the_model(channels, mean):
    config = load_config("digits", dict(in_chans=channels, img_size=24, mean=mean, std=mean))
    data = load_data(config)
    for dataset, dtype in ((data.train, torch.uint8), (data.val, torch.float32)):
        image, digit = dataset[0]
        assert image.shape == (channels, 24, 24) and image.dtype == dtype and 0 <= digit < 10


def test_a_folder_gives_its_images_and_classes(small_config):
    data = load_data(small_config)
    assert data.classes == ("digit-0", "digit-1", "digit-2")
    assert (len(data.train), len(data.val)) == (96, 24)
    assert data.train[40][0].shape == (1, 16, 16) and data.train[40][1] == 1


@pytest.fixture
def folder(image_folder, tmp_path):
    return shutil.copytree(image_folder, tmp_path / "images")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data: .*nowhere is neither `digits` nor a folder"):
        check_image_folder(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no folder train/"):
        check_image_folder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train is empty"):
        check_image_folder(tmp_path)


def test_a_folder_without_validation_is_refused(folder):
    shutil.rmtree(folder / "val")
    with pytest.raises(ValueError, match="has no folder val/"):
        check_image_folder(folder)


def test_a_class_missing_from_validation_is_named(folder):
    shutil.rmtree(folder / "val" / "digit-1")
    with pytest.raises(ValueError, match=r"val lacks digit-1, which .*train has"):
        check_image_folder(folder)


def test_a_class_missing_from_training_is_named(folder):
    shutil.rmtree(folder / "train" / "digit-2")
    with pytest.raises(ValueError, match=r"train lacks digit-2, which .*val has"):
        check_image_folder(folder)


def test_a_class_without_images_is_named(folder):
    for image in (folder / "train" / "digit-0").iterdir():
        image.rename(image.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"train/digit-0 has no image"):
        check_image_folder(folder)
