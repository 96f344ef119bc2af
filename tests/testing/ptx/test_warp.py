"""Shuffles, matrix fragments and products of a warp, by the layouts of the PTX ISA (9.7.9.6, 9.7.14)."""

import numpy as np
import pytest

from fastdeit.testing.ptx.program import PtxError

LANES = np.arange(32, dtype=np.uint32)


def shuffled(mode, b, c):
    """By the ISA's pseudocode, lane by lane: source lane, and whether it is in range."""
    segment, clamp = c >> 8 & 31, c & 31
    found = []
    for lane in range(32):
        lowest = lane & segment
        highest = lowest | (clamp & ~segment)
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
        inside = j >= highest if mode == "up" else j <= highest
        found.append((j if inside else lane, int(inside)))
    return found


@pytest.mark.parametrize(
    "mode, b, c",
    [
        *(("bfly", b, 31) for b in (1, 2, 4, 8, 16)),
        ("bfly", 8, 0x1807),  # within 8 lanes: out of range everywhere
        ("idx", 5, 31),
        ("idx", 37, 31),  # only five bits count
        ("idx", 3, 0x1C03),  # segments of 4
        ("up", 1, 0),
        ("up", 3, 0x1800),
        ("down", 1, 31),
        ("down", 5, 0x181F),
    ],
)
def test_shuffle(execute, mode, b, c):
    (value, inside) = execute(f"shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {c}, -1;", {"%r1": LANES + 100}, ["%r2", "%p1"])
    expected = shuffled(mode, b & 31, c)
    assert value.tolist() == [100 + j for j, _ in expected] and inside.tolist() == [i for _, i in expected]


def test_shuffle_by_a_register_and_without_a_predicate(execute):
    (value,) = execute("shfl.sync.idx.b32 %r3, %r1, %r2, 31, -1;", {"%r1": LANES + 100, "%r2": 31 - LANES}, ["%r3"])
    assert value.tolist() == [131 - lane for lane in range(32)]


def test_only_full_member_masks_are_known(execute):
    with pytest.raises(PtxError, match=r"PTX line \d+ .*only the full member mask"):
        execute("shfl.sync.bfly.b32 %r2, %r1, 1, 31, 15;", {"%r1": LANES})


def test_elect_chooses_one_lane(execute):
    (chosen,) = execute("elect.sync %r1|%p1, -1;", {}, ["%p1"], threads=64)
    assert chosen.reshape(2, 32).sum(1).tolist() == [1, 1]


def test_reduction_over_the_warp_drops_nan(execute):
    x = np.linspace(-5, 3, 32, dtype=np.float32)
    x[3] = np.nan
    body = "redux.sync.max.f32 %r2, %r1, %r9;\nredux.sync.min.f32 %r3, %r1, %r9;"
    found = execute(body, {"%r1": x.view(np.uint32), "%r9": np.uint32(0xFFFFFFFF)}, ["%r2", "%r3"])
    assert (found[0].view(np.float32) == 3).all() and (found[1].view(np.float32) == -5).all()


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_reductions_of_integers(execute, kind):
    x = np.random.default_rng(0).integers(0, 1 << 32, 64, np.uint64).astype(np.uint32)
    body = "\n".join(f"redux.sync.{name}.{kind} %r{i}, %r1, %r9;" for i, name in enumerate(("add", "min", "max"), 2))
    found = execute(body, {"%r1": x, "%r9": np.uint32(0xFFFFFFFF)}, ["%r2", "%r3", "%r4"], threads=64)
    warps = x.view(np.int32 if kind == "s32" else np.uint32).reshape(2, 32)
    with np.errstate(over="ignore"):
        expected = [warps.sum(1, dtype=warps.dtype), warps.min(1), warps.max(1)]
    for value, of_warps in zip(found, expected, strict=True):
        assert (value == np.repeat(of_warps.view(np.uint32), 32)).all()


def test_a_ballot_has_a_bit_for_each_lane(execute):
    body = "setp.lt.u32 %p1, %r1, 7;\nvote.sync.ballot.b32 %r2, %p1, -1;"
    values = np.r_[LANES, LANES + 2].astype(np.uint32)
    (found,) = execute(body, {"%r1": values}, ["%r2"], threads=64)
    assert found.tolist() == [0b1111111] * 32 + [0b11111] * 32


FILL = """
    shl.b32 %r30, %tid, 4;
    st.shared.v4.b32 [%r30], {%r1, %r2, %r3, %r4};
    bar.sync 0;
"""


