"""Floating-point arithmetic, comparison and conversion, by bits worked out from IEEE 754 and the PTX ISA (9.7.3 to 9.7.9)."""

import math
from fractions import Fraction

import numpy as np
import pytest

from fastdeit.testing.ptx import formats
from fastdeit.testing.ptx.machine import Schedule

INF, NINF, NAN = 0x7F800000, 0xFF800000, 0x7FFFFFFF  # PTX's one NaN
ONE, MINUS, TWO = 0x3F800000, 0xBF800000, 0x40000000
LARGEST, SUBNORMAL, SMALLEST = 0x7F7FFFFF, 0x00000001, 0x00800000
ULP = 0x34000000  # 2^-23

UNARY = [
    ("neg.f32", ONE, MINUS),
    ("neg.f32", 0, 0x80000000),
    ("abs.f32", 0xFF800000, INF),
    ("rcp.approx.ftz.f32", 0x80000001, NINF),  # a flushed -subnormal is -0
    ("rcp.approx.ftz.f32", TWO, 0x3F000000),
    ("rsqrt.approx.ftz.f32", 0x40800000, 0x3F000000),
    ("rsqrt.approx.ftz.f32", 0, INF),
    ("rsqrt.approx.ftz.f32", MINUS, NAN),
    ("sqrt.approx.ftz.f32", 0x40800000, TWO),
    ("ex2.approx.f32", 0xC3150000, SUBNORMAL),  # 2^-149
    ("ex2.approx.ftz.f32", 0xC2FE0000, 0),  # 2^-127 is subnormal: flushed
    ("ex2.approx.ftz.f32", 0x40400000, 0x41000000),
    ("ex2.approx.ftz.f32", NINF, 0),
    ("ex2.approx.ftz.f32", 0x43000000, INF),
    ("lg2.approx.ftz.f32", 0x41000000, 0x40400000),
    ("lg2.approx.ftz.f32", 0, NINF),
    ("lg2.approx.ftz.f32", MINUS, NAN),
    ("tanh.approx.f32", INF, ONE),
    ("cvt.rna.tf32.f32", 0x3F801000, 0x3F802000),  # ties away from zero
    ("cvt.rni.s32.f32", 0x40200000, 2),  # 2.5, to even
    ("cvt.rzi.s32.f32", 0xC02CCCCD, -2),
    ("cvt.rmi.s32.f32", 0xC02CCCCD, -3),
    ("cvt.rpi.s32.f32", 0x40200000, 3),
    ("cvt.rzi.s32.f32", INF, 0x7FFFFFFF),
    ("cvt.rzi.s32.f32", NAN, 0),
    ("cvt.rzi.u32.f32", MINUS, 0),
    ("cvt.rn.f32.s32", 0x01000001, 0x4B800000),  # 2^24 + 1 rounds to even
    ("cvt.rn.f32.s32", -3, 0xC0400000),
    ("cvt.rn.f32.u32", 0xFFFFFFFF, 0x4F800000),
]

