"""A fake CUDA runtime: PyTorch's and Triton's CUDA code runs on a machine without a GPU, with kernels that do nothing.

A parent process starts a child with `run_python`; the child sees fake GPUs, and reads here what reached them. docs/fake-cuda.md
says what that shows and what it does not.
"""

from fastdeit.testing.fake_cuda.events import (
    WAITS,
    Event,
    TensorMap,
    Wait,
    counting,
    counts,
    errors,
    kinds,
    moved_data,
    observe_waits,
    record,
    recorded,
    separate_memory,
    tensor_map,
    without_pointer_checks,
)
from fastdeit.testing.fake_cuda.library import why_unavailable
from fastdeit.testing.fake_cuda.process import run_python, start_python

__all__ = [
    "WAITS",
    "Event",
    "TensorMap",
    "Wait",
    "counting",
    "counts",
    "errors",
    "kinds",
    "moved_data",
    "observe_waits",
    "record",
    "recorded",
    "run_python",
    "separate_memory",
    "start_python",
    "tensor_map",
    "why_unavailable",
    "without_pointer_checks",
]
