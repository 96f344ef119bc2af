"""A kernel around a few instructions, so that each can be tested by itself."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch

from fastdeit.testing.ptx.global_memory import GlobalMemory
from fastdeit.testing.ptx.machine import IN_STEP, Machine, Schedule
from fastdeit.testing.ptx.program import Program
from fastdeit.testing.ptx.tensor_copy import TensorMap

_TYPES = {"%rs": ("u16", "b16", 2, np.int16), "%rd": ("u64", "b64", 8, np.int64), "%r": ("u32", "b32", 4, np.int32)}


def _type_of(register: str) -> tuple:
    return next(kind for prefix, kind in _TYPES.items() if register.startswith(prefix))


def program_of(
    body: str, inputs: Sequence[str], outputs: Sequence[str], threads: int, arch: int = 90, maps: int = 0
) -> Program:
    return Program(text_of(body, inputs, outputs, threads, arch, maps))


def text_of(
    body: str, inputs: Sequence[str], outputs: Sequence[str], threads: int, arch: int = 90, maps: int = 0
) -> str:
    """Each thread loads its element of every input, executes the body and stores its element of every output."""
    parameters = [f"\t.param .u64 p{i}" for i in range(len(inputs) + len(outputs))]
    parameters = ",\n".join([*parameters, *(f"\t.param .align 64 .b8 map{i}[128]" for i in range(maps))])
    lines = ["\tmov.u32 \t%tid, %tid.x;"]
    for i, register in enumerate([*inputs, *outputs]):
        _, bits, width, _ = _type_of(register if not register.startswith("%p") else "%r")
        lines += [f"\tld.param.u64 \t%a{i}, [p{i}];", f"\tmad.wide.u32 \t%a{i}, %tid, {width}, %a{i};"]
        if i < len(inputs):
            lines.append(f"\tld.global.{bits} \t{register}, [%a{i}];")
    lines += [f"\t{line.strip()}" for line in body.strip().splitlines()]
    for i, register in enumerate(outputs, len(inputs)):
        if register.startswith("%p"):
            lines += [f"\tselp.b32 \t%flag, 1, 0, {register};", f"\tst.global.b32 \t[%a{i}], %flag;"]
        else:
            lines.append(f"\tst.global.{_type_of(register)[1]} \t[%a{i}], {register};")
    return (
        f".version 8.7\n.target sm_{arch}a\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"
        f".visible .entry test(\n{parameters}\n)\n.reqntid {threads}\n{{\n"
        "\t.reg .pred \t%p<40>;\n\t.reg .b16 \t%rs<40>;\n\t.reg .b32 \t%r<400>;\n\t.reg .b64 \t%rd<40>;\n"
        "\t.reg .b64 \t%a<300>;\n\t.reg .b32 \t%tid;\n\t.reg .b32 \t%flag;\n" + "\n".join(lines) + "\n\tret;\n}\n"
    )


@pytest.fixture
def execute() -> Callable[..., list[np.ndarray]]:
    """execute(body, inputs, outputs): the outputs' bits, one element a thread.

    inputs: register -> array of its width, one element a thread or one for all. outputs: registers; predicates give 0 and 1.
    maps: tensors with a box and a swizzle mode, whose descriptors are the parameters map0, map1, ... make: another machine.
    """

    def run(
        body: str,
        inputs: Mapping[str, object] | None = None,
        outputs: Sequence[str] = (),
        *,
        threads: int = 32,
        blocks: int = 1,
        shared: int = 0,
        schedule: Schedule = IN_STEP,
        maps: Sequence[tuple[torch.Tensor, tuple[int, ...], int]] = (),
        observer: object = None,
        make: Callable[[Program, int], Machine] | None = None,
    ) -> list[np.ndarray]:
        inputs = inputs or {}
        program = program_of(body, list(inputs), outputs, threads, maps=len(maps))
        machine = make(program, shared) if make else Machine(program, shared, schedule)
        machine.observer = observer or machine.observer
        memory = GlobalMemory(machine.fault)
        tensors = []
        for register, value in inputs.items():
            _, _, width, signed = _type_of(register)
            array = np.asarray(value)
            assert array.dtype.itemsize == width, f"{register} takes {width} bytes"
            array = np.ascontiguousarray(np.broadcast_to(array, threads))
            tensors.append(torch.from_numpy(array.view(signed).copy()))
        for register in outputs:
            signed = np.int32 if register.startswith("%p") else _type_of(register)[3]
            tensors.append(torch.from_numpy(np.full(threads, 0x5A, signed)))
        arguments = {f"p{i}": memory.add(tensor) for i, tensor in enumerate(tensors)}
        for i, (tensor, box, swizzle) in enumerate(maps):
            facts = {"block_size": box, "swizzle": swizzle}
            size = tensor.element_size()
            arguments[f"map{i}"] = TensorMap.encode(memory.add(tensor), tensor.shape, tensor.stride(), size, facts)
        machine.launch((blocks,), arguments, memory)
        return [t.numpy().view(f"u{t.element_size()}") for t in tensors[len(inputs) :]]

    return run
