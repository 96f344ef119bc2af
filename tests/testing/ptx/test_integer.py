"""Integer arithmetic, logic, shifts and moves, by values worked out from the PTX ISA (9.7.1, 9.7.8, 9.7.9)."""

import numpy as np
import pytest

M32, M64 = (1 << 32) - 1, (1 << 64) - 1
DTYPES = {2: np.uint16, 4: np.uint32, 8: np.uint64}
REGISTERS = {2: "%rs", 4: "%r", 8: "%rd"}


def case(opcode, operands, expected, widths=None, out=None):
    """opcode over operands whose widths in bytes default to that of the opcode's type."""
    width = int(opcode.rsplit(".", 1)[1][1:].removesuffix("x2")) // 8
    return pytest.param(
        opcode, operands, expected, widths or (width,) * len(operands), out or width, id=f"{opcode} {operands}"
    )


CASES = [
    case("add.s32", (0x7FFFFFFF, 1), 0x80000000),  # wraps
    case("add.s32", (5, -7), -2),
    case("add.s64", (M64, 1), 0),
    case("sub.s32", (0x80000000, 1), 0x7FFFFFFF),
    case("sub.s64", (0, 1), -1),
    case("mul.lo.s32", (0x10001, 0x10001), 0x20001),
    case("mul.lo.s32", (-3, 7), -21),
    case("mul.lo.s64", (1 << 33, (1 << 31) + 1), 1 << 33),
    case("mul.wide.s32", (-2, 0x7FFFFFFF), -2 * 0x7FFFFFFF, out=8),
    case("mul.wide.u32", (M32, M32), M32 * M32, out=8),
    case("mul.wide.s16", (-2, 0x7FFF), -2 * 0x7FFF, out=4),
    case("mul.hi.s32", (-1, 2), -1),
    case("mul.hi.u32", (M32, 2), 1),
    case("mul.hi.s64", (-1, 2), -1),
    case("mul.hi.s64", (1 << 62, 6), 1),
    case("mul.hi.s64", (1 << 63, 1 << 63), 1 << 62),
    case("mul.hi.s64", (0x123456789ABCDEF0, 0x0FEDCBA987654321), 0x123456789ABCDEF0 * 0x0FEDCBA987654321 >> 64),
    case("mul.hi.s64", (-0x123456789ABCDEF0, 0x0FEDCBA987654321), -0x123456789ABCDEF0 * 0x0FEDCBA987654321 >> 64),
    case("popc.b32", (0xF0000001,), 5),
    case("popc.b32", (M32,), 32),
    case("add.s16x2", (0x0001FFFF, 0x7FFF0001), 0x80000000, widths=(4, 4), out=4),  # no carry into the upper half
    case("min.s16x2", (0x0001FFFF, 0x7FFF0001), 0x0001FFFF, widths=(4, 4), out=4),
    case("min.u16x2", (0x0001FFFF, 0x7FFF0001), 0x00010001, widths=(4, 4), out=4),
    case("max.s16x2", (0x0001FFFF, 0x7FFF0001), 0x7FFF0001, widths=(4, 4), out=4),
    case("mad.lo.s32", (-3, 7, 30), 9),
    case("mad.lo.s64", (1 << 40, 1 << 30, 5), 5),
    case("mad.wide.s32", (-1, 4, 1 << 40), (1 << 40) - 4, widths=(4, 4, 8), out=8),
    case("mad.wide.u32", (M32, 4, 1), M32 * 4 + 1, widths=(4, 4, 8), out=8),
    case("div.s32", (-7, 2), -3),  # towards zero
    case("div.s32", (7, -2), -3),
    case("div.s32", (-8, -2), 4),
    case("div.u32", (M32, 2), 0x7FFFFFFF),
    case("rem.s32", (-7, 2), -1),  # of the sign of the first operand
    case("rem.s32", (7, -2), 1),
    case("rem.u32", (M32, 10), M32 % 10),
    case("min.s32", (-1, 1), -1),
    case("min.u32", (M32, 1), 1),
    case("max.s32", (-1, 1), 1),
    case("max.s64", (-1, 1), 1),
    case("neg.s32", (0x80000000,), 0x80000000),
    case("abs.s32", (-5,), 5),
    # bfe: position and length are taken modulo 256; bits past the highest are its sign, or zeros
    case("bfe.u32", (0xABCD1234, 8, 8), 0x12),
    case("bfe.u32", (0xABCD1234, 28, 8), 0xA),
    case("bfe.u32", (0xABCD1234, 0, 32), 0xABCD1234),
    case("bfe.u32", (0xABCD1234, 40, 4), 0),
    case("bfe.s32", (0xABCD1234, 16, 8), 0xFFFFFFCD),
    case("bfe.s32", (0xABCD1234, 28, 8), 0xFFFFFFFA),
    case("bfe.s32", (0x80000000, 40, 4), M32),
    case("bfe.s32", (0xABCD1234, 16, 0), 0),
    case("bfe.s32", (4, 2, 1), M32),
    case("and.b32", (0b1100, 0b1010), 0b1000),
    case("and.b16", (0xFF0F, 0x0FF0), 0x0F00),
    case("and.b64", (M64, 1 << 63), 1 << 63),
    case("or.b32", (0b1100, 0b1010), 0b1110),
    case("or.b16", (0xF000, 0x000F), 0xF00F),
    case("or.b64", (1, 1 << 63), 1 << 63 | 1),
    case("xor.b32", (0b1100, 0b1010), 0b0110),
    case("xor.b64", (M64, 1), M64 - 1),
    case("not.b32", (0,), M32),
    case("not.b64", (1,), M64 - 1),
    case("shl.b32", (1, 31), 1 << 31),
    case("shl.b32", (1, 32), 0),  # clamps
    case("shl.b16", (3, 15), 1 << 15, widths=(2, 4)),
    case("shl.b64", (1, 40), 1 << 40, widths=(8, 4)),
    case("shl.b64", (1, 64), 0, widths=(8, 4)),
    case("shr.s32", (0x80000000, 31), M32),
    case("shr.s32", (0x80000000, 99), M32),  # clamps to the sign
    case("shr.u32", (0x80000000, 31), 1),
    case("shr.u32", (0x80000000, 32), 0),
    case("shr.u16", (0x8000, 15), 1, widths=(2, 4)),
    case("shr.s64", (1 << 63, 62), -2, widths=(8, 4)),
    case("shf.l.wrap.b32", (0x80000001, 0x00000002, 33), 5),
    case("shf.r.wrap.b32", (0x80000001, 0x00000003, 1), 0xC0000000),
    case("prmt.b32", (0x33221100, 0x77665544, 0x7410), 0x77441100),
    case("prmt.b32", (0x33228100, 0x77665544, 0x0009), 0x000000FF),  # the sign of byte 1
    case("cvt.s64.s32", (-1,), -1, widths=(4,), out=8),
    case("cvt.u64.u32", (M32,), M32, widths=(4,), out=8),
    case("cvt.u32.u64", ((1 << 40) + 5,), 5, widths=(8,), out=4),
    case("cvt.u16.u32", (0x12345,), 0x2345, widths=(4,), out=2),
    case("cvt.u32.u16", (0xFFFF,), 0xFFFF, widths=(2,), out=4),
    case("cvt.s32.s16", (0xFFFF,), M32, widths=(2,), out=4),
    case("mov.b32", (7,), 7),
    case("mov.u32", (7,), 7),
    case("mov.b16", (7,), 7),
    case("mov.u16", (7,), 7),
    case("mov.b64", (M64,), M64),
    case("mov.u64", (M64,), M64),
    case("cvta.param.u64", (1 << 60,), 1 << 60),
    case("cvta.to.global.u64", (1 << 40,), 1 << 40),
]


