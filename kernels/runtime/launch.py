"""Launching a compiled kernel for a few microseconds of host time.

`kernel[grid](...)` binds and specialises every argument anew, 12 us and more a call. Here the `CompiledKernel` that a first call
made is kept under the few facts that it depends on, and later calls go straight to its launcher. That is correct because
the kernels declare their run-time integers `do_not_specialize`, so that code depends only on whether an integer fits 32 bits;
Triton launches those that do not.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdeit.kernels.runtime.observer import launch_observer
from fastdeit.kernels.runtime.refusal import refusal

# The direct call uses names of Triton that are not public. On other versions than those tested, launches take the public way.
_TESTED_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
_DIRECT = triton.__version__.startswith(_TESTED_VERSIONS)
# Triton 3.6 compiles a launcher in C for each signature; later versions have one for all, which is given the signature.
LAUNCHER_OF_KERNEL = triton.__version__.startswith("3.6.")
runtime = knobs.runtime
HookChain: Any = getattr(knobs, "HookChain", None)  # Triton 3.4 has a function or None in its place


def launches_directly() -> bool:
    """Whether launches take the direct call, which needs a version of Triton that was tested."""
    return _DIRECT


def nothing_between() -> bool:
    """Whether a launch in this thread is the direct call and nothing else: no hook of Triton's, and nothing only compiled."""
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (
        _DIRECT
        and (enter is None or (type(enter) is HookChain and not enter.calls))
        and (leave is None or (type(leave) is HookChain and not leave.calls))
        and _runs()
    )


# For where there is a tensor on a CUDA device, which says that CUDA is initialised: `torch.cuda.current_device()` looks first.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_INT32 = 2**31
_TENSORS = (torch.Tensor, torch.nn.Parameter)

# Takes launches of CPU tensors, called as `launch` is; None leaves them to Triton, whose interpreter runs them.
_cpu_launcher: Callable[..., None] | None = None


class _Thread(threading.local):
    """State of a thread. Defaults are class attributes, which are found faster than a missing attribute."""

    compiled_only: "CompiledOnly | None" = None
    has_context: frozenset[int] = frozenset({-1})  # device indices; -1 is the CPU


_thread = _Thread()

# kernel's id -> the kernel, positions of the arguments whose type matters, and what was compiled so far
_kernels: dict[int, "_Kernel"] = {}


class _Kernel(NamedTuple):
    function: JITFunction  # kept, so that its id stays its own
    typed: tuple[int, ...]  # positions of all run-time arguments but `do_not_specialize` integers
    integers: tuple[int, ...]  # positions of those
    compiled: dict[tuple, "_Compiled"]


class _Compiled(NamedTuple):
    kernel: CompiledKernel
    run: Any  # the launcher, which takes what follows after grid and stream
    leading: tuple  # function handle, launch attributes, packed metadata, and with Triton 3.6 scratch memory
    # What follows after the hooks, if the kernel's arguments are then one tuple; None if they are passed one by one.
    trailing: tuple | None = None