BINARY = [
    ("add.f32", ONE, 0x33800000, ONE),  # 1 + 2^-24: a tie, to even
    ("add.f32", 0x3F800001, 0x33800000, 0x3F800002),  # the other tie
    ("add.f32", INF, NINF, NAN),
    ("add.f32", LARGEST, LARGEST, INF),
    ("add.f32", 0x00000001, 0x00000001, 0x00000002),  # subnormals are kept
    ("add.ftz.f32", 0x00000001, 0x00000001, 0),
    ("sub.f32", ONE, ONE, 0),
    ("mul.f32", SMALLEST, 0x3F000000, 0x00400000),
    ("mul.ftz.f32", SMALLEST, 0x3F000000, 0),
    ("mul.f32", 0, INF, NAN),
    ("mul.f32", MINUS, 0, 0x80000000),
    ("div.full.f32", ONE, 0, INF),
    ("div.full.f32", 0, 0, NAN),
    ("div.full.f32", 0x40C00000, 0x40000000, 0x40400000),
    ("div.full.f32", 0x7E800000, 0x7F000000, 0x3F000000),  # 2^126 / 2^127
    ("div.approx.f32", 0x40C00000, 0x40000000, 0x40400000),
    ("div.approx.f32", ONE, 0, INF),
    ("div.approx.f32", 0, 0, NAN),
    ("div.approx.f32", ONE, INF, 0),
    ("div.approx.f32", 0x7E000000, 0x7E800000, 0x3F000000),  # 2^125 / 2^126
    ("div.approx.f32", 0x7E800000, 0x7F000000, 0),  # a divisor above 2^126
    ("div.approx.f32", 0x7E800000, LARGEST, 0),
    ("div.approx.f32", INF, 0x7F000000, NAN),
    ("div.approx.ftz.f32", 0x00000001, SMALLEST, 0),
    ("div.rn.f32", ONE, 0x40400000, 0x3EAAAAAB),
    ("max.f32", 0x7FC00000, ONE, ONE),  # drops NaN
    ("max.NaN.f32", 0x7FC00000, ONE, NAN),
    ("max.f32", 0x80000000, 0, 0),  # +0 is above -0
    ("max.f32", 0x7FC00000, 0x7FC00001, NAN),
    ("min.NaN.f32", ONE, 0xFFC00000, NAN),
    ("min.NaN.f32", 0, 0x80000000, 0x80000000),
    ("min.f32", ONE, TWO, ONE),
    ("min.NaN.f32", ONE, MINUS, MINUS),
]


def bits(value):
    return np.uint32(value & 0xFFFFFFFF)


@pytest.mark.parametrize("opcode, a, expected", UNARY)
def test_unary(execute, opcode, a, expected):
    (found,) = execute(f"{opcode} %r2, %r1;", {"%r1": bits(a)}, ["%r2"])
    assert hex(found[0]) == hex(bits(expected))


@pytest.mark.parametrize("opcode, a, b, expected", BINARY)
def test_binary(execute, opcode, a, b, expected):
    (found,) = execute(f"{opcode} %r3, %r1, %r2;", {"%r1": bits(a), "%r2": bits(b)}, ["%r3"])
    assert hex(found[0]) == hex(bits(expected))


FMA = [
    ("fma.rn.f32", ONE, ONE, MINUS, 0),
    # (1 + 2^-23)^2 - (1 + 2^-22) = 2^-46: lost where the product is rounded first
    ("fma.rn.f32", 0x3F800001, 0x3F800001, 0xBF800002, 0x28800000),
    ("fma.rn.f32", INF, 0, ONE, NAN),
    ("fma.rn.f32", 0x00000001, 0x3F000000, 0x00000001, 0x00000002),  # 1.5 of the smallest: a tie
    ("fma.rn.ftz.f32", 0x00000001, ONE, 0, 0),
]


@pytest.mark.parametrize("opcode, a, b, c, expected", FMA)
def test_fused_multiply_add(execute, opcode, a, b, c, expected):
    inputs = {"%r1": bits(a), "%r2": bits(b), "%r3": bits(c)}
    (found,) = execute(f"{opcode} %r4, %r1, %r2, %r3;", inputs, ["%r4"])
    assert hex(found[0]) == hex(expected)


def rounded(exact: Fraction) -> np.float32:
    """A rational as the nearest float32, ties to even, subnormals included."""
    if exact == 0:
        return np.float32(0)
    exponent = max(math.floor(math.log2(abs(exact))) - 23, -149)
    while abs(exact) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    while exponent > -149 and abs(exact) < Fraction(2) ** (exponent + 23):
        exponent -= 1
    return np.float32(round(exact / Fraction(2) ** exponent) * 2.0**exponent)  # round() is to even


