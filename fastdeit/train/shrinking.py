"""A data set made smaller once, so that decoding it costs less in every epoch: `fastdeit shrink-data`.

Training pixels change by it (a crop of a shrunk image is not a shrunk crop), so it is opt-in, and validation images are
copied unchanged unless an option says otherwise.
"""

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from PIL import Image

from fastdeit.train.files import TEMPORARY, WriteError, why, write_atomically
from fastdeit.train.image_files import MAX_MEGAPIXELS, UnreadableImageError, read_image
from fastdeit.train.image_folders import read_splits
from fastdeit.train.locks import claimed

NOTE = "shrink-data.json"  # beside train/ and val/: how they were made
JPEG = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Shrinking:
    """How images are made smaller.

    Attributes:
        short_side: pixels of the shorter side; an image that has no more is copied as it is.
        quality: of the JPEG files, 1 to 100.
        val: shrink validation images too.
        max_megapixels: a larger image counts as unreadable.
    """

    short_side: int = 256
    quality: int = 90
    val: bool = False
    max_megapixels: float = MAX_MEGAPIXELS

    def __post_init__(self) -> None:
        if self.short_side < 1:
            raise ValueError(f"short_side: expected at least 1 pixel, got {self.short_side}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: expected 1 to 100, got {self.quality}")
        if not self.max_megapixels > 0:
            raise ValueError(f"max_megapixels: expected more than 0, got {self.max_megapixels}")

    def note(self) -> dict[str, int | bool]:
        """What the pixels depend on."""
        return {"short_side": self.short_side, "quality": self.quality, "val": self.val}


@dataclass
class Report:
    """What became of the images: counts by "shrunk", "copied" and "kept" (from a call before), bytes, and the unreadable; and how
    many there are."""

    total: int
    counts: Counter[str] = field(default_factory=Counter)
    bytes_before: int = 0
    bytes_after: int = 0
    unreadable: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        return sum(self.counts.values()) + len(self.unreadable)

    def __str__(self) -> str:
        counts = ", ".join(f"{self.counts[kind]} {kind}" for kind in ("shrunk", "copied", "kept") if self.counts[kind])
        share = f", {100 * self.bytes_after / self.bytes_before:.0f} %" if self.bytes_before else ""
        lost = f"; {len(self.unreadable)} unreadable ones were left out" if self.unreadable else ""
        return f"{counts or 'no image'}; {_megabytes(self.bytes_before)} became {_megabytes(self.bytes_after)}{share}{lost}"


@dataclass(frozen=True)
class _Task:
    source: Path
    copy: Path  # where it goes as it is
    shrink: bool

    @property
    def shrunk(self) -> Path:
        """Where it goes as a smaller JPEG file."""
        return self.copy if self.copy.suffix.lower() in JPEG else self.copy.with_name(f"{self.copy.name}.jpg")


def shrink(source: Path, target: Path, options: Shrinking, threads: int) -> Iterator[Report]:
    """Fills target/train and target/val from source's, and yields the report so far after each image.

    An image that is there with the time of its source is kept, so that a call that was interrupted can be repeated.

    Args:
        source, target: folders with train/CLASS/ and val/CLASS/; target may be new.
        threads: that decode and encode at the same time.

    Raises:
        ValueError: source is not such a folder, target lies in it or the other way round, or target was made by other options.
        WriteError: target cannot be written; what is there stands.
        LockedError: another call is at work in target.
    """
    tasks = list(_tasks(source, target, options))
    _check_target(target, options)
    report = Report(len(tasks))
    remaining = iter(tasks)
    with claimed(target, what=f"DST: {target}"), ThreadPoolExecutor(threads) as pool:
        write_atomically(target / NOTE, lambda file: file.write(json.dumps(options.note(), indent=2).encode()))
        for left in target.glob(f"*/**/*{TEMPORARY}"):  # by a call that was killed
            left.unlink(missing_ok=True)
        running: dict[Future, _Task] = {}
        try:
            while True:
                for task in islice(remaining, 4 * threads - len(running)):
                    running[pool.submit(_made, task, options)] = task
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    _note_result(report, running.pop(future), future)
                    yield report
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _tasks(source: Path, target: Path, options: Shrinking) -> Iterator[_Task]:
    real, wanted = source.resolve(), target.resolve()
    if real == wanted or real in wanted.parents or wanted in real.parents:
        raise ValueError(f"DST: {target} and {source} must not lie in one another")
    taken: dict[Path, Path] = {}
    for split in read_splits(source):
        shrinks = split.root.name == "train" or options.val
        for path, _ in split.samples:
            file = Path(path)
            task = _Task(file, target / file.relative_to(source), shrinks)
            if task.shrunk in taken:
                raise ValueError(
                    f"SRC: {taken[task.shrunk]} and {file} might both become {task.shrunk}; rename one of them"
                )
            taken[task.shrunk] = file
            yield task


def _check_target(target: Path, options: Shrinking) -> None:
    """Raises ValueError if target was made with other options, or something else is in it."""
    note = target / NOTE
    try:
        if note.exists():
            found = _read_note(note)
            if found != options.note():
                raise ValueError(f"DST: {target} was made with {_told(found)}, not with {_told(options.note())}")
            return
        if target.exists() and any(target.iterdir()):
            raise ValueError(f"DST: {target} is not empty and has no {NOTE}; expected a new folder")
    except OSError as error:
        raise WriteError(f"{target}: cannot be read: {why(error)}") from error


def _read_note(note: Path) -> dict:
    try:
        found = json.loads(note.read_text())
    except ValueError as error:
        raise ValueError(f"DST: {note} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"DST: {note} has no options; expected an object, got {found!r}")
    return found


def _told(options: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _note_result(report: Report, task: _Task, future: Future) -> None:
    try:
        kind, path = future.result()
    except UnreadableImageError as error:
        report.unreadable.append(str(error))
        return
    report.counts[kind] += 1
    report.bytes_before += task.source.stat().st_size
    report.bytes_after += path.stat().st_size


def _made(task: _Task, options: Shrinking) -> tuple[str, Path]:
    """Makes the image unless it is there; what was done, and where it is."""
    try:
        source = task.source.stat()
    except OSError as error:
        raise UnreadableImageError(f"{task.source}: cannot be read: {error.strerror}") from error
    for path in (task.copy, task.shrunk):
        if path.exists() and path.stat().st_mtime_ns == source.st_mtime_ns:
            return "kept", path
    content = _shrunk(task.source, options) if task.shrink else None
    path = task.copy if content is None else task.shrunk
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with task.source.open("rb") as file:
            write_atomically(path, lambda out: out.write(content) if content else shutil.copyfileobj(file, out))
        os.utime(path, ns=(source.st_atime_ns, source.st_mtime_ns))
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {why(error)}") from error
    return "copied" if content is None else "shrunk", path


def _shrunk(path: Path, options: Shrinking) -> bytes | None:
    """The smaller image as a JPEG file; None where the shorter side is no longer than asked for.

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    image = read_image(path, None, options.max_megapixels)
    scale = options.short_side / min(image.size)
    if scale >= 1:
        return None
    width, height = (max(options.short_side, round(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=options.quality)
    return buffer.getvalue()


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
