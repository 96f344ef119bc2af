"""Number formats of PTX on numpy arrays: conversions, rounding, and the approximate instructions (PTX ISA 9.7.3 to 9.7.5).

A register is an array of unsigned integers of its width, one element a thread, or of one element where all threads hold the same.
Floating-point results that are NaN are the canonical NaN of the format, as PTX has them.
"""

from collections.abc import Callable

import numpy as np
from numpy import ndarray

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_FLOAT_WIDTH = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "tf32": 4, "f32x2": 8, "pred": 0}
WIDTH = {f"{kind}{8 * width}": width for kind in "bus" for width in UNSIGNED} | _FLOAT_WIDTH
_NAN_F32 = np.uint32(0x7FFFFFFF)
_HALF_ULP_OF_F32 = np.uint64(1 << 28)  # in the bits of a float64
_BELOW_F32 = np.uint64((1 << 29) - 1)
_SMALLEST_NORMAL = np.float32(2.0**-126)


def numpy_type(name: str) -> type:
    """The numpy type that a register read as PTX type `name` is viewed as; bf16 and packed types stay bits."""
    if name in ("f16", "f32", "f64"):
        return {"f16": np.float16, "f32": np.float32, "f64": np.float64}[name]
    return SIGNED[WIDTH[name]] if name[0] == "s" else UNSIGNED[WIDTH[name]]


def bf16_to_f32(bits: ndarray) -> ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: ndarray) -> ndarray:
    """Rounds to nearest, ties to even; NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(value)
    return np.where(nan, np.uint16(0x7FFF), rounded) if nan.any() else rounded


def f32_to_f16(value: ndarray) -> ndarray:
    """Rounds to nearest, ties to even, as bits; NaN becomes 0x7fff."""
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(value, np.float32).astype(np.float16).view(np.uint16)
    nan = np.isnan(value)
    return np.where(nan, np.uint16(0x7FFF), bits) if nan.any() else bits


def f32_to_e4m3(value: ndarray) -> ndarray:
    """Rounds to nearest, ties to even, as bits; what is larger than 448 becomes 448 (.satfinite), NaN becomes 0x7f."""
    size = np.minimum(np.abs(value.astype(np.float64)), 448.0)
    exponent = np.where(size == 0, -6, np.maximum(np.frexp(size)[1] - 1, -6))
    eighths = np.rint(np.ldexp(size, 3 - exponent))  # of a power of two: 8 to 16, less below the normal numbers
    bits = (exponent + 6) * 8 + np.where(np.isnan(value), 0, eighths).astype(np.int64) | np.signbit(value) * 128
    return np.where(np.isnan(value), 0x7F, bits).astype(np.uint8)


def pair_to_e4m3(high: ndarray, low: ndarray) -> ndarray:
    return (f32_to_e4m3(high).astype(np.uint16) << np.uint16(8)) | f32_to_e4m3(low)


def f32_to_f16_towards_zero(value: ndarray) -> ndarray:
    """The float16 bits; NaN becomes 0x7fff."""
    half = f32_to_f16(value).view(np.float16)
    over = np.abs(half.astype(np.float32)) > np.abs(value)
    return np.where(over, np.nextafter(half, np.float16(0)), half).view(np.uint16)


def to_f32(bits: ndarray, kind: str) -> ndarray:
    """16-bit floating-point numbers of `kind`, f16 or bf16, as float32."""
    return bf16_to_f32(bits) if kind == "bf16" else np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def from_f32(value: ndarray, kind: str) -> ndarray:
    return f32_to_bf16(value) if kind == "bf16" else f32_to_f16(value)


def halves(bits: ndarray, kind: str) -> ndarray:
    """(..., 2) float32 of packed pairs, the lower half first."""
    pairs = np.ascontiguousarray(bits, np.uint32).reshape(*bits.shape, 1).view(np.uint16)
    return to_f32(pairs, kind)


def truncate_to_tf32(bits: ndarray) -> ndarray:
    """float32 whose lower 13 bits the matrix units ignore."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def flush(value: ndarray) -> ndarray:
    """`.ftz`: subnormal float32 become zeros of their sign."""
    small = np.abs(value) < _SMALLEST_NORMAL
    return np.where(small, np.copysign(np.float32(0), value), value) if small.any() else value


def canonical(value: ndarray) -> ndarray:
    """float32 with PTX's one NaN."""
    nan = np.isnan(value)
    return np.where(nan, _NAN_F32.view(np.float32), value) if nan.any() else value


