"""What a run was trained on is known again at another path, and what changed is named."""

import json
import shutil
from types import SimpleNamespace

import pytest

from fastdeit.train import data_identity
from fastdeit.train.data_identity import difference, identity
from fastdeit.train.datasets import load_data


@pytest.fixture
def folder(image_folder, tmp_path):
    return shutil.copytree(image_folder, tmp_path / "images")


class Labelled(list):
    """A set of two images that a library has."""

    def __init__(self, source):
        super().__init__("ab")
        self.source = source


def of(config, folder):
    return identity(load_data(config.replace(data=str(folder))).train)


def test_the_same_images_at_another_path_are_the_same_data(small_config, image_folder, folder):
    before = of(small_config, image_folder)
    assert before["images"] == 96 and list(before["groups"]) == ["digit-0", "digit-1", "digit-2"]
    assert difference(json.loads(json.dumps(before)), of(small_config, folder)) is None


def test_another_image_of_as_many_bytes_goes_unseen_and_one_of_more_does_not(small_config, folder):
    before = of(small_config, folder)
    image = folder / "train" / "digit-1" / "3.png"
    with image.open("ab") as file:
        file.write(b"\0")
    assert difference(before, of(small_config, folder)) == "other names or sizes of the images of digit-1"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: (f / "digit-1/3.png").unlink(), "95 images, not 96; 31 images of digit-1, not 32"),
        (lambda f: (f / "digit-1/3.png").rename(f / "digit-1/x.png"), "other names or sizes of the images of digit-1"),
        (
            lambda f: (f / "digit-1/3.png").rename(f / "digit-2/3b.png"),
            "31 images of digit-1, not 32, 33 images of digit-2, not 32",
        ),
        (
            lambda f: (f / "digit-1/deep").mkdir() or (f / "digit-1/3.png").rename(f / "digit-1/deep/3.png"),
            "other names or sizes of the images of digit-1",
        ),
    ],
)
def test_what_changed_is_named(small_config, folder, change, words):
    before = of(small_config, folder)
    change(folder / "train")
    assert difference(before, of(small_config, folder)) == words


def test_a_class_that_came_or_went_is_named(small_config, folder):
    before = of(small_config, folder)
    for split in ("train", "val"):
        (folder / split / "digit-1").rename(folder / split / "one")
    assert difference(before, of(small_config, folder)) == "without digit-1; with the new one"


def test_images_in_memory_are_known_by_their_pixels():
    from fastdeit.train.config import load_config

    data = load_data(load_config())
    before = identity(data.train)
    assert difference(before, identity(load_data(load_config()).train)) is None
    data.train.classes[5] += 1
    assert difference(before, identity(data.train)) == "other images or labels"
    data.train.classes[5] -= 1
    assert difference(before, identity(data.train)) is None
    data.train.images[5] = data.train.images[6]
    assert difference(before, identity(data.train)) == "other images or labels"


def test_sets_of_torchvision_are_known_by_their_labels():
    class Images(list):
        source = property(lambda self: SimpleNamespace(targets=list(self)))

    before = identity(Images([0, 1, 2]))
    assert difference(before, identity(Images([0, 1, 2]))) is None
    assert difference(before, identity(Images([0, 2, 1]))) == "other images or labels"
    assert difference(before, identity(Images([0, 1]))) == "2 images, not 3"


def test_a_link_to_nothing_is_an_image_of_no_size(small_config, folder):
    image = folder / "train" / "digit-1" / "3.png"
    before = of(small_config, folder)
    image.unlink()
    image.symlink_to(folder / "nothing.png")
    assert difference(before, of(small_config, folder)) == "other names or sizes of the images of digit-1"


def test_sizes_are_those_of_their_files_in_however_many_parts(small_config, folder, monkeypatch):
    for number, path in enumerate((folder / "train").rglob("*.png")):
        path.write_bytes(bytes(number))
    before = of(small_config, folder)
    monkeypatch.setattr(data_identity, "STAT_PART", 7)
    assert of(small_config, folder) == before


def test_digests_stay_as_saved_states_have_them(tmp_path, small_config):
    for split in ("train", "val"):
        (tmp_path / split / "a" / "b").mkdir(parents=True)
        (tmp_path / split / "a" / "b" / "1.png").write_bytes(b"12345")
    assert of(small_config, tmp_path) == {"images": 1, "groups": {"a": [1, "69f91dc9e2217bd9"]}}
    labelled = Labelled(SimpleNamespace(targets=[1, 258]))
    assert identity(labelled) == {"images": 2, "groups": {"": [2, "108bc7df5e5ec767"]}}


def test_a_set_that_tells_nothing_is_known_by_its_length():
    assert identity(Labelled(SimpleNamespace())) == {"images": 2, "groups": {}}
