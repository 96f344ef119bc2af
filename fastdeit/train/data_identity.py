"""The identity of a run's data, which a resumed run must find unchanged. It does not depend on where the data lies."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from torch.utils.data import Dataset

from fastdeit.train.image_folders import FolderImages, listed

STAT_THREADS, STAT_PART = 16, 256  # at once, and files that each takes at a time


def identity(dataset: Dataset) -> dict[str, Any]:
    """What dataset holds, as plain values: `images`, their number, and `groups`, by class a count and a digest.

    In an image folder the digest of a class is of its images' names below the class's folder and of their sizes in bytes, so that
    the same files at another path are the same data. Elsewhere one group, whose name is empty, stands for all classes: its digest
    is of pixels and labels of images in memory, and of the labels of a set of torchvision's; other sets have none.

    Args:
        dataset: `Images`, `ArrayDataset` or `Stream` of datasets.py.
    """
    folder = getattr(dataset, "folder", None)
    if folder is not None:
        sizes = _sizes([path for path, _ in folder.samples])
        groups = {
            name: _group(_names_and_sizes(f"{folder.root / name}/", paths, sizes))
            for name, paths in _by_class(folder).items()
        }
    elif hasattr(dataset, "images"):  # of ArrayDataset
        pairs = zip(dataset.images, dataset.classes, strict=True)
        groups = {"": _group(image.tobytes() + int(label).to_bytes(4, "little") for image, label in pairs)}
    else:
        targets = getattr(getattr(dataset, "source", None), "targets", None)
        groups = {} if targets is None else {"": _group(int(label).to_bytes(4, "little") for label in targets)}
    return {"images": len(dataset), "groups": groups}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In words, how `now` differs from what a run was trained on `before`; None where it does not. Both are `identity`'s."""
    old, new = before["groups"], now["groups"]
    both = [name for name in old if name in new]
    counts = [f"{new[n][0]} images of {n}, not {old[n][0]}" for n in both if n and old[n][0] != new[n][0]]
    digests = [n for n in both if old[n][0] == new[n][0] and old[n][1] != new[n][1]]
    parts = [
        (before["images"] != now["images"], f"{now['images']} images, not {before['images']}"),
        (len(both) < len(old), f"without {listed([n for n in old if n not in new])}"),
        (len(both) < len(new), f"with the new {listed([n for n in new if n not in old])}"),
        (bool(counts), listed(counts, 3)),
        (digests == [""], "other images or labels"),
        (bool(digests) and digests != [""], f"other names or sizes of the images of {listed(digests)}"),
    ]
    return "; ".join(text for differs, text in parts if differs) or None


def _by_class(folder: FolderImages) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: [] for name in folder.classes}
    for path, label in folder.samples:
        found[folder.classes[label]].append(path)
    return found


def _sizes(paths: Sequence[str]) -> dict[str, int]:
    """Sizes in bytes; -1 of a dangling link. Several threads share the work, since each request to a network disk takes long."""
    parts = [paths[start : start + STAT_PART] for start in range(0, len(paths), STAT_PART)]
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        found = threads.map(lambda part: [_size(path) for path in part], parts)
        return dict(zip(paths, chain.from_iterable(found), strict=True))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _names_and_sizes(root: str, paths: Iterable[str], sizes: Mapping[str, int]) -> Iterator[bytes]:
    for path in paths:
        yield os.fsencode(f"{path.removeprefix(root)}\0{sizes[path]}\n")


def _group(entries: Iterable[bytes]) -> list[Any]:
    """How many entries there are, and the digest of them all."""
    digest, count = hashlib.blake2b(digest_size=8), 0
    for entry in entries:
        digest.update(entry)
        count += 1
    return [count, digest.hexdigest()]