def test_fma_rounds_once_where_float64_would_round_twice():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(1 << 23, 1 << 24, 400).astype(np.float32) * np.float32(2.0**-23) for _ in range(2))
    # c puts the sum a hair beside a tie of float32: the float64 sum is the tie itself
    product = a.astype(np.float64) * b
    near = product.astype(np.float32).astype(np.float64)
    c = (np.spacing(near.astype(np.float32)) / 2 * 2.0**30 + (near - product) * 2.0**30).astype(np.float32)
    operands = [
        (a, b, c),
        (a, b, np.float32(2.0**30) * a),
        (a * np.float32(2.0**-70), b * np.float32(2.0**-70), a * np.float32(2.0**-149)),
    ]
    for x, y, z in operands:
        got = formats.fma_f32(x, y, z)
        expected = [
            rounded(Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r)))
            for p, q, r in zip(x, y, z, strict=True)
        ]
        assert got.tolist() == [float(e) for e in expected]
    tie = formats.fma_f32(np.float32([2.0**-30]), np.float32([2.0**-30]), np.float32([1.0 + 2.0**-23]))
    assert tie.tolist() == [1.0 + 2.0**-23]
    # 1 + 2^-24 + 2^-70: above the tie, though float64 cannot tell
    assert formats.fma_f32(
        np.float32([1 + 2.0**-12]), np.float32([1 + 2.0**-12]), np.float32([-(2.0**-11)])
    ).tolist() == [1.0]
    x = np.float32([2.0**-35 + 2.0**-58])
    y = np.float32([2.0**11])  # product 2^-24 + 2^-47
    assert formats.fma_f32(x, y, np.float32([1.0])).tolist() == [1.0 + 2.0**-23]
    tiny = formats.fma_f32(
        np.float32([2.0**-12 * (1 + 2.0**-23)]), np.float32([2.0**-12 * (1 + 2.0**-23)]), np.float32([1.0])
    )
    assert tiny.tolist() == [1.0 + 2.0**-23]


HALF = [
    # 16-bit operations are rounded once, from float32
    ("add.f16x2", "f16", (0x3C00, 0x7BFF), (0x3C01, 0x7BFF), (0x4000, 0x7C00)),  # 2 + 2^-10 is a tie; overflow
    ("add.bf16x2", "bf16", (0x3F80, 0x7F7F), (0x3B80, 0x7F7F), (0x3F80, 0x7F80)),
    ("mul.f16x2", "f16", (0x0001, 0x3C00), (0x3800, 0x4200), (0x0000, 0x4200)),
    ("mul.bf16x2", "bf16", (0x3F81, 0x4000), (0x3F81, 0xC000), (0x3F82, 0xC080)),
    ("max.bf16x2", "bf16", (0x7FC0, 0x8000), (0x3F80, 0x0000), (0x3F80, 0x0000)),
]


@pytest.mark.parametrize("opcode, kind, a, b, expected", HALF)
def test_packed_halves(execute, opcode, kind, a, b, expected):
    inputs = {"%r1": bits(a[0] | a[1] << 16), "%r2": bits(b[0] | b[1] << 16)}
    (found,) = execute(f"{opcode} %r3, %r1, %r2;", inputs, ["%r3"])
    assert (hex(found[0] & 0xFFFF), hex(found[0] >> 16)) == tuple(map(hex, expected))


def test_packed_fma_rounds_once(execute):
    x = 0x3F81  # 1 + 2^-7 in bf16
    inputs = {"%r1": bits(x | x << 16), "%r2": bits(x | x << 16), "%r3": bits(0xBF82 | 0)}
    (found,) = execute("fma.rn.bf16x2 %r4, %r1, %r2, %r3;", inputs, ["%r4"])
    assert found[0] & 0xFFFF == 0x3880  # (1 + 2^-7)^2 - (1 + 2^-6) = 2^-14
    assert found[0] >> 16 == 0x3F82


@pytest.mark.parametrize(
    "opcode, expected", [("add.f32x2", (3.0, 7.0)), ("sub.f32x2", (-1.0, -1.0)), ("mul.f32x2", (2.0, 12.0))]
)
def test_pairs_of_float32(execute, opcode, expected):
    pair = lambda a, b: np.float32([a, b]).view(np.uint64)  # noqa: E731
    (found,) = execute(f"{opcode} %rd3, %rd1, %rd2;", {"%rd1": pair(1, 3), "%rd2": pair(2, 4)}, ["%rd3"])
    assert found[:1].view(np.float32).tolist() == list(expected)
    (found,) = execute("fma.rn.f32x2 %rd3, %rd1, %rd1, %rd2;", {"%rd1": pair(1, 3), "%rd2": pair(2, 4)}, ["%rd3"])
    assert found[:1].view(np.float32).tolist() == [3.0, 13.0]