@pytest.mark.parametrize("opcode, operands, expected, widths, out", CASES)
def test_value(execute, opcode, operands, expected, widths, out):
    names = [f"{REGISTERS[width]}{i}" for i, width in enumerate(widths, 1)]
    inputs = {n: DTYPES[w](v & (1 << 8 * w) - 1) for n, v, w in zip(names, operands, widths, strict=True)}
    target = f"{REGISTERS[out]}20"
    (found,) = execute(f"{opcode} {target}, {', '.join(names)};", inputs, [target])
    assert (found == DTYPES[out](expected & (1 << 8 * out) - 1)).all(), hex(found[0])


def test_immediates_are_cut_to_the_operand_s_width(execute):
    found = execute(
        "add.s32 %r1, %r9, -1;\nand.b16 %rs1, %rs2, -2;", {"%r9": np.uint32(0), "%rs2": np.uint16(7)}, ["%r1", "%rs1"]
    )
    assert found[0][0] == M32 and found[1][0] == 6


@pytest.mark.parametrize("table", [0x80, 0xFE, 0x96, 0xE8, 0xCA])
def test_lop3_is_a_truth_table(execute, table):
    a, b, c = np.uint32(0xF0), np.uint32(0xCC), np.uint32(0xAA)  # the columns of the table
    (found,) = execute(f"lop3.b32 %r4, %r1, %r2, %r3, {table};", {"%r1": a, "%r2": b, "%r3": c}, ["%r4"])
    assert found[0] & 0xFF == table


