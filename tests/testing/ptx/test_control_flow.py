"""Where code lies that a run did not execute, and what a mask keeps out."""

import numpy as np
import pytest

from fastdeit.testing.ptx.control_flow import branches_past, definition, governs_only_copies, predecessors, successors
from fastdeit.testing.ptx.selections import Scrambled, selections
from tests.testing.ptx.conftest import program_of

LANES = np.arange(32, dtype=np.uint32)
BRANCH = """setp.eq.s32 %p1, %r1, 7;
    @%p1 bra $L__BB0_1;
    mov.b32 %r2, 1;
    bra.uni $L__BB0_2;
    $L__BB0_1:
    mov.b32 %r2, 2;
    $L__BB0_2:"""


def test_a_branch_past_code_is_named_with_its_condition():
    program = program_of(BRANCH, ["%r1"], ["%r2"], 32)
    lines = {i.text: i.line for i in program.instructions}
    everything = set(lines.values())
    assert branches_past(program, everything) == []
    (found,) = branches_past(program, everything - {lines["mov.b32 %r2, 2;".rstrip(";")]})
    assert found == f"line {lines['@%p1 bra $L__BB0_1']}, @%p1 bra $L__BB0_1 (setp.eq.s32 %p1, %r1, 7)"
    assert branches_past(program, set()) == []


def test_the_ways_through_a_branch():
    program = program_of(BRANCH, ["%r1"], ["%r2"], 32)
    at = {i.text: n for n, i in enumerate(program.instructions)}
    branch, one, two = at["@%p1 bra $L__BB0_1"], at["mov.b32 %r2, 1"], at["mov.b32 %r2, 2"]
    assert set(successors(program)[branch]) == {one, two}
    assert predecessors(program)[two] == [branch]
    written_twice = program.instructions[two].operands[0]
    assert definition(program, written_twice) is None
    assert definition(program, program.instructions[branch].guard).text == "setp.eq.s32 %p1, %r1, 7"


MASKED_COPY = """setp.lt.s32 %p1, %r1, 5;
    setp.lt.s32 %p2, %r1, 9;
    and.pred %p3, %p1, %p2;
    selp.b32 %r2, 4, 0, %p3;
    shl.b32 %r30, %tid, 2;
    cp.async.ca.shared.global [%r30], [%a0], 0x4, %r2;"""


@pytest.mark.parametrize("more, only", [("", True), ("@%p1 mov.b32 %r3, 0;", False), ("add.s32 %r3, %r2, 1;", False)])
def test_a_mask_of_copies_governs_nothing_else(more, only):
    program = program_of(f"{MASKED_COPY}\n{more}", ["%r1"], [], 32)
    mask = next(i.operands[0] for i in program.instructions if i.text.startswith("setp.lt.s32 %p1"))
    assert governs_only_copies(program, mask) == only


SELECT = """setp.lt.s32 %p1, %r1, 20;
    {other}
    cvt.rn.f32.s32 %r3, %r1;
    selp.f32 %r4, %r3, 0f00000000, %p1;
    setp.lt.s32 %p2, %r1, {kept};
    selp.f32 %r2, %r4, 0f00000000, %p2;"""


def masked(kept, other=""):
    program = program_of(SELECT.format(kept=kept, other=other), ["%r1"], ["%r2"], 32)
    return program, next(i.line for i in program.instructions if i.text.startswith("setp.lt.s32 %p1"))


def test_16_bits_are_random_too(execute):
    body = "setp.lt.s32 %p1, %r1, 20;\nmov.b16 %rs1, 7;\nselp.b16 %rs2, %rs1, 0, %p1;"
    line = next(i.line for i in program_of(body, ["%r1"], ["%rs2"], 32).instructions if i.opcode == "setp.lt.s32")

    def scrambled(program, shared):
        return Scrambled(program, shared, line, seed=0)

    (found,) = execute(body, {"%r1": LANES}, ["%rs2"], make=scrambled)
    assert (found[:20] == 7).all() and (found[20:] != 0).all()
    assert np.isfinite(found.view(np.float16)).all() and ((found >> 7 & 0xFF) < 0xFF).all()  # bfloat16's exponent


@pytest.mark.parametrize("kept, same", [(20, True), (21, False)])
def test_random_numbers_in_place_of_zeros_show_whether_they_matter(execute, kept, same):
    program, line = masked(kept)
    assert [program.instructions[i].text.split(",")[0] for i in selections(program, line)] == ["selp.f32 %r4"]
    body = SELECT.format(kept=kept, other="")

    def scrambled(program, shared):
        return Scrambled(program, shared, line, seed=0)

    (plain,) = execute(body, {"%r1": LANES}, ["%r2"])
    (other,) = execute(body, {"%r1": LANES}, ["%r2"], make=scrambled)
    assert (plain == other).all() == same
    assert (plain[:20] == other[:20]).all()  # what the mask lets through stays


def test_warps_with_the_same_elements_get_the_same_random_numbers(execute):
    elements = np.tile(LANES, 2)  # as in a tile that two warps hold, which both store it
    line = masked(20)[1]

    def scrambled(program, shared):
        return Scrambled(program, shared, line, seed=0)

    (found,) = execute(SELECT.format(kept=99, other=""), {"%r1": elements}, ["%r2"], threads=64, make=scrambled)
    assert (found[:32] == found[32:]).all() and len(set(found[20:32].tolist())) == 12


def test_a_mask_that_governs_more_than_selections_is_not_scrambled():
    program, line = masked(20, "@%p1 mov.b32 %r5, 0;")
    assert selections(program, line) == []
    program, line = masked(20, "selp.b32 %r5, 16, 0, %p1;")  # such as the bytes of a copy
    assert selections(program, line) == []
