"""One run in a folder at a time: a lock file that names its holder, with a heartbeat for processes on other hosts.

On this host a holder is looked up by process number and start time. Elsewhere the file's time of change, which the holder renews
every BEAT seconds, is compared with that of a file written now: the file server's clock alone counts. Taking a lock that a
killed process left, and losing one while asleep for longer than EXPIRED, leave one holder: `check` finds out before anything is
written.
"""

import contextlib
import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdeit.train.files import WITHOUT_LINKS, WriteError, temporary_name, why

LOCK = "run.lock"
BEAT, EXPIRED = 20.0, 180.0  # seconds


class LockedError(ValueError):
    """Another process is at work here."""


class Lock:
    """The claim of this process on what `path` stands for.

    Args:
        path: of the file, in a folder that exists.
        what: is locked, for errors.

    Raises:
        LockedError: a process that runs, or may run, holds it.
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        self.token = uuid.uuid4().hex
        self._claim()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LockedError if the claim was lost: the file is gone, or another process's."""
        holder = read_holder(self.path)
        if holder.get("token") == self.token:
            return
        if not self.path.parent.is_dir():
            raise WriteError(f"{self.path.parent}: the folder is gone, or cannot be reached any more")
        by = f"{described(holder)} has it" if holder else "the file is gone"
        raise LockedError(f"{self.what} is no longer this process's: {self.path}: {by}")

    def release(self) -> None:
        """Gives the claim up. Harmless where it was lost, or the folder with it."""
        self._released.set()
        self._thread.join()
        if read_holder(self.path).get("token") == self.token:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _claim(self) -> None:
        own = self.path.with_name(temporary_name(self.path.name))
        try:
            own.write_text(
                json.dumps({"token": self.token, "since": time.strftime("%Y-%m-%d %H:%M:%S"), **identity()}) + "\n"
            )
            while not _linked(own, self.path):
                holder = read_holder(self.path)
                if alive(holder, self.path):
                    raise LockedError(
                        f"{self.what} is in use by {described(holder)}; wait for it, or stop it. If it is gone for certain, remove "
                        f"{self.path}"
                    )
                self._remove(holder)
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written: {why(error)}") from error
        finally:
            with contextlib.suppress(OSError):
                own.unlink()

    def _remove(self, holder: dict[str, Any]) -> None:
        """Removes the lock of a holder that is gone, unless another process was faster, whose own lock may be there by now."""
        try:
            with self.path.open("r+b") as file:
                with contextlib.suppress(OSError):  # where the file system cannot, the comparison alone has to do
                    fcntl.flock(file, fcntl.LOCK_EX)
                still_there = os.fstat(file.fileno()).st_ino == self.path.stat().st_ino
                if still_there and read_holder(self.path).get("token") == holder.get("token"):
                    self.path.unlink()
        except FileNotFoundError:
            return

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):  # `check` tells of it, when something is to be written
                if read_holder(self.path).get("token") == self.token:
                    os.utime(self.path)


@contextlib.contextmanager
def claimed(folder: Path, name: str = LOCK, what: str | None = None) -> Iterator[Lock]:
    """The claim on a run's folder, which is made if need be, and removed again if nothing came into it.

    Args:
        name: of the lock's file in it.
        what: is claimed, for errors; by default the folder.

    Raises:
        LockedError, WriteError: as `Lock`.
    """
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{folder}: cannot be made: {why(error)}") from error
    lock = Lock(folder / name, what or f"output: {folder}")
    try:
        yield lock
    finally:
        lock.release()
        for made in missing:
            with contextlib.suppress(OSError):  # what holds something stays
                made.rmdir()


def identity() -> dict[str, Any]:
    """The identity of this process: host, boot, namespace of process numbers, number and start."""
    pid = os.getpid()
    state = _state_of(pid)
    return {**_place(), "pid": pid, "started": int(state[19]) if state else None}  # in ticks since boot


def alive(holder: dict[str, Any], path: Path) -> bool:
    """Whether the process that a lock names lives; of one on another host, whether its heartbeat is younger than EXPIRED."""
    if same_place(holder):
        return process_lives(holder["pid"], holder.get("started"))
    probe = path.with_name(temporary_name(path.name + ".now"))
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime < EXPIRED
    except FileNotFoundError:  # released in the meantime
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def same_place(holder: dict[str, Any]) -> bool:
    """Whether the process of an `identity` can be asked for here."""
    return all(holder.get(name) == value for name, value in _place().items())


def process_lives(pid: int, started: int | None) -> bool:
    """Whether a process of this host with that number lives and is the one that started then (None: not known)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    state = _state_of(pid)
    return state is None or (state[0] not in "ZX" and started in (None, int(state[19])))


def described(holder: dict[str, Any]) -> str:
    """The holder in words, for errors."""
    if not holder:
        return "a process that its lock does not name"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"


def read_holder(path: Path) -> dict[str, Any]:
    """The content of a lock's file; nothing if there is none, or if it is no lock."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else {}


def _linked(path: Path, name: Path) -> bool:
    """Gives a file another name, unless something has it: in one step, on file servers as well."""
    try:
        os.link(path, name)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
        try:
            with name.open("xb") as file:
                file.write(path.read_bytes())
        except FileExistsError:
            return False
    return True


def _place() -> dict[str, Any]:
    """Where process numbers mean the same processes."""
    return {"host": platform.node(), "boot": _read("/proc/sys/kernel/random/boot_id"), "namespace": _namespace()}


def _namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _state_of(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None where the system does not tell, or there is no such process."""
    text = _read(f"/proc/{pid}/stat")
    return text.rpartition(")")[2].split() if text else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
