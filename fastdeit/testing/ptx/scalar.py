"""Instructions that compute registers from registers, thread by thread (PTX ISA 9.7.1 to 9.7.9).

`table` maps each known mnemonic, modifiers included, to what it reads, what it writes and a function of numpy arrays.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from fastdeit.testing.ptx.formats import (
    UNSIGNED,
    WIDTH,
    Approximations,
    canonical,
    extreme,
    f32_to_f16_towards_zero,
    flush,
    fma_f32,
    from_f32,
    halves,
    numpy_type,
    pair_to_e4m3,
    to_f32,
)


class Operation(NamedTuple):
    """What an instruction does to its registers.

    reads: PTX types of the operands after the destinations. f16, f32 and integers arrive as numpy numbers of that type, pred as
        bool, bf16 and packed types as bits.
    writes: PTX types of the destinations.
    compute: arrays, of one length or of length 1, to the result, or a tuple of results.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    compute: Callable


def expand(pattern: str) -> Iterator[str]:
    """`add.{s32,s64}` as add.s32 and add.s64; an empty choice takes its dot along: `add{.rn,}.f32`."""
    pieces = [piece.split(",") for piece in re.split(r"[{}]", pattern)]
    return map("".join, itertools.product(*pieces))


def table(approximations: Approximations) -> dict[str, Operation]:
    """Every mnemonic of this file, with its approximate instructions as given."""
    return {**_integer(), **_logic(), **_floating_point(approximations), **_comparison(), **_conversion()}


# ---- 9.7.1 integer arithmetic


def _integer() -> dict[str, Operation]:
    found = {}

    def add(pattern: str, compute: Callable, operands: int) -> None:
        for name in expand(pattern):
            kind = name.rsplit(".", 1)[1]
            found[name] = Operation((kind,) * operands, (kind,), compute)

    words = "{s16,u16,s32,u32,s64,u64}"
    add(f"add.{words}", np.add, 2)
    add(f"sub.{words}", np.subtract, 2)
    add(f"mul.lo.{words}", np.multiply, 2)
    add(f"mad.lo.{words}", lambda a, b, c: a * b + c, 3)
    add(f"min.{words}", np.minimum, 2)
    add(f"max.{words}", np.maximum, 2)
    add(f"div.{words}", _quotient, 2)
    add(f"rem.{words}", _remainder, 2)
    for name, function in (("add", np.add), ("min", np.minimum), ("max", np.maximum)):
        for kind in ("s16", "u16"):
            found[f"{name}.{kind}x2"] = Operation(
                ("b32", "b32"), ("b32",), lambda a, b, f=function, k=kind: _of_halves(f, k, a, b)
            )
    for kind in ("s16", "s32", "s64"):
        found[f"neg.{kind}"] = Operation((kind,), (kind,), np.negative)
        found[f"abs.{kind}"] = Operation((kind,), (kind,), np.abs)
    for kind, wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
        to = numpy_type(wide)
        found[f"mul.wide.{kind}"] = Operation((kind, kind), (wide,), lambda a, b, to=to: a.astype(to) * b.astype(to))
        found[f"mad.wide.{kind}"] = Operation(
            (kind, kind, wide), (wide,), lambda a, b, c, to=to: a.astype(to) * b.astype(to) + c
        )
        bits = 8 * WIDTH[kind]
        found[f"mul.hi.{kind}"] = Operation(
            (kind, kind),
            (kind,),
            lambda a, b, to=to, bits=bits: ((a.astype(to) * b.astype(to)) >> to(bits)).astype(a.dtype),
        )
    found["mul.hi.s64"] = Operation(("s64", "s64"), ("s64",), _upper_half_of_product)
    found["popc.b32"] = Operation(("b32",), ("u32",), lambda a: np.bitwise_count(a).astype(np.uint32))
    for kind in ("s32", "u32", "s64", "u64"):
        found[f"bfe.{kind}"] = Operation((kind, "u32", "u32"), (kind,), _extract_field)
    return found


