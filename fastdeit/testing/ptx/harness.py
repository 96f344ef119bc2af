"""Puts the machine in the place of a GPU: launches of CPU tensors are compiled for an architecture and executed here."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdeit.backends import supposed_gpu
from fastdeit.kernels.runtime.architecture import nominal_device
from fastdeit.kernels.runtime.launch import cpu_launches
from fastdeit.testing.ptx.compiler import Compiled, Variant, compile_variant, why_untested
from fastdeit.testing.ptx.counts import Counts, Observer
from fastdeit.testing.ptx.global_memory import GlobalMemory
from fastdeit.testing.ptx.machine import IN_STEP, Fault, Machine, Schedule
from fastdeit.testing.ptx.tensor_copy import TensorMap

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_INT32 = 2**31
ARCHITECTURES = (80, 89, 90, 100)


@dataclasses.dataclass
class Launched:
    """One launch: what was compiled, the machine of the first schedule, and what that counted."""

    variant: Variant
    grid: tuple[int, ...]
    machine: Machine
    counts: Counts


def variant_of(
    kernel: Any, args: tuple, constexprs: tuple, num_warps: int, num_stages: int, fp_fusion: bool = True
) -> Variant:
    """What Triton would compile for a launch's arguments."""
    names = kernel.arg_names
    types, unaligned = [], set()
    for name, arg in zip(names, args, strict=False):
        if arg is None:
            types.append((name, ("constexpr", None)))
        elif isinstance(arg, torch.Tensor):
            types.append((name, f"*{_TYPES[arg.dtype]}"))
            if arg.data_ptr() % 16:
                unaligned.add(name)
        elif isinstance(arg, TensorDescriptor):
            types.append((name, f"tensordesc<{_TYPES[arg.base.dtype]}{list(arg.block_shape)}>"))
        elif isinstance(arg, float):
            types.append((name, "fp32"))
        else:
            types.append((name, "i32" if -_INT32 <= int(arg) < _INT32 else "i64"))
    types += [(name, ("constexpr", value)) for name, value in zip(names[len(args) :], constexprs, strict=True)]
    return Variant(kernel, tuple(types), frozenset(unaligned), num_warps, num_stages, fp_fusion)


def execute(
    compiled: Compiled,
    grid: tuple[int, ...],
    args: tuple,
    schedule: Schedule = IN_STEP,
    observer: Any = None,
    most_branches: int | None = None,
) -> Machine:
    """Runs a compiled kernel over a grid with a launch's arguments; tensors are written in place."""
    machine = Machine(compiled.program, compiled.shared_bytes, schedule)
    machine.observer, machine.most_branches = observer, most_branches
    run_on(machine, compiled, grid, args)
    return machine


def run_on(machine: Machine, compiled: Compiled, grid: tuple[int, ...], args: tuple) -> None:
    """The same on a given machine."""
    memory = GlobalMemory(machine.fault)
    machine.launch(grid, arguments_of(compiled, args, memory), memory)


def arguments_of(compiled: Compiled, args: tuple, memory: GlobalMemory) -> dict[str, Any]:
    """Parameter name -> bits or tensor map, in the order that Triton's launcher passes them."""
    parameters = iter(compiled.program.parameters)
    metadata = iter(compiled.tensor_maps)
    found: dict[str, Any] = {}
    for arg in args:
        if arg is None:
            continue
        if isinstance(arg, TensorDescriptor):
            address = memory.add(arg.base.as_strided(arg.shape, arg.strides))
            found[next(parameters).name] = TensorMap.encode(
                address, arg.shape, arg.strides, arg.base.element_size(), next(metadata)
            )
            for number in (*arg.shape, *arg.strides):
                found[next(parameters).name] = int(number)
        elif isinstance(arg, torch.Tensor):
            found[next(parameters).name] = memory.add(arg)
        elif isinstance(arg, float):
            found[next(parameters).name] = int(np.float32(arg).view(np.uint32))
        else:
            found[next(parameters).name] = int(arg)
    found.update({parameter.name: 0 for parameter in parameters})  # scratch memory that no kernel here uses
    return found


