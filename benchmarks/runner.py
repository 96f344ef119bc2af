"""The process that measures, and the one that watches it: a crash or a hang costs one case, and time limits hold."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fastdeit.benchmarks.results_folder import Folder

SUITES = Path(__file__).parent / "suites"
DEVICE_LOST = 70  # exit code of a process that wrote its case and can use the device no more
_GRACE_SECONDS = (
    20  # for what is bounded inside the process to end by itself: the last turns of large models take a while
)
_ENDS = {0: 0, 1: 1, 5: 0}  # pytest's exit codes of a run that went through: passed, with failures, nothing to do


@dataclass(frozen=True)
class Limits:
    """Seconds: for everything, for a case, for setting up a candidate (compiling, above all)."""

    total: float
    case: float
    candidate: float


def measure(folder: Folder, suites: list[str], limits: Limits, options: list[str]) -> int:
    """Measures the cases that the folder does not have, in a process that is started again after a case that ends it.

    Returns pytest's exit code: 0, or 1 if a case failed.

    Raises:
        RuntimeError: the process failed outside of any case.
    """
    end = time.monotonic() + limits.total
    code = 0
    while True:
        left = end - time.monotonic()
        if left <= 0:
            return code
        child = subprocess.Popen(_command(folder, suites, limits, left, options))
        try:
            killed = _watch(child, folder, limits, end)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if killed is None and child.returncode in _ENDS:
            return max(code, _ENDS[child.returncode])
        at_work = folder.at_work()
        if at_work is None:
            if (
                killed is None and child.returncode == 70
            ):  # the case itself is written, and the next needs a new process
                code = 1
                continue
            raise RuntimeError(
                f"the measuring process {killed or f'ended with {child.returncode}'}, at no case; see above"
            )
        case, seconds = at_work
        ended = f"ended with {child.returncode}" if killed is None else killed
        if time.monotonic() < end:  # else the case was only cut off
            folder.write_failure(case, f"failed: the process {ended} after {seconds:.0f} s")
            code = 1
        print(f"{case}: the process {ended}", flush=True)
        folder.ended()


def _watch(child: subprocess.Popen, folder: Folder, limits: Limits, end: float) -> str | None:
    """Waits for the process; says so if it had to be killed."""
    while True:
        try:
            child.wait(timeout=0.5)
            return None
        except subprocess.TimeoutExpired:
            at_work = folder.at_work()
            if time.monotonic() > end + _GRACE_SECONDS or (
                at_work is not None and at_work[1] > limits.case + _GRACE_SECONDS
            ):
                child.kill()
                child.wait()
                return "was killed: it did not keep its time"


def _command(folder: Folder, suites: list[str], limits: Limits, left: float, options: list[str]) -> list[str]:
    files = [str(SUITES / f"test_{name}.py") for name in suites]
    plain = ["--import-mode=importlib", f"--rootdir={SUITES}", "-p", "no:cacheprovider", "-q", "--no-header"]
    plain += ["--benchmark-quiet"]  # its table times the measuring itself
    bounds = [f"--seconds={left}", f"--case-seconds={limits.case}", f"--candidate-seconds={limits.candidate}"]
    return [sys.executable, "-m", "pytest", *plain, f"--out={folder.directory}", *bounds, *options, *files]