def _of_halves(function: Callable, kind: str, a: ndarray, b: ndarray) -> ndarray:
    """A function of 16-bit integers on both halves of 32-bit registers."""
    left, right = (np.ascontiguousarray(x)[..., None].view(numpy_type(kind)) for x in (a, b))
    return np.ascontiguousarray(function(left, right)).view(np.uint32)[..., 0]


def _upper_half_of_product(a: ndarray, b: ndarray) -> ndarray:
    """Bits 64 to 127 of the product of signed numbers, by halves of 32 bits."""
    low, half = np.int64(0xFFFFFFFF), np.int64(32)
    a_high, a_low, b_high, b_low = a >> half, a & low, b >> half, b & low
    carry = ((a_low.view(np.uint64) * b_low.view(np.uint64)) >> np.uint64(32)).view(np.int64)
    first = a_high * b_low + carry
    second = a_low * b_high + (first & low)
    return a_high * b_high + (first >> half) + (second >> half)


def _quotient(a: ndarray, b: ndarray) -> ndarray:
    """Rounds towards zero. Division by zero is unspecified; all bits are set here."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), quotient)


def _remainder(a: ndarray, b: ndarray) -> ndarray:
    """The remainder, with the sign of a."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, ~a.dtype.type(0), np.fmod(a, safe))


def _extract_field(a: ndarray, position: ndarray, length: ndarray) -> ndarray:
    """bfe: `length` bits of a from `position`, extended with a's highest bit of the field that exists, or with zeros."""
    width = 8 * a.dtype.itemsize
    unsigned = UNSIGNED[a.dtype.itemsize]
    position, length = position & np.uint32(255), np.minimum(length & np.uint32(255), np.uint32(width))
    shifted = _shifted_right(a, position)
    kept = np.where(length == width, ~unsigned(0), (unsigned(1) << (length % width).astype(unsigned)) - unsigned(1))
    field = shifted.view(unsigned) & kept
    if a.dtype.kind == "u":
        return field
    last = np.minimum(position + np.maximum(length, np.uint32(1)) - np.uint32(1), np.uint32(width - 1))
    negative = (_shifted_right(a, last) & a.dtype.type(1)).astype(bool) & (length > 0)
    return np.where(negative, field | ~kept, field).view(a.dtype)


# ---- 9.7.8 logic and shift


def _logic() -> dict[str, Operation]:
    found = {}
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    for kind in ("pred", "b16", "b32", "b64"):
        for name, function in functions.items():
            found[f"{name}.{kind}"] = Operation((kind, kind), (kind,), function)
        found[f"not.{kind}"] = Operation((kind,), (kind,), np.invert)
    for kind in ("b16", "b32", "b64"):
        found[f"shl.{kind}"] = Operation((kind, "u32"), (kind,), _shifted_left)
    for kind in (k + bits for k in "bus" for bits in ("16", "32", "64")):
        found[f"shr.{kind}"] = Operation((kind, "u32"), (kind,), _shifted_right)
    found["lop3.b32"] = Operation(("b32",) * 3 + ("u32",), ("b32",), _lookup)
    found["prmt.b32"] = Operation(("b32",) * 3, ("b32",), _permuted_bytes)
    for name, left in (("shf.l.wrap.b32", True), ("shf.r.wrap.b32", False)):
        found[name] = Operation(("b32", "b32", "u32"), ("b32",), lambda lo, hi, n, left=left: _funnel(lo, hi, n, left))
    for kind in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f16", "f32"):
        bits = f"b{8 * WIDTH[kind]}"
        found[f"selp.{kind}"] = Operation((bits, bits, "pred"), (bits,), lambda a, b, p: np.where(p, a, b))
    return found


def _shifted_left(a: ndarray, by: ndarray) -> ndarray:
    """Shifts by more than the width clamp, to zero."""
    width = 8 * a.dtype.itemsize
    return np.where(by < width, a << np.minimum(by, width - 1).astype(a.dtype), a.dtype.type(0))


