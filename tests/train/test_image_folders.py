"""One reading of a folder of images: which classes, in which order, which images."""

import os
import random

import pytest
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key

from fastdeit.train.datasets import load_data
from fastdeit.train.image_folders import images_below, natural_order, read_split, read_splits


def make(root, *paths):
    """Empty files, and the folders that they are in."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


@pytest.mark.parametrize(
    "names, classes",
    [
        (["10", "2", "1"], ("1", "2", "10")),
        (["Zebra", "apple"], ("apple", "Zebra")),
        (["1", "01"], ("01", "1")),
        (["cat", "Cat", "CAT"], ("CAT", "Cat", "cat")),
        (["n02", "n1", "n01"], ("n01", "n1", "n02")),
        (["²", "m²", "2"], ("2", "m²", "²")),  # no number, and timm's key raises on it
        (["a b", "a", "a\nb"], ("a", "a\nb", "a b")),
    ],
)
def test_classes_come_in_natural_order_and_their_text_breaks_ties(tmp_path, names, classes):
    split = read_split(make(tmp_path, *(f"{name}/{number}.png" for number, name in enumerate(names))))
    assert split.classes == classes
    assert [(os.path.basename(os.path.dirname(path)), label) for path, label in split.samples] == [
        (name, number) for number, name in enumerate(classes)
    ]


def test_the_order_is_timms_where_timm_has_one(tmp_path):
    generator = random.Random(0)
    names = {"".join(generator.choices("aBc019_ ", k=generator.randint(1, 6))).strip() for _ in range(300)} - {""}
    distinct = list({tuple(natural_key(name)): name for name in names}.values())
    assert natural_order(distinct) == sorted(distinct, key=natural_key)
    make(tmp_path, *(f"{name}/{number}.jpg" for name in distinct for number in range(2)))
    samples, numbers = find_images_and_targets(str(tmp_path))
    split = read_split(tmp_path)
    assert {name: number for number, name in enumerate(split.classes)} == numbers
    assert set(split.samples) == set(samples)


def test_names_that_timm_takes_for_equal_have_one_order():
    for names in (["1", "01", "001"], ["Cat", "cat", "cAt"], ["a1", "A01", "a01"]):
        orders = {tuple(natural_order(random.Random(seed).sample(names, len(names)))) for seed in range(20)}
        assert orders == {tuple(sorted(names))}


def test_a_class_is_the_first_folder_below_the_split_and_images_lie_at_any_depth(tmp_path):
    split = read_split(make(tmp_path, "cat/part1/a.png", "cat/b.jpeg", "dog/part1/deep/c.JPG", "dog/part2/d.png"))
    assert split.classes == ("cat", "dog")
    assert [(path.removeprefix(f"{tmp_path}/"), label) for path, label in split.samples] == [
        ("cat/b.jpeg", 0),
        ("cat/part1/a.png", 0),
        ("dog/part1/deep/c.JPG", 1),
        ("dog/part2/d.png", 1),
    ]


@pytest.mark.parametrize(
    "left_out",
    [
        ".ipynb_checkpoints/a.png",
        "__MACOSX/cat/._a.png",
        ".DS_Store",
        "cat/.ipynb_checkpoints/a-checkpoint.png",
        "cat/__MACOSX/._a.png",
        "cat/._a.png",
        ".cache/cat/a.png",
        "README.md",
        "cat/notes.txt",
    ],
)
def test_what_tools_leave_behind_is_no_class_and_no_image(tmp_path, left_out):
    make(tmp_path, "cat/a.png", "dog/b.png", left_out)
    split = read_split(tmp_path)
    assert split.classes == ("cat", "dog") and len(split) == 2


def test_hidden_folders_above_the_split_do_not_hide_it(tmp_path):
    assert len(read_split(make(tmp_path / ".cache" / "__MACOSX", "cat/a.png"))) == 1


@pytest.mark.parametrize(
    "paths, message",
    [
        (["cat/a.png", "stray.png"], r"has stray\.png beside the classes; expected .*/CLASS/ with images"),
        (["cat/a.png", *(f"{i}.jpg" for i in range(7))], r"has 0\.jpg, 1\.jpg, .*, 4\.jpg and 2 more beside"),
        (["cat/a.png", "dog/readme.txt"], r"dog has no image \(\.png, "),
        (["cat/a.png", "dog/.hidden.png"], r"dog has no image"),
        (["readme.txt"], "is empty; expected one folder of images per class"),
        ([".git/a.png"], "is empty"),
    ],
)
def test_what_has_no_place_is_refused_by_name(tmp_path, paths, message):
    with pytest.raises(ValueError, match=rf"data: {tmp_path}.*{message}"):
        read_split(make(tmp_path, *paths))


def test_a_class_whose_name_is_no_utf8_is_refused(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    open(folder + b"/a.png", "w").close()
    with pytest.raises(ValueError, match=r"data: b'.*/caf\\xe9' has a name that is not UTF-8"):
        read_split(tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path):
    store = make(tmp_path / "store", "a.png")
    (tmp_path / "split" / "dog").mkdir(parents=True)
    (tmp_path / "split" / "cat").symlink_to(store)
    (tmp_path / "split" / "dog" / "b.png").symlink_to(store / "a.png")
    (tmp_path / "split" / "dog" / "gone.png").symlink_to(store / "nothing.png")  # to be told of when it is to be read
    (tmp_path / "split" / "dog" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "split" / "dog" / "pipe.png")  # which would be waited for
    split = read_split(tmp_path / "split")
    assert [os.path.basename(path) for path, _ in split.samples] == ["a.png", "b.png", "gone.png"]
    (store / "again").symlink_to(tmp_path / "split")
    with pytest.raises(ValueError, match=r"data: .*/again/cat is a link to a folder that it is in"):
        read_split(tmp_path / "split")


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone").rmdir()
    with pytest.raises(ValueError, match=r"data: .*gone cannot be read: No such file or directory"):
        images_below(tmp_path / "gone")


@pytest.mark.parametrize("stray", ["val/stray.png", "train/stray.png"])
def test_a_stray_image_of_one_split_shifts_no_label(tmp_path, stray):
    make(tmp_path, "train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png", stray)
    with pytest.raises(ValueError, match=rf"{stray.split('/')[0]} has stray.png beside the classes"):
        read_splits(tmp_path)


def test_a_class_may_be_named_like_an_image_and_its_images_come_in_natural_order(tmp_path):
    split = read_split(make(tmp_path, "cat.png/10.png", "cat.png/2.png"))
    assert split.classes == ("cat.png",)
    assert [os.path.basename(path) for path, _ in split.samples] == ["2.png", "10.png"]


def test_the_splits_give_their_images_the_same_classes(tmp_path, small_config, image_folder):
    """The product's own way in: class names and labels of training and validation."""
    for split in ("train", "val"):
        for name, digit in (("10", 0), ("9", 1), ("Zebra", 2)):
            target = tmp_path / split / name / "part1"
            target.mkdir(parents=True)
            for path in (image_folder / split / f"digit-{digit}").iterdir():
                (target / path.name).symlink_to(path)
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
    data = load_data(small_config.replace(data=str(tmp_path)))
    assert data.classes == ("9", "10", "Zebra")
    for images in (data.train, data.val):
        for index in range(len(images)):
            assert images.filename(index).split("/")[-3] == data.classes[images[index][1]]