def stored_matrices(count):
    """`count` 8 x 8 matrices of distinct 16-bit numbers, row after row, as what 32 threads store in 16 bytes each."""
    elements = np.arange(32 * 8, dtype=np.uint16)
    words = elements.view(np.uint32).reshape(32, 4)
    return elements.reshape(4, 8, 8)[:count], {f"%r{k + 1}": words[:, k] for k in range(4)}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(execute, count, trans):
    matrices, inputs = stored_matrices(count)
    targets = [f"%r{10 + k}" for k in range(count)]
    body = f"{FILL}ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{', '.join(targets)}}}, [%r30];"
    found = execute(body, inputs, targets, shared=512)
    for matrix, got in zip(matrices, found, strict=True):
        rows = matrix.T if trans else matrix
        expected = [
            int(rows[lane // 4, 2 * (lane % 4)]) | int(rows[lane // 4, 2 * (lane % 4) + 1]) << 16 for lane in range(32)
        ]
        assert got.tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_reverse_of_ldmatrix(execute, count, trans):
    inputs = {
        f"%r{k + 1}": LANES + np.uint32(0x1000 * (k + 1)) | (LANES + np.uint32(0x800 * (k + 1))) << 16
        for k in range(count)
    }
    sources = ", ".join(inputs)
    targets = [f"%r{10 + k}" for k in range(count)]
    body = f"""shl.b32 %r30, %tid, 4;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r30], {{{sources}}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{", ".join(targets)}}}, [%r30];"""
    found = execute(body, inputs, targets, shared=512)
    assert all((got == inputs[name]).all() for got, name in zip(found, inputs, strict=True))


def test_stmatrix_writes_rows(execute):
    """Lane l's register holds columns 2 (l % 4) and the next of row l / 4, or with .trans those rows of column l / 4."""
    value = (2 * LANES) | (2 * LANES + 1) << 16
    for trans in ("", ".trans"):
        body = f"""shl.b32 %r30, %tid, 4;
            stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r30], {{%r1}};
            bar.sync 0;
            shl.b32 %r31, %tid, 2;
            ld.shared.b32 %r2, [%r31];"""
        (found,) = execute(body, {"%r1": value}, ["%r2"], shared=512)
        matrix = found.view(np.uint16).reshape(8, 8)
        assert (np.arange(64).reshape(8, 8) == (matrix.T if trans else matrix)).all()


MMA = (
    "mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 "
    "{{%r20,%r21,%r22,%r23}}, {{%r1,%r2,%r3,%r4}}, {{%r5,%r6}}, {{%r7,%r8,%r9,%r10}};"
)
KINDS = {"bf16": (2, 16), "f16": (2, 16), "tf32": (4, 8)}


def as_bits(values, kind):
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    bits = values.astype(np.float32).view(np.uint32)
    return bits >> 16 if kind == "bf16" else bits


@pytest.mark.parametrize("kind", KINDS)
def test_mma_multiplies_fragments(execute, kind):
    """Small integers, exact in every format; fragments filled element by element by the ISA's figures."""
    rng = np.random.default_rng(0)
    size, depth = KINDS[kind]
    per = 4 // size  # elements a register
    a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8)))
    registers = {f"%r{j}": np.zeros(32, np.uint32) for j in range(1, 11)}
    for lane in range(32):
        group, position = lane // 4, lane % 4
        for j in range(4):
            for e in range(per):
                column = per * position + e + (depth // 2) * (j // 2)
                registers[f"%r{1 + j}"][lane] |= np.uint32(as_bits(a[group + 8 * (j % 2), column], kind) << 16 * e)
        for j in range(2):
            for e in range(per):
                row = per * position + e + (depth // 2) * j
                registers[f"%r{5 + j}"][lane] |= np.uint32(as_bits(b[row, group], kind) << 16 * e)
        for j in range(4):
            registers[f"%r{7 + j}"][lane] = c[group + 8 * (j // 2), 2 * position + j % 2].view(np.uint32)
    shape = f"m16n8k{depth}"
    body = MMA.format(shape=shape, kind=kind)
    found = execute(body, registers, ["%r20", "%r21", "%r22", "%r23"])
    expected = a @ b + c
    for lane in range(32):
        got = [float(found[j][lane : lane + 1].view(np.float32)[0]) for j in range(4)]
        assert got == [expected[lane // 4 + 8 * (j // 2), 2 * (lane % 4) + j % 2] for j in range(4)]


def test_tf32_operands_lose_their_lower_bits(execute):
    registers = {f"%r{j}": np.uint32(0) for j in range(1, 11)} | {
        "%r1": np.uint32(0x3F801FFF),
        "%r5": np.uint32(0x3F800000),
    }
    body = MMA.format(shape="m16n8k8", kind="tf32")
    (found,) = execute(body, registers, ["%r20"])
    assert found[0] == np.float32(4).view(np.uint32)  # four columns of ones