def _shifted_right(a: ndarray, by: ndarray) -> ndarray:
    """Signed numbers fill with their sign."""
    width = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < width, shifted, a.dtype.type(0))


def _lookup(a: ndarray, b: ndarray, c: ndarray, lut: ndarray) -> ndarray:
    """lop3: bit 4a + 2b + c of the table, for each bit."""
    result = np.uint32(0)
    for row in range(8):
        if int(lut[0]) >> row & 1:
            result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result + np.zeros_like(a)


def _permuted_bytes(a: ndarray, b: ndarray, selector: ndarray) -> ndarray:
    """prmt: each nibble of the selector picks one of the eight bytes of b:a, or with its highest bit that byte's sign."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.uint32(0)
    for k in range(4):
        nibble = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = ((both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)).astype(np.uint32)
        sign = (byte >> np.uint32(7)) * np.uint32(255)
        result = result | (np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * k))
    return result


def _funnel(low: ndarray, high: ndarray, by: ndarray, left: bool) -> ndarray:
    """shf.wrap: the upper or lower word of high:low shifted by the lowest five bits of `by`."""
    both, by = (high.astype(np.uint64) << np.uint64(32)) | low, (by & np.uint32(31)).astype(np.uint64)
    return (((both << by) >> np.uint64(32)) if left else (both >> by)).astype(np.uint32)


# ---- 9.7.3 to 9.7.5 floating point


def _floating_point(approximations: Approximations) -> dict[str, Operation]:
    found = {}

    def add(name: str, function: Callable, operands: int) -> None:
        """A function of float32 for all formats: 16-bit ones are computed in float32 and rounded once."""
        for kind in ("f32", "f16", "bf16", "f16x2", "bf16x2", "f32x2"):
            for rounding in ("", ".rn") if operands > 1 else ("",):
                found[f"{name}{rounding}.{kind}"] = Operation((kind,) * operands, (kind,), _lifted(function, kind))
        found[f"{name}.ftz.f32"] = found[f"{name}.rn.ftz.f32"] = Operation(
            ("f32",) * operands, ("f32",), lambda *args: flush(function(*map(flush, args)))
        )

    add("add", lambda a, b: canonical(a + b), 2)
    add("sub", lambda a, b: canonical(a - b), 2)
    add("mul", lambda a, b: canonical(a * b), 2)
    add("fma", fma_f32, 3)
    add("neg", np.negative, 1)
    add("abs", np.abs, 1)
    for name, largest in (("max", True), ("min", False)):
        for suffix, propagate in (("", False), (".NaN", True)):
            function = extreme(largest, propagate)
            for kind in ("f32", "f16", "bf16", "f16x2", "bf16x2"):
                found[f"{name}{suffix}.{kind}"] = Operation((kind, kind), (kind,), _lifted(function, kind))
            found[f"{name}.ftz{suffix}.f32"] = Operation(
                ("f32", "f32"), ("f32",), lambda a, b, f=function: flush(f(flush(a), flush(b)))
            )
    for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide)):
        found[f"{name}.rn.f64"] = Operation(("f64", "f64"), ("f64",), function)
    for name, largest in (("max", True), ("min", False)):
        found[f"{name}.f64"] = Operation(("f64", "f64"), ("f64",), extreme(largest, False))
    for name in ("ex2", "lg2", "rcp", "rsqrt", "sqrt"):
        function = approximations.unary(name)
        found[f"{name}.approx.f32"] = Operation(("f32",), ("f32",), function)
        found[f"{name}.approx.ftz.f32"] = Operation(("f32",), ("f32",), lambda a, f=function: flush(f(flush(a))))
    found["tanh.approx.f32"] = Operation(("f32",), ("f32",), approximations.unary("tanh"))
    for name, divide in (("full", approximations.divide), ("approx", approximations.divide_approximately)):
        found[f"div.{name}.f32"] = Operation(("f32", "f32"), ("f32",), divide)
        found[f"div.{name}.ftz.f32"] = Operation(
            ("f32", "f32"), ("f32",), lambda a, b, f=divide: flush(f(flush(a), flush(b)))
        )
    found["div.rn.f32"] = Operation(("f32", "f32"), ("f32",), lambda a, b: canonical(a / b))
    found["sqrt.rn.f32"] = Operation(("f32",), ("f32",), lambda a: canonical(np.sqrt(a)))
    found["rcp.rn.f32"] = Operation(("f32",), ("f32",), lambda a: canonical(np.float32(1) / a))
    return found


def _lifted(function: Callable, kind: str) -> Callable:
    """A function of float32 arrays as one of registers of `kind`."""
    if kind == "f32":
        return function
    if kind in ("f16", "bf16"):
        if kind == "f16":
            return lambda *args: from_f32(function(*(a.astype(np.float32) for a in args)), kind)
        return lambda *args: from_f32(function(*(to_f32(a, kind) for a in args)), kind)

    def packed(*args: ndarray) -> ndarray:
        if kind == "f32x2":
            pairs = function(*(np.ascontiguousarray(a)[..., None].view(np.float32) for a in args))
            return np.ascontiguousarray(pairs).view(np.uint64)[..., 0]
        pairs = from_f32(function(*(halves(a, kind[:-2]) for a in args)), kind[:-2])
        return np.ascontiguousarray(pairs).view(np.uint32)[..., 0]

    return packed


# ---- 9.7.6 comparison

_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _comparison() -> dict[str, Operation]:
    found = {}
    for name, function in _ORDERED.items():
        for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
            found[f"setp.{name}.{kind}"] = Operation((kind, kind), ("pred",), function)
        if name in ("eq", "ne"):
            for kind in ("b16", "b32", "b64"):
                found[f"setp.{name}.{kind}"] = Operation((kind, kind), ("pred",), function)
    of_floats = {name: _ordered(function) for name, function in _ORDERED.items()}
    of_floats |= {f"{name}u": _unordered(function) for name, function in _ORDERED.items()}
    of_floats |= {"num": lambda a, b: ~_any_nan(a, b), "nan": lambda a, b: _any_nan(a, b)}
    for name, function in of_floats.items():
        for kind in ("f32", "f64"):
            found[f"setp.{name}.{kind}"] = Operation((kind, kind), ("pred",), function)
        found[f"setp.{name}.ftz.f32"] = Operation(
            ("f32", "f32"), ("pred",), lambda a, b, f=function: f(flush(a), flush(b))
        )
        for kind in ("f16", "bf16"):
            found[f"setp.{name}.{kind}"] = Operation(
                (f"b{8 * WIDTH[kind]}",) * 2,
                ("pred",),
                lambda a, b, f=function, k=kind: f(to_f32(a, k), to_f32(b, k)),
            )
            found[f"setp.{name}.{kind}x2"] = Operation(
                ("b32", "b32"), ("pred", "pred"), lambda a, b, f=function, k=kind: _pairwise(f, k, a, b)
            )
    return found


def _any_nan(a: ndarray, b: ndarray) -> ndarray:
    return np.isnan(a) | np.isnan(b)


def _ordered(function: Callable) -> Callable:
    """False where either is NaN; numpy's `!=` alone is true there."""
    return (lambda a, b: function(a, b) & ~_any_nan(a, b)) if function is np.not_equal else function