CONVERSIONS = [
    ("cvt.rn.bf16.f32", 0x3F808000, 0x3F80),  # ties to even, down
    ("cvt.rn.bf16.f32", 0x3F818000, 0x3F82),  # and up
    ("cvt.rn.bf16.f32", 0x7F7FFFFF, 0x7F80),
    ("cvt.rn.bf16.f32", 0x7F800001, 0x7FFF),  # a NaN whose upper half is no NaN
    ("cvt.rn.bf16.f32", 0x00008001, 0x0001),
    ("cvt.rn.f16.f32", 0x477FE000, 0x7BFF),  # 65504
    ("cvt.rn.f16.f32", 0x477FF000, 0x7C00),  # 65520 rounds to infinity
    ("cvt.rn.f16.f32", 0x33000000, 0x0000),  # half the smallest: a tie, to even
    ("cvt.rn.f16.f32", 0x33000001, 0x0001),
    ("cvt.rn.f16.f32", 0xFFC00000, 0x7FFF),
]


@pytest.mark.parametrize("opcode, a, expected", CONVERSIONS)
def test_rounding_to_16_bits(execute, opcode, a, expected):
    (found,) = execute(f"{opcode} %rs1, %r1;", {"%r1": bits(a)}, ["%rs1"])
    assert hex(found[0]) == hex(expected)


@pytest.mark.parametrize("opcode", ["cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"])
def test_the_first_operand_is_the_upper_half(execute, opcode):
    (found,) = execute(f"{opcode} %r3, %r1, %r2;", {"%r1": bits(ONE), "%r2": bits(TWO)}, ["%r3"])
    assert found[0] == (0x3F804000 if "bf16" in opcode else 0x3C004000)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_widening_keeps_every_16_bit_number(execute, kind):
    every = np.arange(1 << 16, dtype=np.uint16)
    for part in every.reshape(-1, 32)[::61]:
        (found,) = execute(f"cvt.f32.{kind} %r1, %rs1;", {"%rs1": part}, ["%r1"])
        exact = (
            (part.astype(np.uint32) << 16).view(np.float32)
            if kind == "bf16"
            else part.view(np.float16).astype(np.float32)
        )
        got = found.view(np.float32)
        assert ((got == exact) & (np.signbit(got) == np.signbit(exact)) | np.isnan(exact) & (found == NAN)).all()


@pytest.mark.parametrize(
    "opcode, a, expected", [("abs.bf16", 0xBF80, 0x3F80), ("neg.bf16", 0x3F80, 0xBF80), ("abs.f16", 0xBC00, 0x3C00)]
)
def test_sign_operations_of_16_bits(execute, opcode, a, expected):
    (found,) = execute(f"{opcode} %rs2, %rs1;", {"%rs1": np.uint16(a)}, ["%rs2"])
    assert found[0] == expected


# numbers 1 and 2, NaN: every comparison with NaN is false, but those that end in u, and nan
COMPARISONS = [
    ("eq", 0b0100),
    ("ne", 0b1010),
    ("lt", 0b0010),
    ("le", 0b0110),
    ("gt", 0b1000),
    ("ge", 0b1100),
    ("num", 0b1110),
]
UNORDERED = [
    ("equ", 0b0101),
    ("neu", 0b1011),
    ("ltu", 0b0011),
    ("leu", 0b0111),
    ("gtu", 0b1001),
    ("geu", 0b1101),
    ("nan", 0b0001),
]
FORMATS = [
    ("f32", (0x3F800000, 0x40000000, 0x7FC00000)),
    ("f16", (0x3C00, 0x4000, 0x7E00)),
    ("bf16", (0x3F80, 0x4000, 0x7FC0)),
]