@pytest.mark.parametrize(
    "opcode, a, b, expected",
    [
        ("setp.eq.b32", 5, 5, 1),
        ("setp.ne.b32", 5, 5, 0),
        ("setp.lt.s32", -1, 0, 1),
        ("setp.lt.u32", -1, 0, 0),
        ("setp.le.s32", 3, 3, 1),
        ("setp.gt.s32", -2, -3, 1),
        ("setp.ge.s32", -3, -2, 0),
        ("setp.eq.b64", 1 << 32, 0, 0),
        ("setp.lt.s64", -1, 0, 1),
        ("setp.ge.s64", -1, 0, 0),
        ("setp.lt.u64", -1, 0, 0),
        ("setp.eq.b16", 0x10001, 1, 1),
        ("setp.ne.b16", 2, 1, 1),
        ("setp.lt.u16", 999, 1000, 1),
        ("setp.lt.u16", 0xFFFF, 1, 0),
    ],
)
def test_comparison(execute, opcode, a, b, expected):
    width = int(opcode[-2:]) // 8
    x, y = f"{REGISTERS[width]}1", f"{REGISTERS[width]}2"
    inputs = {x: DTYPES[width](a & (1 << 8 * width) - 1), y: DTYPES[width](b & (1 << 8 * width) - 1)}
    (found,) = execute(f"{opcode} %p1, {x}, {y};", inputs, ["%p1"])
    assert (found == expected).all()


@pytest.mark.parametrize("opcode, table", [("and.pred", "0001"), ("or.pred", "0111"), ("xor.pred", "0110")])
def test_logic_of_predicates(execute, opcode, table):
    lane = np.arange(32, dtype=np.uint32)
    body = f"setp.ne.b32 %p1, %r1, 0;\nsetp.ne.b32 %p2, %r2, 0;\n{opcode} %p3, %p1, %p2;\nnot.pred %p4, %p3;\nmov.pred %p5, -1;"
    found = execute(body, {"%r1": lane & 1, "%r2": lane >> 1 & 1}, ["%p3", "%p4", "%p5"])
    assert "".join(map(str, found[0][[0, 1, 2, 3]])) == table
    assert (found[1] == 1 - found[0]).all() and found[2].all()


@pytest.mark.parametrize(
    "opcode, register", [("selp.b32", "%r"), ("selp.f32", "%r"), ("selp.b16", "%rs"), ("selp.b64", "%rd")]
)
def test_selection_by_a_predicate(execute, opcode, register):
    lane = np.arange(32, dtype=np.uint32)
    width = next(w for w, r in REGISTERS.items() if r == register)
    inputs = {"%r9": lane & 1, f"{register}1": DTYPES[width](7), f"{register}2": DTYPES[width](9)}
    body = f"setp.ne.b32 %p1, %r9, 0;\n{opcode} {register}3, {register}1, {register}2, %p1;\n{opcode} {register}4, 1, 2, !%p1;"
    chosen, negated = execute(body, inputs, [f"{register}3", f"{register}4"])
    assert chosen.tolist() == [9, 7] * 16 and negated.tolist() == [1, 2] * 16


def test_vectors_are_packed_lowest_element_first(execute):
    body = (
        "mov.b32 %r1, {%rs1, %rs2};\nmov.b64 %rd1, {%r1, %r2};\nmov.b32 {%rs3, %rs4}, %r2;\nmov.b64 {%r3, %r4}, %rd1;"
    )
    inputs = {"%rs1": np.uint16(0x1111), "%rs2": np.uint16(0x2222), "%r2": np.uint32(0x44443333)}
    found = execute(body, inputs, ["%r1", "%rd1", "%rs3", "%rs4", "%r3", "%r4"])
    assert [int(f[0]) for f in found] == [0x22221111, 0x4444333322221111, 0x3333, 0x4444, 0x22221111, 0x44443333]


def test_a_guard_leaves_other_threads_registers_alone(execute):
    lane = np.arange(32, dtype=np.uint32)
    body = "setp.lt.u32 %p1, %r1, 4;\nmov.b32 %r2, 1;\n@%p1 mov.b32 %r2, 2;\n@!%p1 add.s32 %r2, %r2, 8;"
    (found,) = execute(body, {"%r1": lane}, ["%r2"])
    assert found.tolist() == [2] * 4 + [9] * 28


def test_special_registers(execute):
    body = "mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nmov.u32 %r3, %nctaid.x;\nmov.u32 %r4, %laneid;\nmov.u32 %r5, %ctaid.y;"
    found = execute(body, {}, [f"%r{i}" for i in range(1, 6)], threads=64)
    assert found[0].tolist() == list(range(64)) and found[3].tolist() == [*range(32), *range(32)]
    assert not found[1].any() and (found[2] == 1).all() and not found[4].any()
