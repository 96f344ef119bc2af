"""The images: scikit-learn's digits, a folder or a set of timm's, checked before training, with timm's transforms."""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torch.torch_version import TorchVersion
from torch.utils.data import Dataset, IterableDataset

from fastdeit.train.config import Config
from fastdeit.train.decoders import Decoder, create_decoder, resolved_decoder, with_installed_decoder
from fastdeit.train.image_files import MAX_MEGAPIXELS, UnreadableImageError
from fastdeit.train.image_folders import FolderImages, read_split, read_splits
from fastdeit.train.image_sources import DecodedImage, ImageSource, image_source
from fastdeit.train.sampling import derive_seed
from fastdeit.train.transform_errors import TransformFailure, described
from fastdeit.train.transforms import eval_transform, train_transform

DIGITS_VALIDATION = 360  # of 1,797, stratified; the split does not depend on the run's seed


TIMM_SETS = {  # by prefix, the packages that timm's reader of them imports
    "hfds": ("datasets",),
    "hfids": ("datasets",),
    "wds": ("webdataset",),
    "tfds": ("tensorflow", "tensorflow_datasets"),
    "torch": (),
}
SETS_SINCE = "1.0.31"  # the timm whose readers of those packages are known to work


@dataclass(frozen=True)
class Data:
    """train gives uint8 images (C, H, W) to be normalised on the device, or is a stream of them; val gives normalised float32."""

    train: Dataset
    val: Dataset
    classes: tuple[str, ...]


def load_data(config: Config) -> Data:
    """Training and validation images with the transforms that config asks for.

    Raises:
        ImportError: the library that a set of timm's or the decoder needs is not installed.
        ValueError: the folder lacks train/ or val/, a class is empty or is in one of the two only; timm cannot make its set, or
            nobody says how many classes it has; num_classes says another number than there is.
    """
    data = _load_data(config)
    if config.num_classes not in (None, len(data.classes)):
        raise ValueError(f"num_classes: {config.data} has {len(data.classes)} classes, got {config.num_classes}")
    return data


def _load_data(config: Config) -> Data:
    mode = "L" if config.in_chans == 1 else "RGB"
    if config.data == "digits":
        return _digits(mode, config)
    if config.data.partition("/")[0].lower() in TIMM_SETS and not Path(config.data).is_dir():
        return _timm_data(mode, config)
    decoder = create_decoder(resolved_decoder(config))
    train, val = read_splits(Path(config.data))
    return Data(
        Images(train, mode, train_transform(config), config.max_image_megapixels, decoder),
        Images(val, mode, eval_transform(config), config.max_image_megapixels, decoder),
        train.classes,
    )


def load_validation(config: Config) -> tuple[Dataset, tuple[str, ...]]:
    """Validation images and classes; of a folder root/val alone is read. Raises as `load_data`.

    In place of a decoder that is not installed another one is taken, which stderr tells.
    """
    root, config = Path(config.data), with_installed_decoder(config)
    if config.data == "digits" or not (root / "val").is_dir():
        data = load_data(config)
        return data.val, data.classes
    val = read_split(root / "val")
    mode = "L" if config.in_chans == 1 else "RGB"
    decoder = create_decoder(resolved_decoder(config))
    return Images(val, mode, eval_transform(config), config.max_image_megapixels, decoder), val.classes


