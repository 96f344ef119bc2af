"""The one reading of a folder of images: its classes, their order, and the images of each.

A class is a folder directly below the split; its images may lie at any depth. Hidden entries and `__MACOSX`, which tools leave
behind, are left out. Classes and images come in timm's natural order (`2` before `10`, `apple` before `Zebra`), so that a class has
the number that timm gives it; names that are equal in this order (`1` and `01`, `Cat` and `cat`) come in the order of their text.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data.readers.img_extensions import get_img_extensions

LEFT_OUT = "__MACOSX"  # of archives that macOS makes; in it and outside, files that start with ._ are no images either


@dataclass(frozen=True)
class FolderImages:
    """The images of one split.

    Attributes:
        root: the split's folder.
        classes: names by number.
        samples: path and number of the class of each image, class by class.
    """

    root: Path
    classes: tuple[str, ...]
    samples: tuple[tuple[str, int], ...]

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)


def read_splits(root: Path) -> tuple[FolderImages, FolderImages]:
    """The images of root/train and root/val, which have the same classes.

    Raises:
        ValueError: as `read_split`, or a class is in one of the two only.
    """
    if not root.is_dir():
        raise ValueError(f"data: {root} is neither `digits` nor a folder")
    splits = []
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise ValueError(f"data: {root} has no folder {name}/; expected train/CLASS/ and val/CLASS/ with images")
        splits.append(read_split(root / name))
    train, val = splits
    for here, there in ((train, val), (val, train)):
        missing = [name for name in here.classes if name not in there.classes]
        if missing:
            raise ValueError(
                f"data: {there.root} lacks {listed(missing)}, which {here.root} has; both need the same classes"
            )
    return train, val


def read_split(folder: Path) -> FolderImages:
    """The images of folder/CLASS/, at any depth.

    Raises:
        ValueError: there is no class, a class has no image or a name that is not UTF-8, an image lies beside the classes, a folder
            cannot be read or a link leads back to a folder that it is in.
    """
    entries = _visible(folder)
    classes = natural_order(entry.name for entry in entries if entry.is_dir())
    strays = natural_order(entry.name for entry in entries if not entry.is_dir() and is_image(entry.name))
    if strays:
        raise ValueError(
            f"data: {folder} has {listed(strays)} beside the classes; expected {folder}/CLASS/ with images"
        )
    if not classes:
        raise ValueError(f"data: {folder} is empty; expected one folder of images per class")
    samples: list[tuple[str, int]] = []
    for number, name in enumerate(classes):
        if not _is_utf8(name):
            raise ValueError(f"data: {os.fsencode(folder / name)!r} has a name that is not UTF-8; rename the folder")
        images = images_below(folder / name)
        if not images:
            raise ValueError(f"data: {no_image(folder / name)}")
        samples += [(path, number) for path in images]
    return FolderImages(folder, tuple(classes), tuple(samples))


def images_below(folder: Path) -> list[str]:
    """The paths of the images in folder and in those within it, by their endings, in natural order. Links are followed.

    Raises:
        ValueError: a folder cannot be read, or a link leads back to a folder that it is in.
    """
    return natural_order(_walk(str(folder), ()))


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its ending."""
    return os.path.splitext(name)[1].lower() in get_img_extensions(as_set=True)


def no_image(folder: Path) -> str:
    """The message where `images_below` finds nothing."""
    return f"{folder} has no image ({', '.join(get_img_extensions())})"


def natural_order(names: Iterable[str]) -> list[str]:
    """timm's order, where numbers count as numbers and case does not; the text itself decides where that takes two for equal."""
    return sorted(names, key=lambda name: (_natural_key(name), name))


def listed(names: Sequence[Any], most: int = 5) -> str:
    """The first of names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def _natural_key(text: str) -> list[str | int]:
    """timm.utils.misc.natural_key, for digits such as a superscript two as well, which are no numbers."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"(\d+)", text.lower()))]


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Paths of images. above: the folders that led here, by device and inode."""
    entries = _visible(folder)
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"data: {folder} is a link to a folder that it is in")
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry.path, (*above, here))
        elif is_image(entry.name) and (entry.is_file() or entry.is_symlink()):  # a dangling link is an unreadable image
            yield entry.path


def _visible(folder: str | Path) -> list["os.DirEntry[str]"]:
    """The entries of a folder without hidden ones and `__MACOSX`."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not (entry.name.startswith(".") or entry.name == LEFT_OUT)]
    except OSError as error:
        raise ValueError(f"data: {folder} cannot be read: {error.strerror}") from error


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
