"""Signals that ask a run to stop: it goes on to the end of the step, saves, and exits with 128 + the signal's number.

A scheduler signals every process of a job, and then the process group, where there is one. Repeated signals therefore
count as one (a later Ctrl-C excepted), and the processes that load data ignore signals: their parent ends them.
"""

import contextlib
import ctypes
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

# A scheduler's end of time, its early warning (Slurm's --signal=USR1), Ctrl-C, and the end of a terminal.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends
IMPATIENT = 1.0  # seconds after which another Ctrl-C ends a run at once


class Stopped(Exception):
    """A signal stopped the run; all that it had done is saved, or was before."""

    def __init__(self, number: int, saved: str) -> None:
        self.exit_code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}; {saved}")


class StopRequest:
    """Whether a signal has arrived, and which was the first."""

    number: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Takes SIGNALS over for the length of a with statement, but for those that are ignored, as under nohup.

        Ctrl-C for the second time, IMPATIENT seconds or more after the first signal, raises KeyboardInterrupt; other signals that
        come again change nothing. Does nothing outside the main thread, which has no signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        taken = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for number in taken:
            signal.signal(number, self._note)
        try:
            yield self
        finally:
            for number, handler in taken.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since >= IMPATIENT:
            raise KeyboardInterrupt


@contextlib.contextmanager
def held() -> Iterator[None]:
    """SIGNALS wait for the end of a with statement. A process that is started in it is to call `ignore_in_worker`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_in_worker(worker: int = 0) -> None:
    """To be called in a process that loads data, before anything else (DataLoader's worker_init_fn): its parent heeds SIGNALS.

    Where the system can, it ends with its parent, which may be killed without a chance to end it.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.excepthook = _report_in_worker
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _report_in_worker(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints no traceback of a lost connection: the parent was killed while it took a batch over, and this process ends with it."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
