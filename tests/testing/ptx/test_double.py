"""float64: arithmetic, comparison and conversion, by values worked out from the PTX ISA (9.7.3, 9.7.6, 9.7.9)."""

import numpy as np
import pytest

INF, NAN = float("inf"), float("nan")
TINY = 2.0**-1074


def bits(value):
    return np.float64(value).view(np.uint64)


@pytest.mark.parametrize(
    "opcode, a, b, expected",
    [
        ("add.rn.f64", 1.0, 2.0**-53, 1.0),  # a tie, to even
        ("add.rn.f64", 1.0, 3 * 2.0**-53, 1.0 + 2.0**-51),
        ("sub.rn.f64", INF, INF, NAN),
        ("mul.rn.f64", TINY, 0.5, 0.0),
        ("mul.rn.f64", TINY, 0.75, TINY),
        ("div.rn.f64", 1.0, 3.0, 1 / 3),
        ("div.rn.f64", -1.0, 0.0, -INF),
        ("max.f64", NAN, 1.0, 1.0),
        ("max.f64", -0.0, 0.0, 0.0),
        ("min.f64", 0.0, -0.0, -0.0),
        ("min.f64", NAN, NAN, NAN),
    ],
)
def test_binary(execute, opcode, a, b, expected):
    (found,) = execute(f"{opcode} %rd3, %rd1, %rd2;", {"%rd1": bits(a), "%rd2": bits(b)}, ["%rd3"])
    value = found[:1].view(np.float64)[0]
    assert np.isnan(value) if np.isnan(expected) else (value == expected and np.signbit(value) == np.signbit(expected))


def test_an_immediate_of_64_bits(execute):
    (found,) = execute("add.rn.f64 %rd2, %rd1, 0d3FE0000000000000;", {"%rd1": bits(2.0)}, ["%rd2"])
    assert found[0] == bits(2.5)


@pytest.mark.parametrize(
    "opcode, a, b, expected",
    [("lt", 1.0, 2.0, 1), ("lt", NAN, 2.0, 0), ("leu", NAN, 2.0, 1), ("leu", 3.0, 2.0, 0), ("ge", 2.0, 2.0, 1)],
)
def test_comparison(execute, opcode, a, b, expected):
    (found,) = execute(f"setp.{opcode}.f64 %p1, %rd1, %rd2;", {"%rd1": bits(a), "%rd2": bits(b)}, ["%p1"])
    assert found[0] == expected


@pytest.mark.parametrize(
    "opcode, a, expected",
    [
        ("cvt.rmi.f64.f64", -1.5, -2.0),
        ("cvt.rpi.f64.f64", -1.5, -1.0),
        ("cvt.rzi.f64.f64", -1.5, -1.0),
        ("cvt.rni.f64.f64", 2.5, 2.0),  # a tie, to even
    ],
)
def test_rounding_to_whole_numbers(execute, opcode, a, expected):
    (found,) = execute(f"{opcode} %rd2, %rd1;", {"%rd1": bits(a)}, ["%rd2"])
    assert found[0] == bits(expected)


@pytest.mark.parametrize(
    "opcode, a, expected",
    [
        ("cvt.rzi.s32.f64", -1.9, 0xFFFFFFFF),
        ("cvt.rzi.s32.f64", 2.0**31, 0x7FFFFFFF),  # clamps
        ("cvt.rzi.u32.f64", -5.0, 0),
        ("cvt.rni.s32.f64", 2.5, 2),
        ("cvt.rn.f32.f64", 1.0 + 2.0**-24, 0x3F800000),  # a tie, to even
        ("cvt.rn.f32.f64", 1e300, 0x7F800000),
        ("cvt.rn.f32.f64", NAN, 0x7FFFFFFF),
    ],
)
def test_narrowing(execute, opcode, a, expected):
    (found,) = execute(f"{opcode} %r1, %rd1;", {"%rd1": bits(a)}, ["%r1"])
    assert hex(found[0]) == hex(expected)


@pytest.mark.parametrize(
    "opcode, a, expected",
    [
        ("cvt.rn.f64.u32", 0xFFFFFFFF, 2.0**32 - 1),
        ("cvt.rn.f64.s32", 0xFFFFFFFF, -1.0),
        ("cvt.f64.f32", 0x3DCCCCCD, 0.100000001490116119384765625),
    ],
)
def test_widening(execute, opcode, a, expected):
    (found,) = execute(f"{opcode} %rd1, %r1;", {"%r1": np.uint32(a)}, ["%rd1"])
    assert found[0] == bits(expected)
