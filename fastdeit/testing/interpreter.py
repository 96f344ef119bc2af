"""Triton's interpreter, set up for tests: its bfloat16 products and float8 casts corrected, its builtins cached."""

import functools
from typing import Any

import torch


def correct_interpreter_bfloat16() -> None:
    """Makes bfloat16 right under Triton's interpreter, which truncates what it should round and multiplies bit patterns."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "corrects_bfloat16", False):
        return
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self, src, dst_type):
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.bfloat16, tl.float32):
            return widen(src)
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return plain_cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return plain_dot(self, widen(a), widen(b), d, input_precision, max_num_imprecise_acc)

    builder.cast_impl, builder.create_dot, builder.corrects_bfloat16 = cast_impl, create_dot, True


def correct_interpreter_float8() -> None:
    """Makes casts from float32 to float8 e4m3 right under Triton's interpreter, which misrounds values next to a tie.

    Triton 3.6 gives 64 for 126.9. Out of range gives the largest value, as PTX's `cvt.rn.satfinite.e4m3x2.f32` does.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "corrects_float8", False):
        return
    plain = builder.create_fp_to_fp

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.float8e4nv):
            return plain(self, src, dst_type, rounding_mode)
        rounded = torch.from_numpy(np.array(src.data)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)

    builder.create_fp_to_fp, builder.corrects_float8 = create_fp_to_fp, True


def cache_interpreter_builtins() -> None:
    """Caches the list of builtins that Triton's interpreter looks up at each call of a device function.

    The look-up takes a third of the time of a small kernel. What is patched within a kernel, and restored after it, stays the same.
    """
    import inspect

    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(owner: Any) -> list[tuple[str, Any]]:
        return [(name, member) for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]

    def patch_builtin(owner: Any, *builder_and_scope: Any) -> None:
        for name, member in builtins_of(owner):
            if getattr(owner, name) is member:  # not patched yet
                interpreter._patch_attr(owner, name, member, *builder_and_scope)

    for owner in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        builtins_of(owner)  # now, while nothing is patched
    interpreter._patch_builtin = patch_builtin
