"""Atomic writes of files: under a temporary name of this process, then renamed. Errors say which file holds what."""

import contextlib
import errno
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp"  # ends the name of every file that is not whole yet
# Of os.link, on file systems that give a file one name only.
WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class WriteError(OSError):
    """Something could not be written. The message names the path, the reason and what stands."""


def temporary_name(name: str) -> str:
    """A name beside `name` that no other process uses, on this host or another."""
    return f"{name}.{platform.node()}.{os.getpid()}{TEMPORARY}"


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], keep_as: Path | None = None) -> None:
    """Writes to a temporary name beside path, then renames: whatever happens, path holds the old content or the new.

    Args:
        write: is given the open file.
        keep_as: where the old content goes, when the new one is on disk.

    Raises:
        WriteError: the file system refuses.
    """
    temporary = path.with_name(temporary_name(path.name))
    noted = _Noting()
    try:
        try:
            with temporary.open("wb") as file:
                noted.file = file
                write(noted)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            if keep_as is not None and path.exists():
                _keep(path, keep_as)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error
    except RuntimeError as error:  # torch.save's, after one that the file had raised
        if noted.error is None:
            raise
        raise _write_error(path, noted.error) from error


def why(error: OSError) -> str:
    """The reason in words."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file is larger than the file system or the limit (ulimit -f) allows",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "no permission",
        errno.EPERM: "no permission",
        errno.ENOENT: "the folder is gone",
        errno.ENOTDIR: "a part of the path is a file",
    }
    return reasons.get(error.errno or 0) or error.strerror or str(error)


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """Removes what killed processes left in folder of files called `name`, for one who alone writes them."""
    for path in folder.glob(f"{name}.*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            path.unlink()


class _Noting:
    """A file that records the error of a write, since its caller may raise another error instead."""

    def __init__(self) -> None:
        self.file: Any = None
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write_error(path: Path, error: OSError) -> WriteError:
    stands = ""
    with contextlib.suppress(OSError):
        stands = "; the former one stands" if path.exists() else ""
    return WriteError(f"{path}: cannot be written: {why(error)}{stands}")


def _keep(path: Path, name: Path) -> None:
    """Gives path's content the other name as well, replacing what has it; path itself is there at every moment, where the file
    system knows links."""
    link = name.with_name(temporary_name(name.name))
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        link.replace(name)
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
        path.replace(name)


def _sync_folder(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
