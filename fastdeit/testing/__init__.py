"""The numerics contract, and tools that run kernels without a GPU."""

from fastdeit.testing.accuracy import (
    ALLOWANCE,
    Error,
    assert_as_accurate_as_eager,
    assert_close_to_oracle,
    assert_model_close_to_oracle,
    compare_with_oracle,
    interpreter_active,
    kernel_device,
    kernel_dtypes,
    poisoned_memory,
)
from fastdeit.testing.interpreter import (
    cache_interpreter_builtins,
    correct_interpreter_bfloat16,
    correct_interpreter_float8,
)

__all__ = [
    "ALLOWANCE",
    "Error",
    "assert_as_accurate_as_eager",
    "assert_close_to_oracle",
    "assert_model_close_to_oracle",
    "cache_interpreter_builtins",
    "compare_with_oracle",
    "correct_interpreter_bfloat16",
    "correct_interpreter_float8",
    "interpreter_active",
    "kernel_device",
    "kernel_dtypes",
    "poisoned_memory",
]