def fma_f32(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    """a * b + c rounded once.

    The product is exact in float64. The float64 sum is rounded, and rounding it again to float32 is wrong only where it lies on a
    tie of float32 or in its subnormal range: there the sum is rounded to odd first (Boldo and Melquiond 2008).
    """
    product = a.astype(np.float64) * b
    total = product + c
    doubtful = (total.view(np.uint64) & _BELOW_F32) == _HALF_ULP_OF_F32
    doubtful |= np.abs(total) < 2.0**-126
    if doubtful.any():
        product, c = np.broadcast_arrays(product, c.astype(np.float64))
        total[doubtful] = _round_to_odd(total[doubtful], product[doubtful], c[doubtful])
    return canonical(total.astype(np.float32))


def _round_to_odd(total: ndarray, a: ndarray, b: ndarray) -> ndarray:
    """total = a + b in float64, moved to the neighbour with an odd last bit where the sum was inexact."""
    other = total - a
    error = (a - (total - other)) + (b - other)
    bits = total.view(np.int64)
    away = np.where((error > 0) == (total > 0), 1, -1)
    adjust = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    return np.where(adjust, bits + away, bits).view(np.float64)


def extreme(largest: bool, propagate_nan: bool) -> Callable[[ndarray, ndarray], ndarray]:
    """max or min of floats: +0 is above -0; NaN is dropped, or kept with `.NaN`."""
    pick = {(True, True): np.maximum, (True, False): np.fmax, (False, True): np.minimum, (False, False): np.fmin}
    choose = pick[largest, propagate_nan]

    def apply(a: ndarray, b: ndarray) -> ndarray:
        result = canonical(choose(a, b))
        zeros = (a == 0) & (b == 0)
        if not zeros.any():
            return result
        signs = np.signbit(a) & np.signbit(b) if largest else np.signbit(a) | np.signbit(b)
        return np.where(zeros, np.where(signs, result.dtype.type(-0.0), result.dtype.type(0.0)), result)

    return apply


# ---- approximate instructions

# The largest errors of float32 results that the PTX ISA documents, in the notes of each instruction (chapter 9.7.3, "Floating-Point
# Instructions", of version 9.1): relative, but absolute for lg2 of operands between 0.5 and 2. The ISA's text was read for lg2, ex2
# and tanh. For rsqrt and div.full it is as other projects quote it, for rcp as given in NVIDIA's forum (1 ulp). For sqrt none was
# found.
APPROXIMATION_BOUNDS = {
    "lg2": 2.0**-22,  # 9.7.3.20
    "rcp": 2.0**-23,  # 9.7.3.13, which says 1 ulp: at least 2^-24 and at most 2^-23 of the result
    "rsqrt": 2.0**-22.9,  # 9.7.3.16
    "sqrt": 2.0**-23,  # 9.7.3.15
    "tanh": 2.0**-11,  # 9.7.3.22
}
_EXPONENTIAL_ULPS = 2  # of ex2, off the correctly rounded result: 9.7.3.21
_DIVISION_ULPS = 2  # of div.full and div.approx, off the quotient: 9.7.3.8
_ROUNDING = 2.0**-24  # of the moved result to float32, part of the bound


class Approximations:
    """ex2, lg2, rcp, rsqrt, sqrt, div.full, div.approx and tanh of float32: correctly rounded, or off by up to their bounds.

    Args:
        seed: None for exact results. Else each result is moved by a part of its bound that a hash of seed and operand bits gives:
            the same operands give the same result, as on a GPU. Zeros, infinities and NaN stay exact.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def unary(self, name: str) -> Callable[[ndarray], ndarray]:
        compute = {
            "ex2": np.exp2,
            "lg2": np.log2,
            "rcp": np.reciprocal,
            "rsqrt": lambda x: 1 / np.sqrt(x),
            "sqrt": np.sqrt,
            "tanh": np.tanh,
        }[name]

        def apply(a: ndarray) -> ndarray:
            exact = compute(a.astype(np.float64))
            if self.seed is None:
                return canonical(exact.astype(np.float32))
            if name == "ex2":
                return self._moved_by_ulps(exact, self._fraction(a), a == 0)
            if name == "lg2":
                magnitude = np.where((a > 0.5) & (a < 2), 1.0, exact)
                return self._moved(exact, magnitude, name, self._fraction(a), exact == 0)
            return self._moved(exact, exact, name, self._fraction(a), (exact == 0) | (a == 0))

        return apply

    def divide(self, a: ndarray, b: ndarray) -> ndarray:
        """div.full."""
        exact = a.astype(np.float64) / b.astype(np.float64)
        if self.seed is None:
            return canonical(exact.astype(np.float32))
        unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        moved = exact + (_DIVISION_ULPS - 0.5) * unit * self._fraction(*np.broadcast_arrays(a, b))
        return canonical(np.where((exact == 0) | ~np.isfinite(unit), exact, moved).astype(np.float32))

    def divide_approximately(self, a: ndarray, b: ndarray) -> ndarray:
        """div.approx: a * (1 / b), where the reciprocal of a divisor between 2^126 and 2^128 is 0."""
        huge = np.isfinite(b) & (np.abs(b) > np.float32(2.0**126))
        zero = np.copysign(np.float32(0), a) * np.sign(b)
        return np.where(huge, canonical(np.where(np.isfinite(a), zero, np.float32(np.nan))), self.divide(a, b))

    @staticmethod
    def _moved_by_ulps(exact: ndarray, fraction: ndarray, exact_at: ndarray) -> ndarray:
        """exact, rounded and moved by whole units in the last place."""
        rounded = exact.astype(np.float32)
        unit = np.spacing(np.abs(rounded)).astype(np.float64)
        moved = rounded + unit * np.round(_EXPONENTIAL_ULPS * fraction)
        fixed = exact_at | (rounded == 0) | ~np.isfinite(unit)
        return canonical(np.where(fixed, rounded, moved).astype(np.float32))

    @staticmethod
    def _moved(exact: ndarray, magnitude: ndarray, name: str, fraction: ndarray, exact_at: ndarray) -> ndarray:
        """exact, moved by a fraction of the bound on errors of `magnitude`."""
        moved = exact + magnitude * ((APPROXIMATION_BOUNDS[name] - _ROUNDING) * fraction)
        return canonical(np.where(exact_at | ~np.isfinite(exact), exact, moved).astype(np.float32))

    def _fraction(self, *operands: ndarray) -> ndarray:
        """A number in [-1, 1), determined by the seed and the bits of the operands."""
        mixed = np.uint64(self.seed * 0x9E3779B97F4A7C15 % 2**64)
        for operand in operands:
            mixed = (mixed ^ np.ascontiguousarray(operand).view(np.uint32)) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(31)
        return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1