class DirectLaunch(NamedTuple):
    """A launch made by the direct call, as a `LaunchObserver` receives it."""

    kernel: JITFunction
    compiled: _Compiled
    grid: tuple[int, int, int]
    args: tuple
    constexprs: tuple


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple,
    constexprs: tuple,
    num_warps: int,
    num_stages: int = 1,
    fp_fusion: bool = True,
    maxnreg: int | None = None,
) -> None:
    """Launches `kernel` over `grid` on the current stream of the device of its first tensor.

    Args:
        kernel: a `@triton.jit` function whose constexpr parameters come last and whose run-time integers are `do_not_specialize`.
        grid: one to three positive integers.
        args: every run-time argument in the order of the signature: tensors, host tensor descriptors, int, float or None.
        constexprs: every constexpr value in the order of the signature.
        num_warps, num_stages: compile options.
        fp_fusion: let the compiler make one rounding of a multiplication and an addition; always the same for a kernel.
        maxnreg: the most registers that a thread may take, None for no limit.

    Raises:
        KernelRefused: the kernel cannot be compiled, loaded or launched on the device.
    """
    home = _device_index(args)
    if home >= 0 and home != current_device():
        with torch.cuda.device(home):
            launch(kernel, grid, args, constexprs, num_warps, num_stages, fp_fusion, maxnreg)
        return
    if home < 0 and _cpu_launcher is not None:
        _cpu_launcher(kernel, grid, args, constexprs, num_warps, num_stages, fp_fusion, maxnreg)
        return
    if type(kernel) is not JITFunction or kernel.pre_run_hooks or not _DIRECT:
        _launch_publicly(kernel, grid, args, constexprs, num_warps, num_stages, fp_fusion, maxnreg)
        return
    device = home if home >= 0 else driver.active.get_current_device()
    known = _kernels.get(id(kernel)) or _register(kernel)
    key = [device, num_warps, num_stages, maxnreg, constexprs]
    for i in known.typed:
        arg = args[i]
        kind = type(arg)
        if kind in _TENSORS:
            key.append(arg.dtype if arg.data_ptr() % 16 == 0 else (arg.dtype,))
        elif kind is TensorDescriptor:
            key += (arg.base.dtype, *arg.block_shape)
        elif arg is None or kind is float:
            key.append(kind)
        else:  # whatever else Triton takes
            _launch_publicly(kernel, grid, args, constexprs, num_warps, num_stages, fp_fusion, maxnreg)
            return
    for i in known.integers:
        if not -_INT32 <= args[i] < _INT32:  # another variant, which Triton keeps by itself
            _launch_publicly(kernel, grid, args, constexprs, num_warps, num_stages, fp_fusion, maxnreg)
            return

    key = tuple(key)
    compiled = known.compiled.get(key)
    if compiled is None:
        kept = _launch_publicly(kernel, grid, args, constexprs, num_warps, num_stages, fp_fusion, maxnreg)
        if kept is not None:  # None where a hook of Triton's took the compilation over
            known.compiled[key] = _direct_call(kept)
        return
    if _thread.compiled_only is not None and not _runs():
        return
    stream = driver.active.get_current_stream(device)
    enter, leave, metadata = runtime.launch_enter_hook, runtime.launch_exit_hook, None
    # A chain without hooks is left out: calling it would cost as much as the rest of the launch.
    if type(enter) is HookChain and not enter.calls:
        enter = None
    if type(leave) is HookChain and not leave.calls:
        leave = None
    if enter is not None or leave is not None:
        metadata = compiled.kernel.launch_metadata(grid, stream, *args, *constexprs)
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    if compiled.trailing is None:
        compiled.run(x, y, z, stream, *compiled.leading, metadata, enter, leave, *args, *constexprs)
    else:
        trailing = (*compiled.trailing, (*args, *constexprs))
        compiled.run(x, y, z, stream, *compiled.leading, metadata, enter, leave, *trailing)
    if (observer := launch_observer()) is not None:
        observer.launched(DirectLaunch(kernel, compiled, (x, y, z), args, constexprs))


class Pointer(NamedTuple):
    """In the place of a tensor where a launch is described."""

    dtype: torch.dtype
    aligned: bool  # to 16 bytes


def described_launch(
    kernel: JITFunction, grid: tuple[int, ...], args: tuple, constexprs: tuple, num_warps: int
) -> DirectLaunch | None:
    """A launch on the current device that is compiled and not made, without its arguments; None where a hook of Triton's took the
    compilation over.

    Args:
        kernel, grid, constexprs, num_warps: as `launch` takes them.
        args: every run-time argument in the order of the signature: `Pointer`, int, float or None.

    Raises:
        KernelRefused: the kernel cannot be compiled or loaded on the device.
    """
    stand_ins = [_StandIn(arg) if type(arg) is Pointer else arg for arg in args]
    options = dict(num_warps=num_warps, num_stages=1, maxnreg=None)
    try:
        kept = kernel.warmup(*stand_ins, *constexprs, grid=grid, **options)
        compiled = None if kept is None else _direct_call(kept)
    except Exception as error:
        if refused := refusal(kernel, error):
            raise refused from error
        raise
    x, y, z = (*grid, 1, 1)[:3]
    return None if compiled is None else DirectLaunch(kernel, compiled, (x, y, z), (), constexprs)


