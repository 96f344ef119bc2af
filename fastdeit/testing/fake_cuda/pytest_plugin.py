"""A pytest plugin that runs tests on fake devices, in a child process that is started at the first of them.

Where there is no GPU: tests marked `gpu` that are not also marked `numeric`, since nothing there has a result. Everywhere: tests
marked `fake_device`. The child is pytest with this plugin, collects the same files and runs the tests that it is asked for, one at
a time; a test fails there if something was refused in it that `@pytest.mark.fake_device(refusals=True)` does not announce.
"""

import tempfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple

import pytest
import torch

from fastdeit.testing.fake_cuda import errors, start_python, why_unavailable

_SECONDS = 600  # for a test, the child's start included
_DEVICES = 2
_OPTION = "--run-on-fake-device"


class Outcome(NamedTuple):
    outcome: str  # passed, skipped or failed
    text: str


def pytest_addoption(parser):
    parser.addoption(
        _OPTION, type=int, metavar="FD", help="of the child process: serve the requests of this connection"
    )


# ---- in the parent


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if config.getoption(_OPTION) is not None:
        items[:] = [item for item in items if _runs_here(item, with_gpu=False)]
        return
    with_gpu = torch.cuda.is_available()
    chosen = [item for item in items if _runs_here(item, with_gpu)]
    if chosen:
        child = _Child(config, sorted({str(item.path) for item in chosen}))
        stand_ins = {item: _OnFakeDevice.from_parent(item.parent, name=item.name, child=child) for item in chosen}
        items[:] = [stand_ins.get(item, item) for item in items]


def _runs_here(item, with_gpu: bool) -> bool:
    if item.get_closest_marker("fake_device"):
        return True
    return not with_gpu and bool(item.get_closest_marker("gpu")) and not item.get_closest_marker("numeric")


class _Failed(Exception):
    """What the child reported of a failed test."""


class _OnFakeDevice(pytest.Item):
    """Replaces a collected test and reports its results in the child."""

    def __init__(self, *, child, **options):
        super().__init__(**options)
        self.child = child

    def runtest(self):
        if reason := why_unavailable():
            pytest.skip(f"the fake CUDA runtime is not available: {reason}")
        outcome, text = self.child.run(self.nodeid)
        if outcome == "skipped":
            pytest.skip(text)
        if outcome == "failed":
            raise _Failed(text)

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if isinstance(excinfo.value, _Failed) else super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, 0, self.nodeid  # with a line, which pytest wants where a mark skips the test


class _Child:
    def __init__(self, config, files: list[str]) -> None:
        self._config, self._files = config, files
        self._process = None

    def run(self, nodeid: str) -> Outcome:
        if self._process is None:
            self._start()
        try:
            self._connection.send(nodeid)
            if self._connection.poll(_SECONDS):
                return self._connection.recv()
            problem = f"no answer within {_SECONDS} s"
        except (EOFError, OSError):
            problem = "the process ended"
        self.stop()
        return Outcome("failed", f"on the fake device: {problem}; its output:\n{self._output()}")

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        self._connection, theirs = Pipe()
        options = ("-p", "no:xdist", "-p", "no:cacheprovider", f"{_OPTION}={theirs.fileno()}")
        self._process = start_python(
            "-m",
            "pytest",
            *options,
            *self._files,
            devices=_DEVICES,
            cwd=self._config.rootpath,
            pass_fds=(theirs.fileno(),),
            stdout=self._log,
            stderr=self._log,
        )
        theirs.close()
        self._config.add_cleanup(self.stop)

    def stop(self) -> None:
        if self._process is not None:
            self._connection.close()  # on which the child ends by itself, unless it hangs
            try:
                self._process.wait(30)
            except Exception:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _output(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")


# ---- in the child


class _Reports:
    """Sums up the reports of one test: its setup, call and teardown."""

    def __init__(self) -> None:
        self.outcome = Outcome("passed", "")

    def pytest_runtest_logreport(self, report):
        if self.outcome.outcome == "failed":
            return  # what failed first
        if report.failed:
            output = [f"{title}\n{text}" for title, text in report.sections if " log " not in title]
            self.outcome = Outcome("failed", "\n".join([report.longreprtext, *output]))
        elif report.skipped:
            self.outcome = Outcome("skipped", report.longrepr[2].removeprefix("Skipped: "))


def pytest_runtestloop(session):
    descriptor = session.config.getoption(_OPTION)
    if descriptor is None:
        return None
    items = {item.nodeid: item for item in session.items}
    with Connection(descriptor) as connection:
        while True:
            try:
                nodeid = connection.recv()
            except EOFError:
                return True
            connection.send(_run(items.get(nodeid), session.config))


def _run(item, config) -> Outcome:
    if item is None:
        return Outcome("failed", "the process on the fake device did not collect this test")
    reports = _Reports()
    config.pluginmanager.register(reports)
    before = len(errors())
    try:
        config.hook.pytest_runtest_protocol(item=item, nextitem=None)
    finally:
        config.pluginmanager.unregister(reports)
    refused = errors()[before:]
    marker = item.get_closest_marker("fake_device")
    if refused and reports.outcome.outcome == "passed" and not (marker and marker.kwargs.get("refusals")):
        return Outcome("failed", "the fake CUDA runtime refused:\n" + "\n".join(refused))
    return reports.outcome
