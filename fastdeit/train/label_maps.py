"""Evaluation by other labels than the folders': ReaL, ImageNet-V2, any file that lists the correct classes of an image."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastdeit.train.class_names import class_difference
from fastdeit.train.config import Config
from fastdeit.train.device import autocast
from fastdeit.train.image_files import MAX_MEGAPIXELS, read_image
from fastdeit.train.image_folders import images_below, no_image
from fastdeit.train.models import head_logits
from fastdeit.train.transform_errors import NamedTransforms, TransformFailure
from fastdeit.train.transforms import eval_transform

REAL = "real"  # the label map that timm brings along
_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


class LabelMap:
    """Which classes count as right for an image: one, several, or none, and then the image does not count.

    Args:
        source: `real` for the ReaL labels of ImageNet's validation images (Beyer et al. 2020, "Are we done with ImageNet?"); or a
            JSON file: a list with the class indices of ILSVRC2012_val_00000001, 2, ..., as ReaL's own file; or an object from
            the name of a file or of its folder to a class, or a list of classes, each by name or index. ImageNet-V2's folders are
            named by class index: {"0": 0, "1": 1, ...}, which is also what no entry for any of them but `{}` gives.
        classes: names of the model's classes, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such JSON, or names a class that the model does not have.
    """

    def __init__(self, source: str, classes: Sequence[str]) -> None:
        self.source = source
        self.classes = tuple(classes)
        if source == REAL:
            _check_imagenet(self.classes)
        entries = _real_labels() if source == REAL else _read_json(Path(source))
        if isinstance(entries, list):
            entries = {f"ILSVRC2012_val_{i + 1:08d}": accepted for i, accepted in enumerate(entries)}
        index = {name: i for i, name in enumerate(self.classes)}
        self._accepted = {name: self._indices(name, accepted, index) for name, accepted in entries.items()}

    def accepted(self, path: Path) -> tuple[int, ...]:
        """The correct classes of the image at path. Raises ValueError if the map has no entry for it."""
        number = _VALIDATION_NUMBER.search(path.name)
        names = (path.name, path.stem, number.group() if number else "", path.parent.name)
        for name in names:
            if name in self._accepted:
                return self._accepted[name]
        if not self._accepted and re.fullmatch("[0-9]{1,6}", path.parent.name):
            number = int(path.parent.name)
            if path.parent.name in self.classes and self.classes.index(path.parent.name) != number:
                raise ValueError(
                    f"labels: {self.source} takes the folder {path.parent} for the model's class number {number}, which is called "
                    f"{self.classes[number] if number < len(self.classes) else 'nothing'}; its class {path.parent.name} is number "
                    f'{self.classes.index(path.parent.name)}. Say which is meant, as in {{"{path.parent.name}": ...}}'
                )
            if number < len(self.classes):
                return (number,)
        raise ValueError(f"labels: {self.source} has no entry for {path}, nor for its folder")

    def _indices(self, name: str, accepted: Any, index: Mapping[str, int]) -> tuple[int, ...]:
        found = []
        for entry in accepted if isinstance(accepted, list) else [accepted]:
            known = index.get(entry) if isinstance(entry, str) else entry
            if type(known) is not int or not 0 <= known < len(self.classes):
                raise ValueError(
                    f"labels: {self.source} gives {name} the class {entry!r}; expected one of the model's "
                    f"{len(self.classes)} classes by name or index"
                )
            found.append(known)
        return tuple(found)


class LabelledImages(Dataset):
    """The images below a folder, in natural order, each with a row of booleans: which classes are right.

    Raises:
        ValueError: there are no images, or the map has no entry for one of them.
    """

    def __init__(
        self,
        root: Path,
        labels: LabelMap,
        mode: str,
        transform: NamedTransforms,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> None:
        self.paths = [Path(path) for path in images_below(root)]
        if not self.paths:
            raise ValueError(f"data: {no_image(root)}")
        self.accepted = [labels.accepted(path) for path in self.paths]
        self.classes = len(labels.classes)
        self.mode = mode
        self.transform = transform
        self.max_megapixels = max_megapixels

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        right = torch.zeros(self.classes, dtype=torch.bool)
        right[list(self.accepted[index])] = True
        image = read_image(self.paths[index], self.mode, self.max_megapixels)
        try:
            return self.transform(image), right
        except TransformFailure as failure:
            raise failure.on(str(self.paths[index])) from failure

    def __len__(self) -> int:
        return len(self.paths)


def labelled_images(config: Config, root: Path, labels: LabelMap) -> LabelledImages:
    """The images of root/val, or of root itself, as config's model wants to see them."""
    if not root.is_dir():
        raise ValueError(f"data: {root} is not a folder of images, which labels are for")
    folder = root / "val" if (root / "val").is_dir() else root
    mode = "L" if config.in_chans == 1 else "RGB"
    return LabelledImages(folder, labels, mode, eval_transform(config), config.max_image_megapixels)


@torch.no_grad()
def evaluate_labelled(
    model: nn.Module, loader: DataLoader[Any], config: Config, device: torch.device
) -> dict[str, float]:
    """Top-1 in percent by readout over the images of loader that have any right class."""
    was_training = model.training
    model.eval()
    counted, correct = 0, {}
    for images, right in loader:
        images, right = images.to(device), right.to(device)
        with autocast(config, device):
            readouts = head_logits(model, images)
        for name, logits in readouts.items():
            correct[name] = correct.get(name, 0) + int(right.gather(1, logits.argmax(1, keepdim=True)).sum())
        counted += int(right.any(1).sum())
    model.train(was_training)
    if not counted:
        raise ValueError("labels: no image has a right class")
    return {name: 100 * n / counted for name, n in correct.items()}


def _check_imagenet(classes: tuple[str, ...]) -> None:
    """Raises ValueError unless classes are ImageNet's in its order, by their WordNet names or by number."""
    difference = class_difference(classes, ImageNetInfo().label_names())
    if difference is not None and classes != tuple(map(str, range(1000))):
        raise ValueError(
            f"labels: {REAL} is for ImageNet's classes in its order, n01440764 to n15075141 or 0 to 999; the model {difference}"
        )


def _real_labels() -> dict[str, list[int]]:
    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50_000)]
    return {Path(name).stem: accepted for name, accepted in RealLabelsImagenet(names).real_labels.items()}


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"labels: {path} is neither a file nor {REAL!r}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"labels: {path} cannot be read as JSON: {error}") from None
    if not isinstance(entries, list | dict):
        raise ValueError(f"labels: {path} holds a {type(entries).__name__}, expected a list or an object")
    return entries
