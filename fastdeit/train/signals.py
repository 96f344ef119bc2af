"""Signals that ask a run to stop: it goes on to the end of the step, saves, and exits with 128 + the signal's number."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# A scheduler's end of time, its early warning (Slurm's --signal=USR1), and Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """A signal stopped the run; all that it had done is saved, or was before."""

    def __init__(self, number: int, saved: str) -> None:
        self.exit_code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}; {saved}")


class StopRequest:
    """Whether a signal has arrived. A second one acts as it would without this."""

    number: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Takes SIGNALS over for the length of a with statement; does nothing outside the main thread, which has no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def note(number: int, frame: FrameType | None) -> None:
            self.number = number
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in SIGNALS:
            signal.signal(number, note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