class _StandIn:
    """What Triton looks at of a tensor."""

    def __init__(self, pointer: Pointer) -> None:
        self.dtype, self._address = pointer.dtype, 0 if pointer.aligned else 1

    def data_ptr(self) -> int:
        return self._address


class CompiledOnly:
    """What is launched between `begin` and `end` in a thread is compiled and loaded, and not run: results are left as they are.

    After `close` no thread is held any more, also where an error kept one from its `end`.
    """

    def __init__(self) -> None:
        self.open = True

    def begin(self) -> None:
        _thread.compiled_only = self

    def end(self) -> None:
        _thread.compiled_only = None

    def close(self) -> None:
        self.open = False


def _runs() -> bool:
    """Whether this thread's launches are to run."""
    held = _thread.compiled_only
    return held is None or not held.open


@contextlib.contextmanager
def cpu_launches(launcher: Callable[..., None]) -> Iterator[None]:
    """Inside, `launcher` is called instead of `launch` for tensors on the CPU, with all arguments by position."""
    global _cpu_launcher
    previous, _cpu_launcher = _cpu_launcher, launcher
    try:
        yield
    finally:
        _cpu_launcher = previous


def descriptor(
    tensor: torch.Tensor,
    block_shape: Sequence[int],
    shape: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> TensorDescriptor:
    """A `TensorDescriptor` without its checks, which cost more than a launch's other arguments together.

    For tensors that a launcher has already found fit: 16-byte aligned base and strides, last dimension dense, no empty dimension.

    Args:
        tensor: what the kernel reads or writes.
        block_shape: of one load or store.
        shape, strides: to see the tensor by, together; its own by default.
    """
    bind_context(tensor.get_device())
    if shape is None:
        shape, strides = tensor.shape, tensor.stride()
    if not _DIRECT:
        return TensorDescriptor(tensor, shape, strides, block_shape)
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = tensor, shape, strides
    made.block_shape, made.padding = block_shape, "zero"
    return made


def bind_context(device: int) -> None:
    """Makes the device's context current in this thread, once: an autograd thread's first launch may be one with descriptors, which
    are encoded before Triton looks for a context. -1 is the CPU."""
    if device not in _thread.has_context:
        torch.cuda.mem_get_info(device)
        _thread.has_context |= {device}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own are functions for kernels too, and cost a launcher 2 us a call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def _device_index(args: tuple) -> int:
    """The CUDA device of the first tensor among the arguments; -1 for a CPU tensor."""
    for arg in args:
        if type(arg) is TensorDescriptor:
            arg = arg.base
        if isinstance(arg, torch.Tensor):
            return arg.get_device()
    return -1


def _launch_publicly(kernel, grid, args, constexprs, num_warps, num_stages, fp_fusion, maxnreg):
    options = dict(num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)
    if not fp_fusion:
        options["enable_fp_fusion"] = False
    if (observer := launch_observer()) is not None:
        observer.launched_publicly()
    try:
        if _runs():
            return kernel[grid](*args, *constexprs, **options)
        compiled = kernel.warmup(*args, *constexprs, grid=grid, **options)
        if compiled is not None:  # None where a hook of Triton's took the compilation over
            compiled.run  # noqa: B018, which loads it
        return None
    except Exception as error:
        if type(kernel) is JITFunction and (refused := refusal(kernel, error)):
            raise refused from error
        raise


def _register(kernel: JITFunction) -> _Kernel:
    run_time = [p for p in kernel.params if not p.is_constexpr]
    typed = tuple(p.num for p in run_time if not p.do_not_specialize)
    integers = tuple(p.num for p in run_time if p.do_not_specialize)
    return _kernels.setdefault(id(kernel), _Kernel(kernel, typed, integers, {}))


def _direct_call(kernel: CompiledKernel) -> _Compiled:
    launcher = kernel.run
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return _Compiled(kernel, launcher, (kernel.function, kernel.packed_metadata))  # its own call allocates memory
    attributes = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    if LAUNCHER_OF_KERNEL:
        return _Compiled(kernel, launcher.launch, (kernel.function, *attributes, None, None, kernel.packed_metadata))
    signature = (None, None, launcher.arg_annotations, launcher.kernel_signature)
    return _Compiled(kernel, launcher.launch, (kernel.function, *attributes, kernel.packed_metadata), signature)
