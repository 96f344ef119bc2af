"""Starts a Python process in which torch and Triton see fake devices."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastdeit.testing.fake_cuda import library

_IMPORTED_FROM = Path(__file__).absolute().parents[3]  # so that the process imports the same fastdeit
MAX_DEVICES = 16


def start_python(
    *arguments: str, devices: int = 1, capability: tuple[int, int] = (9, 0), **options: Any
) -> subprocess.Popen:
    """Starts `python *arguments`, with kernels compiled and not interpreted.

    Args:
        devices: how many fake GPUs there are, 1 to 16.
        capability: their compute capability.
        options: of subprocess.Popen, but for env.

    Raises:
        ValueError: devices or capability is out of range.
        OSError: the fake runtime is not available here.
    """
    if not 1 <= devices <= MAX_DEVICES:
        raise ValueError(f"devices is {devices}, expected 1 to {MAX_DEVICES}")
    major, minor = capability
    if major < 1 or not 0 <= minor <= 9:
        raise ValueError(
            f"capability is {capability}, expected a major version and a minor one of one digit, as (9, 0)"
        )
    folder = library.build()
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={
            **os.environ,
            "FAKE_CUDA_DEVICES": str(devices),
            "FAKE_CUDA_CAPABILITY": f"{major}{minor}",
            "LD_PRELOAD": f"{folder / library.NAME}:{os.environ.get('LD_PRELOAD', '')}",
            "TRITON_LIBCUDA_PATH": str(folder),
            "TRITON_INTERPRET": "0",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices))),
            "PYTHONPATH": f"{_IMPORTED_FROM}:{os.environ.get('PYTHONPATH', '')}",
        },
        **options,
    )


def run_python(
    *arguments: str, devices: int = 1, capability: tuple[int, int] = (9, 0), timeout: float = 600
) -> subprocess.CompletedProcess:
    """Runs `python *arguments` as `start_python` does and returns the finished process with its output as text.

    Raises:
        subprocess.TimeoutExpired: it took longer than timeout, in seconds, and was killed.
        ValueError, OSError: as start_python.
    """
    pipe = subprocess.PIPE
    process = start_python(*arguments, devices=devices, capability=capability, stdout=pipe, stderr=pipe, text=True)
    with process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
