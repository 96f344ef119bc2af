"""Digits and image folders, and the folders that are refused."""

import shutil

import pytest
import torch

from fastdeit.train.config import Config, load_config
from fastdeit.train.datasets import load_data
from fastdeit.train.image_folders import read_splits


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


@pytest.mark.parametrize("data, classes", [("digits", 10), (None, 3)])
def test_another_number_of_classes_is_refused(small_config, data, classes):
    config = small_config.replace(data=data or small_config.data)
    assert len(load_data(config.replace(num_classes=classes)).classes) == classes
    with pytest.raises(ValueError, match=rf"num_classes: .* has {classes} classes, got 7"):
        load_data(config.replace(num_classes=7))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data: .*nowhere is neither `digits` nor a folder"):
        read_splits(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no folder train/"):
        read_splits(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train is empty"):
        read_splits(tmp_path)


def test_a_folder_without_validation_is_refused(folder):
    shutil.rmtree(folder / "val")
    with pytest.raises(ValueError, match="has no folder val/"):
        read_splits(folder)


def test_a_class_missing_from_validation_is_named(folder):
    shutil.rmtree(folder / "val" / "digit-1")
    with pytest.raises(ValueError, match=r"val lacks digit-1, which .*train has"):
        read_splits(folder)


def test_a_class_missing_from_training_is_named(folder):
    shutil.rmtree(folder / "train" / "digit-2")
    with pytest.raises(ValueError, match=r"train lacks digit-2, which .*val has"):
        read_splits(folder)


def test_a_class_without_images_is_named(folder):
    for image in (folder / "train" / "digit-0").iterdir():
        image.rename(image.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"train/digit-0 has no image"):
        read_splits(folder)


class Cifar(torch.utils.data.Dataset):
    """Stands in for torchvision's: images in memory, names of classes."""

    classes = ("cat", "dog")

    def __len__(self):
        return 4

    def __getitem__(self, index):
        from PIL import Image

        return Image.new("RGB", (8, 8), (index, 0, 0)), index % 2


def test_a_set_of_timms_gives_images_and_classes(monkeypatch, tmp_path):
    asked = []

    def create(name, **options):
        asked.append((name, options["split"], options["root"], options["download"]))
        return Cifar()

    monkeypatch.setattr("timm.data.create_dataset", create)
    config = Config(data="torch/cifar10", data_dir=str(tmp_path), img_size=8, aa=None, val_split="test")
    data = load_data(config)
    assert asked == [("torch/cifar10", split, str(tmp_path), False) for split in ("train", "test")]
    assert data.classes == ("cat", "dog") and data.train[3][0].shape == (3, 8, 8) and data.train[3][1] == 1
    with pytest.raises(ValueError, match="num_classes: torch/cifar10 has 2 classes, got 10"):
        load_data(config.replace(num_classes=10))


def test_a_real_set_of_torchvision_is_read(tmp_path):
    """MNIST in its own file format, made of digits."""
    import struct

    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.nn.functional.interpolate(
        torch.from_numpy(digits.images[:20]).float()[:, None] * 15, (28, 28)
    ).byte()
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, part in (("train", slice(0, 16)), ("t10k", slice(16, 20))):
        pixels, labels = images[part, 0].numpy(), digits.target[part].astype("uint8")
        (raw / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, len(pixels), 28, 28) + pixels.tobytes()
        )
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + labels.tobytes())
    config = Config(data="torch/mnist", data_dir=str(tmp_path), img_size=28, in_chans=1, mean=[0.5], std=[0.5], aa=None)
    data = load_data(config)
    assert (len(data.train), len(data.val), len(data.classes)) == (16, 4, 10)
    assert [data.train[i][1] for i in range(16)] == digits.target[:16].tolist()
    assert data.val[0][0].shape == (1, 28, 28)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(data="torch/nothing"),
            "data: timm cannot make torch/nothing, split 'train': Unknown torchvision dataset",
        ),
        (dict(data="torch/cifar10", data_dir="/nowhere"), "data_dir: /nowhere is not there"),
        (
            dict(data="torch/cifar10", data_dir="."),
            "data: timm cannot make torch/cifar10, split 'train': Dataset not found",
        ),
    ],
)
def test_a_set_that_timm_cannot_make_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        load_data(Config(**changes))
