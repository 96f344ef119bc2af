"""What a tuning run is at, on disk: a candidate that hangs, or takes the device down with it, costs itself and is not run again."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

DEVICE_LOST = 70  # exit code of a run that can use the device no more; the same command goes on


class DeviceLostError(RuntimeError):
    """After an illegal access, say, nothing else can run in the process."""


class Journal:
    """Beside a file of results, the candidates that a process did not survive.

    Args:
        file: of the results; made by the caller.
    """

    def __init__(self, file: Path) -> None:
        self.now, self.file = file.with_suffix(".at_work.json"), file.with_suffix(".lost.jsonl")
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.lost = {tuple(json.loads(line)) for line in lines}
        if self.now.exists():  # the process before this one ended there
            self._lose(*json.loads(self.now.read_text(encoding="utf-8")))
            self.now.unlink()

    def _lose(self, case: str, candidate: str) -> None:
        self.lost.add((case, candidate))
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([case, candidate]) + "\n")

    @contextlib.contextmanager
    def at(self, case: str, candidate: str) -> Iterator[None]:
        """The length of a with statement in which a candidate runs. Whatever Python can handle is no loss."""
        self.now.write_text(json.dumps([case, candidate]), encoding="utf-8")
        try:
            yield
        finally:
            self.now.unlink(missing_ok=True)

    def check_device(self, case: str, candidate: str) -> None:
        """Raises DeviceLostError, and notes whose fault it is, if the device can be used no more."""
        if not torch.cuda.is_available():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            self._lose(case, candidate)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DeviceLostError(f"{case}: the device was lost to {candidate}: {reason}") from error
