"""Failures among the processes of a run: which process failed and why, and which one has ended.

A process that fails writes the reason to the launcher's store. To find one that ended without a word, the main process watches all
others and they watch it: by process numbers on the same host, and by a counter that every process increments. Collectives on a GPU
would wait forever for a process that has ended: the watch ends this process where its main thread does not.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fastdeit.train import locks

LOOK, LOST, STUCK = 1.0, 60.0, 20.0  # seconds: between looks; without a sign of life; that the main thread has


MAIN_GONE = "the main process is gone: killed, or out of memory"


class Peers:
    """The watch of one process over the others.

    Args:
        rank, size: of this process and of how many.
        address, port: of the launcher's store.
        name: of this start, the same in all processes.

    Attributes:
        cause: why the run cannot go on, in words, once that is known.
        stands: what is to be said of the saved state if this process must be ended.
    """

    def __init__(self, rank: int, size: int, address: str, port: int, name: str) -> None:
        self.rank = rank
        self.cause: str | None = None
        self.stands: Callable[[], str] = lambda: "nothing of this run is saved"
        self.seen_to = False
        client = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
        self.store = dist.PrefixStore(f"fastdeit/{name}", client)
        self.store.set(f"identity/{rank}", json.dumps(locks.identity()))
        self.others = range(1, size) if rank == 0 else (0,)
        self.counts: dict[int, tuple[int, float]] = {}
        self.identities: dict[int, dict[str, Any]] = {}
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self.thread.start()

    def tell(self, cause: str) -> bool:
        """Reports why this process fails, unless another one has failed before. Returns whether the report reached the others."""
        self.seen_to = True
        try:
            with self.lock:
                said = self.store.compare_set("failed", "", f"rank {self.rank}: {cause}").decode()
            self.cause = self.cause or said
        except RuntimeError:
            return False
        return True

    def cause_within(self, seconds: float) -> str | None:
        """Why the run cannot go on, if that is known within so many seconds."""
        self.seen_to = True
        end = time.monotonic() + seconds
        while self.cause is None and time.monotonic() < end:
            time.sleep(0.1)
        return self.cause

    @property
    def main_knows(self) -> bool:
        """Whether the main process runs and has the report of why the run cannot go on, so that it prints it."""
        return self.cause is not None and self.cause != MAIN_GONE

    def end(self) -> None:
        """This process leaves as it should."""
        self.seen_to = True
        self.ended.set()
        self.thread.join(2 * LOOK)
        with contextlib.suppress(RuntimeError):  # of a store whose process has left before
            self.store.set(f"left/{self.rank}", "")

    def _watch(self) -> None:
        noted = None
        while not self.ended.wait(LOOK):
            if self.cause is None:
                try:
                    with self.lock:
                        self.cause = self._look()
                except RuntimeError:
                    self.cause = MAIN_GONE if self.rank else None
            if self.cause is None or self.seen_to:
                continue
            noted = noted or time.monotonic()
            if time.monotonic() - noted > STUCK and not self.seen_to:
                if self.rank == 0 or self.cause == MAIN_GONE:
                    print(f"fastdeit train: {self.cause}. {self.stands()}", file=sys.stderr, flush=True)
                leave(1)

    def _look(self) -> str | None:
        """Why the run cannot go on, if it cannot."""
        self.store.add(f"count/{self.rank}", 1)
        if self.store.check(["failed"]):
            return self.store.get("failed").decode()
        for other in self.others:
            if self._gone(other) and not self.store.check([f"left/{other}"]):
                process = locks.described(self.identities.get(other, {})).partition(" (")[0]
                return f"rank {other} is gone ({process}): killed, or out of memory" if other else MAIN_GONE
        return None

    def _gone(self, other: int) -> bool:
        if other not in self.identities and self.store.check([f"identity/{other}"]):
            self.identities[other] = json.loads(self.store.get(f"identity/{other}"))
        count, now = self.store.add(f"count/{other}", 0), time.monotonic()
        if self.counts.get(other, (None, now))[0] != count:
            self.counts[other] = count, now
        holder = self.identities.get(other)
        if holder is not None and locks.same_place(holder):
            return not locks.process_lives(holder["pid"], holder["started"])
        return now - self.counts[other][1] > LOST


def start(rank: int, size: int, address: str, port: int) -> Peers:
    """The watch of this process, in all processes at the same time, when they are connected."""
    names = [uuid.uuid4().hex]
    dist.broadcast_object_list(names)
    return Peers(rank, size, address, port, names[0])


def leave(code: int) -> None:
    """Ends this process without the interpreter's end, in which threads of a process group have aborted or waited for ever."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
