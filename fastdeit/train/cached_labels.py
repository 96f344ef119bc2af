"""Hard teacher labels, computed once and kept in a file: the teacher sees each augmented image of a run, later runs only its label.

Augmentation is keyed, so that a run's images are known before it starts. The file holds an int16 class per (epoch, position); its
header names all that they depend on, and training refuses a file whose header differs from its own.

    8 bytes   magic
    8 bytes   length of the header, little endian
    header    JSON
    labels    int16, little endian, (epochs, positions); -1 where none is yet
    32 bytes  SHA-256 of all that precedes, once the file is complete
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from fastdeit.train.augmentation import BatchAugmentation
from fastdeit.train.config import Config
from fastdeit.train.datasets import ArrayDataset, Data
from fastdeit.train.decoders import decoder_version, with_decoder
from fastdeit.train.device import autocast
from fastdeit.train.files import WriteError, remove_temporaries, why, write_atomically
from fastdeit.train.loading import TrainLoader
from fastdeit.train.locks import claimed
from fastdeit.train.models import create_teacher, quickened
from fastdeit.train.phases import config_at, dataset_at, enlarged
from fastdeit.train.sampling import EpochBatches, seed_step
from fastdeit.train.transforms import train_transform

MAGIC = b"FDLABEL1"
MISSING = -1
STORE_EVERY = 60  # seconds
FILES_READ = 1000
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow")  # that augment
BEFORE = {"decoder": "pillow", "resize": "pillow", "decode_on": "cpu"}  # of a file that does not say
_SAMPLING = ("seed", "batch_size", "repeated_aug", "in_chans", "img_size", "mean", "std", "interpolation", "resize")
_GEOMETRY = ("decode_on", "simple_random_crop", "scale", "ratio", "hflip", "vflip", "reprob", "remode", "recount")
_COLOURS = ("three_augment", "aa", "color_jitter", "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob")
_SCHEDULES = ("img_size_schedule", "aa_schedule")
_MIXING = ("mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode", "mixup_off_epoch")
_TEACHER = ("precision", "teacher_model", "teacher_kwargs")
FIELDS_OF_LABELS = _SAMPLING + _GEOMETRY + _COLOURS + _SCHEDULES + _MIXING + _TEACHER


def label_header(config: Config, data: Data, device: torch.device, ranks: int, teacher_hash: str) -> dict[str, Any]:
    """All that labels depend on, as plain values.

    Raises:
        ValueError: data is a stream, or has more classes than int16 counts.
    """
    if isinstance(data.train, IterableDataset):
        raise ValueError(
            f"data: {config.data} is a stream, whose images have no position that labels could be kept for"
        )
    if len(data.classes) > np.iinfo(np.int16).max:
        raise ValueError(f"data: labels are int16, {config.data} has {len(data.classes)} classes")
    decoder = with_decoder(config).decoder
    batches = EpochBatches(len(data.train), config.batch_size, config.seed, repeats=config.repeated_aug)
    return {
        **{name: getattr(config, name) for name in FIELDS_OF_LABELS},
        "decoder": decoder,
        "ranks": ranks,
        "sampler": "keyed",
        "device": device.type,  # random numbers of a CPU and of a GPU differ
        "teacher_weights": teacher_hash,
        "dataset": fingerprint(data.train),
        "classes": len(data.classes),
        "positions": len(batches) * config.batch_size,
        "libraries": {name: version(name).partition("+")[0] for name in LIBRARIES} | decoder_version(decoder),
    }


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of what a data set holds and in which order.

    Of files: their paths below the root, their sizes, and the content of about FILES_READ of them, evenly spread. Else the pixels.
    """
    digest = hashlib.sha256(str(len(dataset)).encode())
    if isinstance(dataset, ArrayDataset):
        for image, label in zip(dataset.images, dataset.classes, strict=True):
            digest.update(image.tobytes() + label.to_bytes(4, "little"))
        return digest.hexdigest()
    source = dataset.source
    samples = getattr(getattr(source, "reader", source), "samples", None)
    if samples and isinstance(samples[0][0], str):
        root = os.path.commonpath([os.path.dirname(path) for path, _ in samples])
        for number, (path, label) in enumerate(samples):
            digest.update(f"{os.path.relpath(path, root)}\0{os.path.getsize(path)}\0{label}\n".encode())
            if number % (len(samples) // FILES_READ + 1) == 0:
                digest.update(Path(path).read_bytes())
    elif hasattr(getattr(source, "reader", None), "dataset"):  # of Hugging Face, which keeps a fingerprint itself
        digest.update(str(source.reader.dataset._fingerprint).encode())
    else:
        for index in range(len(source)):
            image, label = source[index]
            digest.update(image.tobytes() + int(label).to_bytes(4, "little"))
    return digest.hexdigest()


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class LabelFile:
    """An open file of labels.

    Attributes:
        header: what the labels depend on, with the number of epochs.
        labels: (epochs, positions) int16, mapped from the file.
    """

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError, or ValueError if path is no file of labels or is cut off."""
        if not path.is_file():
            raise FileNotFoundError(f"teacher_cache: {path}: no such file")
        self.path = path
        with path.open("rb") as file:
            magic, length = file.read(len(MAGIC)), int.from_bytes(file.read(8), "little")
            if magic != MAGIC:
                raise ValueError(f"teacher_cache: {path}: not a file of fastdeit cache-teacher")
            try:
                self.header = json.loads(file.read(length))
            except (ValueError, OverflowError, MemoryError, RecursionError):
                raise ValueError(f"teacher_cache: {path}: its header cannot be read") from None
        for name in ("epochs", "positions", "classes", "teacher_weights"):
            value = self.header.get(name) if isinstance(self.header, dict) else None
            kind = str if name == "teacher_weights" else int
            if type(value) is not kind or (kind is int and not 0 < value < 2**40):
                raise ValueError(
                    f"teacher_cache: {path}: its header has {value!r} as {name}, expected "
                    + ("a hash" if kind is str else "an integer of at least 1")
                )
        shape = (self.header["epochs"], self.header["positions"])
        self.start = len(MAGIC) + 8 + length
        self.end = self.start + 2 * shape[0] * shape[1]
        if path.stat().st_size < self.end:
            raise ValueError(f"teacher_cache: {path}: cut off at {path.stat().st_size} of {self.end} bytes")
        self.labels = np.memmap(path, "<i2", "r", self.start, shape)

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any], epochs: int) -> "LabelFile":
        """A file without labels yet. Raises WriteError."""
        text = json.dumps({**header, "epochs": epochs}, sort_keys=True).encode()
        row = np.full(header["positions"], MISSING, "<i2").tobytes()

        def write(file: BinaryIO) -> None:
            file.write(MAGIC + len(text).to_bytes(8, "little") + text)
            for _ in range(epochs):
                file.write(row)

        write_atomically(path, write)
        return cls(path)

    def store(self, epoch: int, row: np.ndarray) -> None:
        """Writes the labels of an epoch, (positions,) int16, to disk. Raises WriteError."""
        self._write(self.start + 2 * len(row) * epoch, row.astype("<i2").tobytes())

    def complete(self) -> None:
        """Ends the file with its hash. Raises WriteError."""
        self._write(self.end, self.digest())

    def _write(self, offset: int, content: bytes) -> None:
        try:
            with self.path.open("r+b") as file:
                file.seek(offset)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written: {why(error)}; what it held before stands") from error

    def digest(self) -> bytes:
        """SHA-256 of header and labels."""
        found = hashlib.sha256()
        with self.path.open("rb") as file:
            left = self.end
            while left:
                part = file.read(min(left, 1 << 22))
                found.update(part)
                left -= len(part)
        return found.digest()

    def check_whole(self) -> str:
        """The file's hash. Raises ValueError if it is not complete or its content is not what was written."""
        with self.path.open("rb") as file:
            file.seek(self.end)
            stored = file.read()
        if not stored:
            raise ValueError(f"teacher_cache: {self.path}: not complete; run fastdeit cache-teacher again to go on")
        if stored != self.digest():
            raise ValueError(
                f"teacher_cache: {self.path}: damaged, its content does not have the hash that it ends with"
            )
        return stored.hex()

    def check_range(self) -> None:
        """Raises ValueError that names the first label which is no class."""
        for epoch, row in enumerate(self.labels):
            outside = np.flatnonzero((row < 0) | (row >= self.header["classes"]))
            if len(outside):
                raise ValueError(
                    f"teacher_cache: {self.path}: epoch {epoch}, position {outside[0]}: class {row[outside[0]]}, expected 0 to "
                    f"{self.header['classes'] - 1}"
                )


def check_header(found: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError naming the fields in which a file's labels are of another run."""
    found = {**BEFORE, **found}
    differing = [
        f"{name} ({found.get(name)!r} there, {value!r} now)"
        for name, value in expected.items()
        if found.get(name) != json.loads(json.dumps(value))
    ]
    if differing:
        raise ValueError(f"teacher_cache: {path}: labels of another run: {'; '.join(differing)}")


def teacher_hash(config: Config, num_classes: int) -> str:
    """The hash of the weights of config's teacher, as its checkpoint has them or timm, before they are made fast for a device."""
    if config.teacher_checkpoint is None:
        return weights_hash(create_teacher(config, num_classes, torch.device("cpu")).state_dict())
    from safetensors.torch import load_file

    return weights_hash(load_file(config.teacher_checkpoint))


class CachedTeacher(nn.Module):
    """In the teacher's place: gives the labels of the batch that `seek` has chosen, whatever it is shown.

    Args:
        config: of the run; its teacher_cache is the file.
        data: the run's.
        device: the run's.
        ranks: processes of the run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, not complete, or has the labels of another run.
    """

    def __init__(self, config: Config, data: Data, device: torch.device, ranks: int = 1) -> None:
        super().__init__()
        path = Path(config.teacher_cache)
        self.file = LabelFile(path)
        # timm's pretrained weights are known by the model's name, which the header has as well: no need to load them
        known = self.file.header["teacher_weights"]
        weights = teacher_hash(config, len(data.classes)) if config.teacher_checkpoint is not None else known
        check_header(self.file.header, label_header(config, data, device, ranks, weights), path)
        self.file.check_whole()
        self.file.check_range()
        if self.file.header["epochs"] < config.epochs:
            raise ValueError(
                f"teacher_cache: {path}: has {self.file.header['epochs']} epochs, epochs is {config.epochs}"
            )
        self.device = device
        self.labels: Tensor | None = None  # of the batch
        self.current: Tensor | None = None  # of the part of it that is asked for

    def seek(self, epoch: int, positions: range) -> None:
        """Chooses the batch of an epoch by the positions of its samples. Batches of one size are in the same memory."""
        row = self.file.labels[epoch, _slice(positions)]
        labels = torch.from_numpy(row.astype(np.int64))
        if self.labels is None or len(self.labels) != len(labels):
            self.labels = torch.empty_like(labels, device=self.device)
        self.labels.copy_(labels)
        self.take(slice(None))

    def take(self, part: slice) -> None:
        """Chooses a part of that batch; at first it is the whole."""
        self.current = self.labels[part]

    def forward(self, images: Tensor) -> Tensor:
        """Classes (B,) int64."""
        assert self.current is not None and len(self.current) == len(images)
        return self.current


def partial_file(path: Path) -> Path:
    """Where `cache_labels` keeps what it has until that is the whole of path."""
    return path.with_name(path.name + ".partial")


@torch.no_grad()
def cache_labels(
    config: Config, data: Data, teacher: nn.Module, device: torch.device, path: Path, ranks: int = 1
) -> Iterator[int]:
    """Runs the teacher over every batch of every epoch, and leaves its labels in path. Yields after each batch, the labels so far.

    Work goes into `partial_file`, which becomes path when it is whole. What there is of it is written every STORE_EVERY seconds and
    at the end, whatever ends it; a second call goes on after that.

    Args:
        config: of the run that is to use the labels.
        teacher: in eval mode, on device.
        ranks: processes of that run; one process here computes the batches of them all.

    Raises:
        ValueError: ranks do not divide the batch, a partial file is of another run or another process is at work on it, or the
            teacher's logits are not finite.
        WriteError: the file system refuses.
    """
    if config.batch_size % ranks:
        raise ValueError(f"ranks: expected a divisor of batch_size {config.batch_size}, got {ranks}")
    header = label_header(config, data, device, ranks, teacher_hash(config, len(data.classes)))
    teacher = quickened(teacher, device)
    partial = partial_file(path)
    with claimed(path.parent, path.name + ".lock", f"labels: {path}"):
        remove_temporaries(path.parent, partial.name)
        if partial.exists():
            file = LabelFile(partial)
            check_header(file.header, {**header, "epochs": config.epochs}, partial)
        else:
            file = LabelFile.create(partial, header, config.epochs)
        labeller = _Labeller(config, data, teacher, device, ranks, file)
        for epoch in range(config.epochs):
            yield from labeller.epoch(epoch)
        file.complete()
        try:
            partial.replace(path)
        except OSError as error:
            raise WriteError(f"{path}: cannot be written: {why(error)}; the labels are in {partial}") from error


class _Labeller:
    """The part of `cache_labels` that is one epoch, on a loader that serves those of a phase."""

    def __init__(
        self, config: Config, data: Data, teacher: nn.Module, device: torch.device, ranks: int, file: LabelFile
    ) -> None:
        self.config = config
        self.teacher = teacher
        self.device, self.ranks = device, ranks
        self.file = file
        self.augment = BatchAugmentation(config, len(data.classes), device)
        share = config.batch_size // ranks
        self.share = EpochBatches(len(data.train), share, config.seed, 0, ranks, config.repeated_aug)
        self.updates = len(self.share)
        self.dataset = data.train
        self.current: Config | None = None
        self.loader: TrainLoader | None = None

    def _loader(self, current: Config) -> TrainLoader | tuple[()]:
        """The loader of a phase's images; nothing where all labels of the epoch are there."""
        if self.loader is not None and current != self.current:
            self.loader.close()
            self.loader = None
        if self.loader is None and len(self.share):
            dataset = dataset_at(self.dataset, train_transform, current)
            self.current, self.loader = current, TrainLoader(dataset, self.share, current, self.device)
        return self.loader if self.loader is not None and len(self.share) else ()

    def epoch(self, epoch: int) -> Iterator[int]:
        current = config_at(self.config, epoch)
        row = np.array(self.file.labels[epoch])
        before, stored = epoch * len(row), time.monotonic()
        try:
            for rank in range(self.ranks):
                self.share.rank = rank
                missing = (b for b in range(self.updates) if MISSING in row[_slice(self.share.positions(b))])
                self.share.set_epoch(epoch, next(missing, self.updates))
                for batch, (images, classes) in enumerate(self._loader(current), self.share.first_batch):
                    seed_step(self.config.seed, epoch * self.updates + batch, rank)
                    images, _ = self.augment(images, classes, epoch)
                    images = enlarged(images, self.config.img_size)
                    with autocast(self.config, self.device):  # in the run's parts: not even roundings differ
                        logits = torch.cat([self.teacher(part) for part in images.chunk(current.grad_accum_steps)])
                    if not logits.isfinite().all():
                        raise ValueError(
                            f"teacher_model: logits of {self.config.teacher_model} are not finite in epoch {epoch}, batch {batch}; "
                            "with precision fp32 they may be"
                        )
                    row[_slice(self.share.positions(batch))] = logits.argmax(1).cpu().numpy()
                    if time.monotonic() - stored > STORE_EVERY:
                        self.file.store(epoch, row)
                        stored = time.monotonic()
                    yield before + int((row != MISSING).sum())
        finally:
            if (row != self.file.labels[epoch]).any():
                self.file.store(epoch, row)


def _slice(positions: range) -> slice:
    return slice(positions.start, positions.stop, positions.step)
