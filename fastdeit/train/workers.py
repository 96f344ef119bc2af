"""The processes of a DataLoader: they ignore signals to the run, an error names one that dies, and none outlives the run."""

import atexit
import contextlib
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from fastdeit.train.signals import held

# With their numbers in their loaders.
_alive: "weakref.WeakKeyDictionary[BaseProcess, int]" = weakref.WeakKeyDictionary()


class WorkerDiedError(ChildProcessError):
    """A process that loads data is gone."""


def start(make_iterator: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """What `iter` of a DataLoader gives; its workers, whose worker_init_fn is `ignore_in_worker`, are known to `end_workers`.

    Raises WorkerDiedError as `batches_of`.
    """
    with _naming_the_dead(), held():
        iterator = make_iterator()
    _alive.update({worker: number for number, worker in enumerate(getattr(iterator, "_workers", ()))})
    # multiprocessing and PyTorch end workers by SIGTERM, which these ignore, and then wait for them. What is registered last runs
    # first.
    atexit.unregister(_end_at_exit)
    atexit.register(_end_at_exit, os.getpid())
    _defer_child_errors()
    return iterator


def batches_of(iterator: Iterator[Any]) -> Iterator[Any]:
    """The batches of what `start` gave. Raises WorkerDiedError that names a worker and what ended it."""
    while True:
        try:
            with _naming_the_dead(), _waiting():
                batch = next(iterator)
        except StopIteration:
            return
        yield batch


@contextlib.contextmanager
def _naming_the_dead() -> Iterator[None]:
    """Makes of PyTorch's error of a dead worker a WorkerDiedError. The worker may be another loader's: PyTorch raises for any when
    it is notified of an end, so that an evaluation may notice one that loaded training images."""
    try:
        yield
    except RuntimeError as error:
        causes = [cause for worker, number in list(_alive.items()) if (cause := _end_of(number, worker))]
        if not causes:
            raise
        raise WorkerDiedError("; ".join(causes)) from error


def end_workers() -> None:
    """Kills what workers there are. They hold nothing that could be lost, and may be stuck in a read."""
    for worker in list(_alive):
        with contextlib.suppress(ValueError):  # closed
            worker.kill()
            worker.join()
    _alive.clear()


def _end_at_exit(process: int) -> None:
    if os.getpid() == process:  # a process that was forked from this one has their handles too
        end_workers()


def _end_of(number: int, worker: BaseProcess) -> str | None:
    code = worker.exitcode
    if not code:  # alive, or at its end as it should be
        return None
    if code > 0:
        return f"worker {number} of the loader (process {worker.pid}) ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", as the kernel does where memory runs out (fewer workers need less)" if -code == signal.SIGKILL else ""
    return f"worker {number} of the loader (process {worker.pid}) was killed by {name}{hint}"


_listening = False  # whether the main thread waits for a batch, so that an error leaves nothing half done


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    global _listening
    _listening = threading.current_thread() is threading.main_thread()
    try:
        yield
    finally:
        _listening = False


def _defer_child_errors() -> None:
    """Lets PyTorch's handler of SIGCHLD raise for a dead worker only while the main thread waits for a batch. By default it raises
    anywhere, also in the middle of an update. The next wait finds the worker dead in any case."""
    if threading.current_thread() is not threading.main_thread():
        return
    theirs = signal.getsignal(signal.SIGCHLD)
    if not callable(theirs) or getattr(theirs, "deferred", False):
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if _listening:
            theirs(number, frame)

    handler.deferred = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGCHLD, handler)