class Images(Dataset):
    """The images of a folder, of timm's ImageDataset or of a torchvision set. Decoded here, since timm's ImageDataset skips
    unreadable files.

    Args:
        source: (file, class) or (PIL image, class), map-style.
        mode: PIL's, of the decoded image.
        transform: of a PIL image.
        max_megapixels: a larger image counts as unreadable.
        decoder: of JPEG files; Pillow by default.
    """

    def __init__(
        self,
        source: Any,
        mode: str,
        transform: Callable[[Image.Image], Any],
        max_megapixels: float = MAX_MEGAPIXELS,
        decoder: Decoder | None = None,
    ) -> None:
        self.source = source
        self.max_megapixels = max_megapixels
        self.folder = source if isinstance(source, FolderImages) else None
        self.mode = mode
        self.transform = transform
        self.decoder = decoder

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Raises UnreadableImageError or TransformError, which name the image."""
        image, label = self.decoded(index)
        with self.naming_errors(index):
            return self.transform(image), label

    def decoded(self, index: int) -> tuple[Image.Image, int]:
        """The image before its transforms. Raises UnreadableImageError that names it."""
        with self.naming_errors(index):
            source, label = self.source_of(index)
            return source.image(), label

    def source_of(self, index: int) -> tuple[ImageSource, int]:
        """The image before it is decoded. Raises what comes of a file that cannot be read: see `naming_errors`."""
        file, label = self.read(index)
        return self.opened(file), label

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        """The file's content, or the image of a set that decodes itself."""
        file, label = getattr(self.source, "reader", self.source)[index]
        if isinstance(file, str | os.PathLike):
            with open(file, "rb", buffering=0) as stream:
                file = stream.read()
        elif not isinstance(file, Image.Image):
            with file:
                file = file.read()
        return file, int(label)

    def opened(self, file: bytes | Image.Image) -> ImageSource:
        return image_source(file, self.mode, self.decoder, self.max_megapixels)

    @contextlib.contextmanager
    def naming_errors(self, index: int) -> Iterator[None]:
        """Makes of an error one that names the image: TransformError of a transform's, UnreadableImageError of any other."""
        try:
            yield
        except TransformFailure as failure:
            raise failure.on(self.filename(index)) from failure
        except Exception as error:  # what PIL raises depends on the format and on where the file is damaged
            raise UnreadableImageError(
                f"{self.filename(index)}: cannot be read as an image: {described(error)}"
            ) from error

    def filename(self, index: int) -> str:
        """The image's whole path, as far as the set knows of files."""
        if self.folder is not None:
            return self.folder.samples[index][0]
        reader = getattr(self.source, "reader", None)
        if reader is not None:
            return reader.filename(index, absolute=True)
        samples = getattr(self.source, "samples", None)  # of torchvision's folders
        return samples[index][0] if samples else f"image {index}"

    def __len__(self) -> int:
        return len(self.source)


class Stream(IterableDataset):
    """The images of one of timm's readers, in its order. Its length is of all processes together, where timm's is of one.

    Args:
        reader: of (PIL image, class).
        transform: of a PIL image.
    """

    def __init__(self, reader: Any, transform: Callable[[Image.Image], Any]) -> None:
        self.reader = reader
        self.transform = transform

    def start(self, epoch: int, seed: int) -> None:
        """To be called before an epoch's first image, which then depends on no epoch before. In a worker PyTorch's seed counts."""
        self.reader.set_epoch(epoch)
        self.reader.worker_seed = seed % 2**31
        self.reader.ds = None  # readers make it anew, and their random numbers with it

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return self.share(0, 1)

    def share(self, rank: int, world_size: int) -> Iterator[tuple[Any, int]]:
        """Every world_size-th image, from rank on. Raises TransformError."""
        for number, (image, label) in enumerate(islice(self.reader, rank, None, world_size)):
            try:
                yield self.transform(image), int(label)
            except TransformFailure as failure:
                raise failure.on(f"image {rank + number * world_size} of the stream") from failure

    def __len__(self) -> int:
        return self.reader.num_samples