@pytest.mark.parametrize("name, expected", COMPARISONS + UNORDERED)
@pytest.mark.parametrize("kind, values", FORMATS)
def test_comparison(execute, name, expected, kind, values):
    """2 with 1, 1 with 1, 1 with 2, 1 with NaN."""
    one, two, nan = values
    register, dtype = ("%r", np.uint32) if kind == "f32" else ("%rs", np.uint16)
    a, b = np.resize(np.array([two, one, one, one], dtype), 32), np.resize(np.array([one, one, two, nan], dtype), 32)
    (found,) = execute(
        f"setp.{name}.{kind} %p1, {register}1, {register}2;", {f"{register}1": a, f"{register}2": b}, ["%p1"]
    )
    assert "".join(map(str, found[:4])) == f"{expected:04b}"


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_comparison_of_pairs_gives_two_predicates(execute, kind):
    one, two = (0x3C00, 0x4000) if kind == "f16" else (0x3F80, 0x4000)
    inputs = {"%r1": bits(one | two << 16), "%r2": bits(two | one << 16)}
    low, high = execute(f"setp.ge.{kind}x2 %p1|%p2, %r1, %r2;", inputs, ["%p1", "%p2"])
    assert not low.any() and high.all()


@pytest.mark.parametrize("name", ["lg2", "rcp", "rsqrt", "sqrt", "tanh"])
def test_approximations_err_within_their_bounds_and_not_by_nothing(name):
    x = np.geomspace(1e-3, 60, 20_000).astype(np.float32)
    exact = formats.Approximations(None).unary(name)(x).astype(np.float64)
    moved = formats.Approximations(7).unary(name)(x).astype(np.float64)
    wide = x.astype(np.float64)
    true = {
        "lg2": np.log2,
        "rcp": lambda v: 1 / v,
        "rsqrt": lambda v: v**-0.5,
        "sqrt": np.sqrt,
        "tanh": np.tanh,
    }[name](wide)
    scale = np.where((wide > 0.5) & (wide < 2), 1.0, np.abs(true)) if name == "lg2" else np.abs(true)
    assert (np.abs(exact - true) <= 2.0**-24 * np.abs(true)).all()
    error = np.abs(moved - true) / scale
    assert error.max() <= formats.APPROXIMATION_BOUNDS[name] * (1 + 1e-6)
    assert error.max() > 0.7 * formats.APPROXIMATION_BOUNDS[name]
    assert (moved == formats.Approximations(7).unary(name)(x)).all(), "the same operand gives the same result"
    assert (moved != formats.Approximations(8).unary(name)(x)).any()


def test_exponentials_err_by_two_units_off_the_rounded_result():
    x = np.linspace(-140, 120, 20_000, dtype=np.float32)
    exact, moved = (formats.Approximations(seed).unary("ex2")(x) for seed in (None, 7))
    ulps = (moved.astype(np.float64) - exact) / np.spacing(exact)
    assert set(ulps.tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert (exact == np.exp2(x.astype(np.float64)).astype(np.float32)).all()


def test_full_range_division_errs_within_two_units():
    rng = np.random.default_rng(1)
    a, b = (rng.uniform(1, 2, 20_000).astype(np.float32) for _ in range(2))
    true = a.astype(np.float64) / b
    ulps = np.abs(formats.Approximations(3).divide(a, b) - true) / np.spacing(true.astype(np.float32))
    assert 1.7 < ulps.max() <= 2
    assert (formats.Approximations(None).divide(a, b) == a / b).all()
    assert (formats.Approximations(3).divide_approximately(a, b) == formats.Approximations(3).divide(a, b)).all()


def test_perturbation_reaches_the_instructions_and_leaves_special_values_alone(execute):
    body = "ex2.approx.ftz.f32 %r2, %r1;\ndiv.full.f32 %r3, %r1, %r1;"
    x = np.linspace(-3, 3, 32, dtype=np.float32)
    x[:4] = 0, np.inf, -np.inf, np.nan
    exact = execute(body, {"%r1": x.view(np.uint32)}, ["%r2", "%r3"])
    moved = execute(body, {"%r1": x.view(np.uint32)}, ["%r2", "%r3"], schedule=Schedule(seed=5, perturbed=True))
    assert (exact[0][:4] == moved[0][:4]).all() and (exact[1][:4] == moved[1][:4]).all()
    assert (exact[0][4:] != moved[0][4:]).any() and (exact[1][4:] != moved[1][4:]).any()