def _unordered(function: Callable) -> Callable:
    return lambda a, b: function(a, b) | _any_nan(a, b)


def _pairwise(function: Callable, kind: str, a: ndarray, b: ndarray) -> tuple[ndarray, ndarray]:
    both = function(halves(a, kind), halves(b, kind))
    return both[..., 0], both[..., 1]


# ---- 9.7.9 moves and conversions


def _conversion() -> dict[str, Operation]:
    found = {}
    for kind in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "pred"):
        bits = kind if kind == "pred" else f"b{8 * WIDTH[kind]}"
        found[f"mov.{kind}"] = Operation((bits,), (bits,), lambda a: a)
    for name in ("cvta.param.u64", "cvta.to.global.u64", "cvta.global.u64", "cvta.shared.u64"):
        found[name] = Operation(("b64",), ("b64",), lambda a: a)  # one generic address space
    integers = [sign + bits for sign in "us" for bits in ("8", "16", "32", "64")]
    for to, of in itertools.product(integers, integers):
        found[f"cvt.{to}.{of}"] = Operation((of,), (to,), lambda a, to=to: a.astype(numpy_type(to)))
    for of in integers:
        found[f"cvt.rn.f32.{of}"] = Operation((of,), ("f32",), lambda a: a.astype(np.float32))
        found[f"cvt.rn.f64.{of}"] = Operation((of,), ("f64",), lambda a: a.astype(np.float64))
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        for to, of in itertools.product(("s16", "u16", "s32", "u32", "s64", "u64"), ("f32", "f64")):
            found[f"cvt.{mode}.{to}.{of}"] = Operation((of,), (to,), lambda a, to=to, f=function: _to_integer(f(a), to))
        found[f"cvt.{mode}.f64.f64"] = Operation(("f64",), ("f64",), function)
    found["cvt.rn.f32.f64"] = Operation(("f64",), ("f32",), lambda a: canonical(a.astype(np.float32)))
    found["cvt.f64.f32"] = Operation(("f32",), ("f64",), lambda a: a.astype(np.float64))
    found["cvt.f32.bf16"] = Operation(("b16",), ("f32",), lambda a: canonical(to_f32(a, "bf16")))
    found["cvt.f32.f16"] = Operation(("b16",), ("f32",), lambda a: canonical(to_f32(a, "f16")))
    for kind in ("f16", "bf16"):
        found[f"cvt.rn.{kind}.f32"] = Operation(("f32",), ("b16",), lambda a, k=kind: from_f32(a, k))
        found[f"cvt.rn.{kind}x2.f32"] = Operation(
            ("f32", "f32"), ("b32",), lambda high, low, k=kind: _packed(from_f32(high, k), from_f32(low, k))
        )
    found["cvt.rz.f16.f32"] = Operation(("f32",), ("b16",), f32_to_f16_towards_zero)
    found["cvt.rn.satfinite.e4m3x2.f32"] = Operation(("f32", "f32"), ("b16",), pair_to_e4m3)
    found["cvt.rn.satfinite.e4m3x2.f16x2"] = Operation(
        ("b32",), ("b16",), lambda a: pair_to_e4m3(*halves(a, "f16").T[::-1])
    )
    found["cvt.rna.tf32.f32"] = Operation(("f32",), ("b32",), _to_tf32)
    return found


def _packed(high: ndarray, low: ndarray) -> ndarray:
    return (high.astype(np.uint32) << np.uint32(16)) | low


def _to_integer(value: ndarray, kind: str) -> ndarray:
    """Clamps to the type's range; NaN becomes 0, from float64 or in 64 bits the highest bit alone."""
    to = numpy_type(kind)
    limits = np.iinfo(to)
    wide = value.astype(np.float64)
    inside = (wide >= float(limits.min)) & (wide < float(limits.max) + 1)
    result: ndarray = np.where(inside, wide, 0.0).astype(to)
    result = np.where(wide >= float(limits.max) + 1, to(limits.max), result)
    result = np.where(wide < float(limits.min), to(limits.min), result)
    width = WIDTH[kind]
    nan = 1 << 8 * width - 1 if width == 8 or value.dtype == np.float64 else 0
    return np.where(np.isnan(wide), np.array(nan, UNSIGNED[width]).view(to), result)


def _to_tf32(value: ndarray) -> ndarray:
    """Rounds to 10 bits of fraction, ties away from zero."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(value), rounded, np.where(np.isnan(value), np.uint32(0x7FFFFFFF), bits))
