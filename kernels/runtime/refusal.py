"""Kernels that the compiler or the driver refuses, before anything has run."""

import subprocess
from typing import Any

import torch
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError

# What the driver says after a kernel has run and done harm, or when memory is short. No other kernel would fare better.
_FAULTS = (
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "illegal address",
    "invalid program counter",
    "unspecified launch failure",
    "hardware stack error",
    "device-side assert",
    "uncorrectable",
    "out of memory",
    "launch timed out",
    "capture",
    "context is destroyed",
    "invalid device context",
)
# RuntimeErrors of the compiler, of the launcher's compilation by a C compiler, and of the driver.
_REFUSALS = ("PassManager::run failed", "Failed to find C compiler", "Triton Error [CUDA]")


class KernelRefused(RuntimeError):
    """A kernel that cannot be compiled, loaded or launched on this machine. Nothing was launched.

    Attributes:
        kernel: its name.
        subject: the folder of kernels that it is from, such as "attention".
        reason: one line.
    """

    def __init__(self, kernel: str, subject: str, reason: str):
        super().__init__(f"{kernel} cannot run on this GPU: {reason}")
        self.kernel, self.subject, self.reason = kernel, subject, reason


def refusal(kernel: Any, error: Exception) -> KernelRefused | None:
    """The refusal that an error of compiling or launching a kernel is, or None: a fault of the device, or a mistake in the call."""
    text = str(error).strip() or type(error).__name__
    known = isinstance(error, TritonError | subprocess.CalledProcessError) and not isinstance(error, InterpreterError)
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        known = known or any(sign in text for sign in _REFUSALS)
    if not known or any(fault in text for fault in _FAULTS):
        return None
    module = getattr(getattr(kernel, "fn", kernel), "__module__", "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    name = getattr(kernel, "__name__", str(kernel))
    return KernelRefused(
        name, module.removeprefix("fastdeit.kernels.").split(".")[0], f"{type(error).__name__}: {lines[0]}"
    )
