"""Conversions to 8 bits and to int16: against torch's rounding and the ISA's text (9.7.9.21)."""

import numpy as np
import pytest
import torch

_EDGES = "0 -0 448 449 463.9 464 1e9 -1e9 inf -inf 0.001953125 0.0009765625 0.0029296875 1.0625 1.1875 0.0156 nan"
_DRAWN = np.random.default_rng(0).normal(0, 1, 400) * 2.0 ** np.random.default_rng(1).integers(-12, 10, 400)
VALUES = np.concatenate([_DRAWN, [float(edge) for edge in _EDGES.split()]]).astype(np.float32)


def expected_bits(values):
    clamped = torch.from_numpy(values).clamp(-448, 448)
    bits = clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return np.where(np.isnan(values), 0x7F, bits)


def padded(values):
    return np.resize(values, 512).astype(np.float32)


def test_two_float32_become_two_e4m3_the_first_one_above(execute):
    low, high = padded(VALUES), padded(VALUES[::-1])
    body = "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2;"
    (found,) = execute(body, {"%r1": high.view(np.uint32), "%r2": low.view(np.uint32)}, ["%rs1"], threads=512)
    assert (found >> 8 == expected_bits(high)).all() and (found & 255 == expected_bits(low)).all()


def test_two_float16_become_two_e4m3(execute):
    with np.errstate(over="ignore"):
        halves = np.stack([padded(VALUES), padded(VALUES[::-1])], 1).astype(np.float16)
    packed = np.ascontiguousarray(halves).view(np.uint32)[:, 0]
    (found,) = execute("cvt.rn.satfinite.e4m3x2.f16x2 %rs1, %r1;", {"%r1": packed}, ["%rs1"], threads=512)
    assert (found & 255 == expected_bits(halves[:, 0].astype(np.float32))).all()
    assert (found >> 8 == expected_bits(halves[:, 1].astype(np.float32))).all()


@pytest.mark.parametrize(
    "value, bits",
    [
        (1.0009, 0x3C00),
        (-1.0009, 0xBC00),
        (65535.0, 0x7BFF),
        (np.inf, 0x7C00),
        (6e-8, 0x0001),
        (5e-8, 0),
        (0.1, 0x2E66),
    ],
)
def test_rounding_to_float16_towards_zero(execute, value, bits):
    given = np.array([value], np.float32).view(np.uint32)
    (found,) = execute("cvt.rz.f16.f32 %rs1, %r1;", {"%r1": given}, ["%rs1"])
    assert (found == bits).all()


@pytest.mark.parametrize(
    "value, expected", [(-1.9, -1), (127.0, 127), (4e4, 32767), (-4e4, -32768), (np.nan, 0), (np.inf, 32767)]
)
def test_float32_to_int16(execute, value, expected):
    given = np.array([value], np.float32).view(np.uint32)
    (found,) = execute("cvt.rzi.s16.f32 %rs1, %r1;", {"%r1": given}, ["%rs1"])
    assert (found.view(np.int16) == expected).all()