def parse_target(text: str) -> int:
    """ptx:sm_90 -> 90.

    Raises:
        ValueError: another form, or an architecture whose code the machine cannot run.
    """
    known = {f"ptx:sm_{arch}": arch for arch in ARCHITECTURES}
    if text not in known:
        raise ValueError(f"--on: expected one of {', '.join(known)}, got {text!r}")
    return known[text]


@contextlib.contextmanager
def executing(
    arch: int,
    schedules: Sequence[Schedule] = (IN_STEP,),
    *,
    multiprocessors: int = 2,
    compile_launch: Callable[[Variant, int], Compiled] = compile_variant,
    most_branches: int | None = None,
    before_launch: Callable[[Variant, tuple, tuple], None] | None = None,
    on_launch: Callable[[Launched], None] | None = None,
) -> Iterator[None]:
    """In it CPU tensors count as a GPU's: ops choose kernels for `arch`, which are compiled and executed by the machine.

    Args:
        arch: compute capability, one of ARCHITECTURES.
        schedules: each launch runs under every one of them from the same memory, and the results must be the same bits; those of
            the last one stay.
        multiprocessors: of the supposed GPU; few of them keep persistent grids small.
        compile_launch: gives the code that a launch executes on an architecture.
        most_branches: of a launch, as of a `Machine`.
        before_launch: called before each launch with what it compiles, its grid and its arguments.
        on_launch: called after each launch, whose accesses are then counted under the first schedule.

    Raises:
        RuntimeError: this Triton is not among those that the machine is tested with.
    """
    if reason := why_untested():
        raise RuntimeError(reason)

    def launch(
        kernel: Any,
        grid: tuple,
        args: tuple,
        constexprs: tuple,
        num_warps: int,
        num_stages: int = 1,
        fp_fusion: bool = True,
        maxnreg: int | None = None,  # which ptxas alone heeds
    ) -> None:
        variant = variant_of(kernel, args, constexprs, num_warps, num_stages, fp_fusion)
        if before_launch:
            before_launch(variant, grid, args)
        compiled = compile_launch(variant, arch)
        storages = [storage_of(t) for t in args if isinstance(t, torch.Tensor | TensorDescriptor)]
        before = [s.clone() for s in storages] if len(schedules) > 1 else []
        results: list[torch.Tensor] = []
        for schedule in schedules:
            for storage, held in zip(storages, before, strict=False):
                storage.copy_(held)
            observer = Observer() if on_launch and schedule is schedules[0] else None
            machine = execute(compiled, grid, args, schedule, observer, most_branches)
            if observer:
                counts = observer.counts(machine.program, machine.executed)
                launched = Launched(variant, grid, machine, counts)
            if results and not all(map(torch.equal, storages, results)):
                raise Fault("schedule", f"{kernel.__name__} gives other bits under {schedule}", None)
            results = [s.clone() for s in storages] if len(schedules) > 1 else []
        if on_launch:
            on_launch(launched)

    with (
        supposed_gpu(),
        cpu_launches(launch),
        nominal_device(arch, multiprocessors),
    ):
        yield


@contextlib.contextmanager
def launches_noted(arch: int, multiprocessors: int = 2) -> Iterator[list[Variant]]:
    """In it ops choose kernels for `arch` as in `executing`, but launches are only noted in the list, and write nothing."""
    noted: list[Variant] = []

    def launch(
        kernel: Any,
        grid: tuple,
        args: tuple,
        constexprs: tuple,
        num_warps: int,
        num_stages: int = 1,
        fp_fusion: bool = True,
        maxnreg: int | None = None,
    ) -> None:
        noted.append(variant_of(kernel, args, constexprs, num_warps, num_stages, fp_fusion))

    with supposed_gpu(), cpu_launches(launch), nominal_device(arch, multiprocessors):
        yield noted


def storage_of(tensor: torch.Tensor | TensorDescriptor) -> torch.Tensor:
    """The whole storage behind a tensor or descriptor."""
    storage = (tensor if isinstance(tensor, torch.Tensor) else tensor.base).untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage)
