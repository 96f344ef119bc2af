"""Signals are noted and no more, by the run alone, however often they come."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastdeit.train import signals
from fastdeit.train.signals import SIGNALS, Stopped, StopRequest


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for number in SIGNALS:  # in the background of a script, or under nohup, some are ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_others_change_nothing(number):
    before = signal.getsignal(number)
    with StopRequest().listening() as stop:
        assert stop.number is None
        os.kill(os.getpid(), number)
        for other in SIGNALS:  # at once, as from a scheduler that signals the processes and their group
            os.kill(os.getpid(), other)
            os.kill(os.getpid(), number)
        assert stop.number == number
    assert signal.getsignal(number) == before


def test_ctrl_c_for_the_second_time_ends_a_run_at_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with StopRequest().listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] = signals.IMPATIENT
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert stop.number == signal.SIGTERM


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_ignored_stays_ignored(number):
    """SIGHUP under nohup; SIGINT of a job that a script has put into the background."""
    signal.signal(number, signal.SIG_IGN)
    with StopRequest().listening() as stop:
        assert signal.getsignal(number) == signal.SIG_IGN
        os.kill(os.getpid(), number)
        assert stop.number is None


def test_other_threads_listen_to_nothing():
    seen = []

    def listen():
        with StopRequest().listening() as stop:
            seen.append((stop.number, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=listen)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def alone(code):
    """What a process without other threads, which would take signals, prints."""
    start = "import os, signal\nfrom signals import SIGNALS, StopRequest, held, ignore_in_worker\n"
    folder = Path(signals.__file__).parent  # without PyTorch, which takes seconds
    return subprocess.run(
        [sys.executable, "-c", start + code], cwd=folder, capture_output=True, text=True
    ).stdout.split()


def test_signals_wait_while_they_are_held():
    code = (
        "with StopRequest().listening() as stop:\n    with held():\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print(stop.number)\n    print(stop.number, signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set())"
    )
    assert alone(code) == ["None", str(int(signal.SIGTERM)), "True"]


def test_a_worker_ignores_what_came_before_it_was_ready():
    code = (
        "with held():\n    [os.kill(os.getpid(), number) for number in SIGNALS]\n    ignore_in_worker()\n"
        "[os.kill(os.getpid(), number) for number in SIGNALS]\n"
        "print(signal.sigpending() == set(), signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set())"
    )
    assert alone(code) == ["True", "True"]


def test_a_worker_whose_parent_was_killed_prints_no_traceback():
    """By the thread of multiprocessing that hands its memory over."""
    code = (
        "import sys\nsys.stderr = sys.stdout\nignore_in_worker()\n"
        "for error in (ConnectionResetError(), EOFError(), ValueError('odd')):\n    sys.excepthook(type(error), error, None)"
    )
    assert alone(code) == ["ValueError:", "odd"]


def test_the_exit_code_is_that_of_a_shell():
    assert Stopped(signal.SIGTERM, "all is saved").exit_code == 143
    assert str(Stopped(signal.SIGUSR1, "all is saved")) == "stopped by SIGUSR1; all is saved"


def test_a_worker_ends_with_its_parent():
    code = (
        "import time\nreading, writing = os.pipe()\nparent = os.fork()\nif parent == 0:\n    if os.fork() == 0:\n"
        "        ignore_in_worker()\n        os.write(writing, b'ready')\n        time.sleep(60)\n    time.sleep(60)\n"
        "os.close(writing)\nos.read(reading, 5)\nbegun = time.monotonic()\nos.kill(parent, signal.SIGKILL)\n"
        "print(os.read(reading, 1) == b'', time.monotonic() - begun < 30)"  # the last that could write is gone
    )
    assert alone(code) == ["True", "True"]


def test_a_process_that_exits_ends_its_workers():
    """Which Python asks by SIGTERM to end, and waits for."""
    code = (
        "from fastdeit.train.error_passing import ErrorPassingLoader\n"
        "batches = iter(ErrorPassingLoader(list(range(9)), num_workers=1, persistent_workers=True))\n"
        "print(next(batches), flush=True)\nraise ValueError('an error that keeps the loader')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "tensor([0])\n" and done.returncode == 1 and done.stderr.endswith("keeps the loader\n")
