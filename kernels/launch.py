"""Launching a compiled kernel for a few microseconds of host time.

`kernel[grid](...)` binds and specialises every argument anew, 15 us and more a call. Here the `CompiledKernel` that a first call
made is kept under the few facts that it depends on, and later calls go straight to its launcher. The kernels make that sound:
their run-time integers are declared `do_not_specialize`, so that only an integer's width is left of its value.
"""

from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# The direct call uses names of Triton that are not public. On other versions than those tested, launches take the public way.
_TESTED_VERSIONS = ("3.6",)

_compiled: dict[tuple, Any] = {}


def _tested_version() -> bool:
    return triton.__version__.startswith(tuple(v + "." for v in _TESTED_VERSIONS))


def _trait(arg: Any) -> Any:
    """What the compiled code depends on in one run-time argument."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype if arg.data_ptr() % 16 == 0 else (arg.dtype, "unaligned")
    if isinstance(arg, int):
        return -(2**31) <= arg < 2**31
    if isinstance(arg, TensorDescriptor):
        return (arg.base.dtype, *arg.block_shape)
    return type(arg)


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple, constexprs: tuple, num_warps: int, num_stages: int = 1
) -> None:
    """Launches `kernel` over `grid` on the current stream of the device of its first tensor.

    Args:
        kernel: a `@triton.jit` function whose constexpr parameters come last and whose run-time integers are `do_not_specialize`.
        grid: one to three positive integers.
        args: every run-time argument in the order of the signature: tensors, host tensor descriptors, int, float or None.
        constexprs: every constexpr value in the order of the signature.
        num_warps, num_stages: compile options.
    """
    if not isinstance(kernel, JITFunction) or kernel.pre_run_hooks or not _tested_version():
        kernel[grid](*args, *constexprs, num_warps=num_warps, num_stages=num_stages)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    home = _home(args)
    if home is not None and home != device:
        with torch.cuda.device(home):
            launch(kernel, grid, args, constexprs, num_warps, num_stages)
        return

    key = (id(kernel), device, num_warps, num_stages, constexprs, *map(_trait, args))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, *constexprs, num_warps=num_warps, num_stages=num_stages)
        return
    stream = driver.get_current_stream(device)
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    metadata = None if enter is None else compiled.launch_metadata(grid, stream, *args, *constexprs)
    x, y, z = (*grid, 1, 1)[:3]
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *args, *constexprs
    )


def _home(args: tuple) -> int | None:
    """The CUDA device of the first tensor among the arguments; None for a CPU tensor."""
    for arg in args:
        tensor = arg.base if isinstance(arg, TensorDescriptor) else arg
        if isinstance(tensor, torch.Tensor):
            return tensor.device.index if tensor.is_cuda else None
    return None