class ArrayDataset(Dataset):
    """Images in memory. images (N, H, W) uint8, classes (N,)."""

    def __init__(
        self, images: np.ndarray, classes: np.ndarray, mode: str, transform: Callable[[Image.Image], Any]
    ) -> None:
        self.images = [Image.fromarray(image).convert(mode) for image in images]
        self.classes = classes.tolist()
        self.mode = mode
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.classes[index]

    def source_of(self, index: int) -> tuple[ImageSource, int]:
        image, label = self.read(index)
        return self.opened(image), label

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.classes[index]

    def opened(self, image: Image.Image) -> ImageSource:
        return DecodedImage(image)

    @contextlib.contextmanager
    def naming_errors(self, index: int) -> Iterator[None]:
        """Makes of a transform's error a TransformError that names the image."""
        try:
            yield
        except TransformFailure as failure:
            raise failure.on(f"image {index}") from failure

    def __len__(self) -> int:
        return len(self.classes)


def _timm_data(mode: str, config: Config) -> Data:
    _check_packages(config.data)
    if not (config.data_download or config.data_dir is None or Path(config.data_dir).exists()):
        raise ValueError(f"data_dir: {config.data_dir} is not there; data_download gets the sets that can be had")
    options = dict(
        root=config.data_dir,
        download=config.data_download,
        batch_size=config.batch_size,
        seed=derive_seed("stream order", config.seed) % 2**31,
        input_img_mode=mode,
        input_key=config.input_key,
        target_key=config.target_key,
    )
    sources = []
    for split, training in ((config.train_split, True), (config.val_split, False)):
        try:
            sources.append(timm.data.create_dataset(config.data, split=split, is_training=training, **options))
        except (RuntimeError, ValueError, TypeError, AssertionError, FileNotFoundError) as error:
            raise ValueError(f"data: timm cannot make {config.data}, split {split!r}: {error}") from error
    train, val = sources
    if isinstance(train, IterableDataset):
        if config.repeated_aug > 1:
            raise ValueError(f"repeated_aug: {config.data} is a stream, which gives each image once; expected 1")
        if not train.reader.num_samples:
            raise ValueError(f"train_split: {config.data} does not say how many images {config.train_split!r} has")
        train.set_loader_cfg(num_workers=config.workers)
        # Readers make the shares of several processes even by leaving out and repeating images: evaluation shares them itself.
        val.reader.dist_rank, val.reader.dist_num_replicas = 0, 1
        streams = Stream(train.reader, train_transform(config)), Stream(val.reader, eval_transform(config))
        return Data(*streams, _timm_classes(train, config))
    decoder = create_decoder(resolved_decoder(config))
    return Data(
        Images(train, mode, train_transform(config), config.max_image_megapixels, decoder),
        Images(val, mode, eval_transform(config), config.max_image_megapixels, decoder),
        _timm_classes(train, config),
    )


def _check_packages(data: str) -> None:
    """Raises ImportError that says what to install for a set of timm's."""
    packages = TIMM_SETS[data.partition("/")[0].lower()]
    if packages and TorchVersion(timm.__version__) < SETS_SINCE:
        raise ImportError(
            f"data: {data} needs timm {SETS_SINCE} or newer, this is {timm.__version__}: pip install -U timm"
        )
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            name = package.replace("_", "-")
            raise ImportError(f"data: {data} needs the package {name}: pip install {name} ({error})") from error


def _timm_classes(source: Any, config: Config) -> tuple[str, ...]:
    """Names by index, as the set has them, else the indices themselves."""
    by_name = getattr(getattr(source, "reader", None), "class_to_idx", None)
    names = sorted(by_name, key=by_name.get) if by_name else getattr(source, "classes", None)
    if not names and config.num_classes is None:
        raise ValueError(f"num_classes: {config.data} does not say how many classes it has")
    return tuple(map(str, names)) if names else tuple(map(str, range(config.num_classes)))


def _digits(mode: str, config: Config) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    size = (config.img_size, config.img_size)
    images = np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in images])
    train, val = train_test_split(
        np.arange(len(images)), test_size=DIGITS_VALIDATION, stratify=digits.target, random_state=0
    )
    return Data(
        ArrayDataset(images[train], digits.target[train], mode, train_transform(config)),
        ArrayDataset(images[val], digits.target[val], mode, eval_transform(config)),
        tuple(map(str, digits.target_names)),
    )
