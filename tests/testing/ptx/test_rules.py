"""Rules for memory accesses and barriers: each with a kernel that keeps it and one that breaks it (ISA 5, 8, 9.7.13)."""

import numpy as np
import pytest
import torch

from fastdeit.testing.ptx.global_memory import GlobalMemory
from fastdeit.testing.ptx.machine import IN_STEP, Fault, Machine, Schedule
from fastdeit.testing.ptx.program import Program, PtxError

LANES = np.arange(64, dtype=np.uint32)
SHUFFLED = Schedule(seed=3, shuffled=True)


def test_shared_memory_of_every_width(execute):
    body = """shl.b32 %r30, %tid, 5;
        st.shared.b32 [%r30], %r1;
        st.shared.b16 [%r30+4], %rs1;
        st.shared.b16 [%r30+6], %rs1;
        st.shared.b64 [%r30+8], %rd1;
        st.shared.v4.b32 [%r30+16], {%r1, %r1, %r1, %r1};
        bar.sync 0;
        xor.b32 %r31, %r30, 32;
        ld.shared.b32 %r2, [%r31];
        ld.shared.b32 %r3, [%r31+4];
        ld.shared.b64 %rd2, [%r31+8];
        ld.shared.v2.b32 {%r4, %r5}, [%r31+24];
        ld.shared.b16 %rs2, [%r31+2];"""
    inputs = {"%r1": LANES + 0x50000, "%rs1": LANES.astype(np.uint16), "%rd1": LANES.astype(np.uint64) << 40}
    found = execute(body, inputs, ["%r2", "%r3", "%rd2", "%r5", "%rs2"], threads=64, shared=2048)
    other = LANES ^ 1
    assert (found[0] == other + 0x50000).all() and (found[1] == other * 0x10001).all()
    assert (found[2] == other.astype(np.uint64) << 40).all() and (found[3] == found[0]).all() and (found[4] == 5).all()


def test_vectors_of_64_bits_and_16_bits(execute):
    body = """shl.b32 %r30, %tid, 4;
        st.shared.v2.b64 [%r30], {%rd1, %rd2};
        bar.sync 0;
        ld.shared.v2.b64 {%rd3, %rd4}, [%r30];
        bar.sync 0;
        st.shared.v2.b16 [%r30], {%rs1, %rs2};
        bar.sync 0;
        ld.shared.b32 %r1, [%r30];"""
    inputs = {"%rd1": np.uint64(1 << 33), "%rd2": np.uint64(7), "%rs1": np.uint16(3), "%rs2": np.uint16(4)}
    found = execute(body, inputs, ["%rd3", "%rd4", "%r1"], shared=512)
    assert [int(f[0]) for f in found] == [1 << 33, 7, 0x40003]


@pytest.mark.parametrize("count", [2, 4])
def test_vectors_of_global_memory(execute, count):
    """Every second or fourth thread turns its vector round, in place."""
    registers = [f"%r{30 + i}" for i in range(count)]
    body = f"""and.b32 %r20, %tid, {count - 1};
        setp.eq.b32 %p1, %r20, 0;
        @%p1 ld.global.v{count}.b32 {{{", ".join(registers)}}}, [%a0];
        bar.sync 0;
        @%p1 st.global.v{count}.b32 [%a0], {{{", ".join(reversed(registers))}}};
        bar.sync 0;
        ld.global.b32 %r2, [%a0];"""
    (found,) = execute(body, {"%r1": LANES + 9}, ["%r2"], threads=64)
    assert (found == (LANES ^ (count - 1)) + 9).all()


def test_parameters_of_32_and_64_bits():
    program = Program(
        ".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry test(\n"
        "\t.param .u64 out,\n\t.param .u32 narrow,\n\t.param .u64 wide\n)\n.reqntid 32\n{\n"
        "\t.reg .b32 \t%r<4>;\n\t.reg .b64 \t%rd<4>;\n\tld.param.b64 \t%rd1, [out];\n"
        "\tld.param.b64 \t%rd2, [wide];\n\tld.param.b32 \t%r1, [narrow];\n\tld.param.s32 \t%r2, [narrow];\n"
        "\tst.global.b32 \t[%rd1], %r1;\n\tst.global.b32 \t[%rd1+4], %r2;\n\tst.global.b64 \t[%rd1+8], %rd2;\n\tret;\n}\n"
    )
    machine, out = Machine(program, 0), torch.zeros(2, dtype=torch.int64)
    memory = GlobalMemory(machine.fault)
    machine.launch((1,), {"out": memory.add(out), "narrow": -5, "wide": -1 << 40}, memory)
    assert out.view(torch.int32)[:2].tolist() == [-5, -5] and out[1] == -1 << 40


def test_a_launch_may_be_given_an_end(execute):
    def with_end(most):
        def make(program, shared):
            machine = Machine(program, shared)
            machine.most_branches = most
            return machine

        return make

    body = "mov.b32 %r30, 0;\n$L__BB0_1:\nadd.s32 %r30, %r30, 1;\nsetp.lt.s32 %p1, %r30, 9;\n@%p1 bra $L__BB0_1;"
    execute(body, make=with_end(9))
    with pytest.raises(Fault, match="endless loop: more than 8 branches"):
        execute(body, make=with_end(8))


HALVES = (  # of each word, the first by a thread of one warp, the second by one of another
    "and.b32 %r30, %tid, 31;\nshr.u32 %r31, %tid, 5;\nshl.b32 %r30, %r30, 2;\nshl.b32 %r31, %r31, 1;\n"
    "add.s32 %r30, %r30, %r31;\nst.shared.b16 [%r30], %rs1;"
)
BROKEN = {
    "the half of a word of another warp": (
        f"{HALVES}\nbar.warp.sync -1;\nxor.b32 %r31, %r30, 2;\nld.shared.b16 %rs2, [%r31];",
        "shared race",
    ),
    "misaligned": ("shl.b32 %r30, %tid, 2;\nst.shared.v2.b32 [%r30], {%r1, %r1};", "misaligned shared access"),
    "out of bounds": ("shl.b32 %r30, %tid, 4;\nst.shared.b32 [%r30], %r1;", "shared access out of bounds"),
    "negative address": ("mov.b32 %r30, 0;\nst.shared.b32 [%r30+-4], %r1;", "shared access out of bounds"),
    "unwritten": ("shl.b32 %r30, %tid, 2;\nld.shared.b32 %r2, [%r30];", "unwritten shared memory"),
    "half unwritten": (
        "shl.b32 %r30, %tid, 2;\nst.shared.b16 [%r30], %rs1;\nbar.sync 0;\nld.shared.b32 %r2, [%r30];",
        "unwritten shared memory",
    ),
    "read after write": (
        "shl.b32 %r30, %tid, 2;\nst.shared.b32 [%r30], %r1;\nxor.b32 %r31, %r30, 128;\nld.shared.b32 %r2, [%r31];",
        "read after write of another thread",
    ),
    "read after write within a warp": (
        "shl.b32 %r30, %tid, 2;\nst.shared.b32 [%r30], %r1;\nxor.b32 %r31, %r30, 4;\nld.shared.b32 %r2, [%r31];",
        "read after write of another thread",
    ),
    "write after read": (
        "shl.b32 %r30, %tid, 2;\nst.shared.b32 [%r30], %r1;\nbar.sync 0;\nld.shared.b32 %r2, [%r30];\n"
        "xor.b32 %r31, %r30, 128;\nst.shared.b32 [%r31], %r2;",
        "write after read",
    ),
    "write after several reads": (
        "shl.b32 %r30, %tid, 2;\nst.shared.b32 [%r30], %r1;\nbar.sync 0;\nmov.b32 %r31, 0;\nld.shared.b32 %r2, [%r31];\n"
        "st.shared.b32 [%r30], %r2;",
        "write after read",
    ),
    "write after write of a half": (
        "mov.b32 %r30, 2;\nst.shared.b16 [%r30], %rs1;\nst.shared.b16 [%r30], %rs1;",
        "two threads store different values|write after write",
    ),
    "write after write": (
        "shl.b32 %r30, %tid, 2;\nst.shared.b32 [%r30], %r1;\nxor.b32 %r31, %r30, 128;\nst.shared.b32 [%r31], %r1;",
        "write after write",
    ),
    "two values at one address": ("mov.b32 %r30, 0;\nst.shared.b32 [%r30], %r1;", "two threads store different values"),
    "barrier in a branch": (
        "setp.lt.u32 %p1, %tid, 32;\n@%p1 bra $L1;\nbra.uni $L2;\n$L1: bar.sync 0;\n$L2: mov.b32 %r2, 0;",
        "not all threads of the group reach this barrier",
    ),
    "shuffle in a branch": (
        "setp.lt.u32 %p1, %tid, 16;\n@!%p1 bra $L2;\nshfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;\n$L2: mov.b32 %r3, 0;",
        "a part of its warp",
    ),
    "atomic after a write": (
        "shl.b32 %r30, %tid, 2;\nst.shared.b32 [%r30], %r1;\nmov.b32 %r31, 0;\natom.shared.add.u32 %r2, [%r31], %r1;",
        "atomic after write of another thread",
    ),
    "atomic after a read": (
        "shl.b32 %r30, %tid, 2;\nst.shared.b32 [%r30], %r1;\nbar.sync 0;\nld.shared.b32 %r2, [%r30];\nmov.b32 %r31, 0;\n"
        "atom.shared.add.u32 %r2, [%r31], %r1;",
        "atomic after read of another thread",
    ),
    "read after an atomic": (
        "shl.b32 %r30, %tid, 2;\nst.shared.b32 [%r30], %r1;\nbar.sync 0;\natom.shared.add.u32 %r2, [%r30], %r1;\n"
        "xor.b32 %r31, %r30, 128;\nld.shared.b32 %r2, [%r31];",
        "read after write of another thread",
    ),
    "atomic on unwritten memory": (
        "shl.b32 %r30, %tid, 2;\natom.shared.add.u32 %r2, [%r30], %r1;",
        "unwritten shared memory",
    ),
    "two barriers": (
        "setp.lt.u32 %p1, %tid, 32;\n@%p1 bra $L1;\nbar.sync 0;\nbra.uni $L2;\n$L1: bar.sync 0;\n$L2: mov.b32 %r2, 0;",
        "not all threads of the group reach this barrier",
    ),
}


@pytest.mark.parametrize("schedule", [IN_STEP, SHUFFLED], ids=["in step", "shuffled"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_a_fault(execute, name, schedule):
    body, message = BROKEN[name]
    inputs = {"%r1": LANES, "%rs1": LANES.astype(np.uint16)}
    with pytest.raises(Fault, match=rf"{message}.*PTX line \d+"):
        execute(body, inputs, threads=64, shared=256, schedule=schedule)


KEPT = {
    "read after write": BROKEN["read after write"][0].replace("xor", "bar.sync 0;\nxor"),
    "read after write within a warp": BROKEN["read after write within a warp"][0].replace(
        "xor", "bar.warp.sync -1;\nxor"
    ),
    "write after read": BROKEN["write after read"][0].replace("xor", "bar.sync 0;\nxor"),
    "write after several reads": BROKEN["write after several reads"][0].replace(
        "%r31];\nst", "%r31];\nbar.sync 0;\nst"
    ),
    "write after write": BROKEN["write after write"][0].replace("xor", "bar.sync 0;\nxor"),
    "halves of a word by two warps": f"{HALVES}\nbar.sync 0;\nand.b32 %r31, %r30, 124;\nld.shared.b32 %r2, [%r31];",
    "own halves of a word by two warps": f"{HALVES}\nbar.warp.sync -1;\nld.shared.b16 %rs2, [%r30];",
    "atomics on one word": BROKEN["atomic after a write"][0].replace("mov", "bar.sync 0;\nmov")
    + "\nbar.sync 0;\nld.shared.b32 %r2, [%r31];",
    "bytes in pairs": (
        "shl.b32 %r30, %tid, 1;\nst.shared.v2.b8 [%r30], {%rs1, %rs1};\nbar.sync 0;\nld.shared.v2.b8 {%rs2, %rs3}, [%r30];"
    ),
    "own word": "shl.b32 %r30, %tid, 2;\nst.shared.b32 [%r30], %r1;\nld.shared.b32 %r2, [%r30];\nst.shared.b32 [%r30], %r2;",
    "the same value twice": "mov.b32 %r30, 0;\nmov.b32 %r2, 5;\nst.shared.b32 [%r30], %r2;\nst.shared.b32 [%r30], %r2;",
    "a branch that joins before the barrier": (
        "setp.lt.u32 %p1, %tid, 16;\n@!%p1 bra $L2;\nmov.b32 %r3, 0;\n$L2: bar.sync 0;\nshfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;"
    ),
}


@pytest.mark.parametrize("schedule", [IN_STEP, SHUFFLED], ids=["in step", "shuffled"])
@pytest.mark.parametrize("name", KEPT)
def test_a_kept_rule_is_none(execute, name, schedule):
    execute(KEPT[name], {"%r1": LANES, "%rs1": LANES.astype(np.uint16)}, threads=64, shared=256, schedule=schedule)


def test_an_unwritten_register_holds_other_garbage_on_each_schedule(execute):
    schedules = [IN_STEP, Schedule(seed=1, shuffled=True), Schedule(seed=2, shuffled=True)]
    values = [execute("add.s32 %r2, %r8, 1;", {}, ["%r2"], schedule=s)[0] for s in schedules]
    assert (values[0] == 0).all() and len({v.tobytes() for v in values}) == 3  # all bits set: a NaN in every format


def test_a_masked_load_leaves_garbage_unless_the_register_is_initialised(execute):
    body = "setp.lt.u32 %p1, %tid, 4;\n{0}\n@%p1 ld.global.b32 %r5, [%a0];\nmov.b32 %r2, %r5;"
    clean = [
        execute(body.replace("{0}", "mov.b32 %r5, 0;"), {"%r1": LANES}, ["%r2"], threads=64, schedule=s)[0]
        for s in (IN_STEP, SHUFFLED)
    ]
    assert (clean[0] == clean[1]).all() and clean[0].tolist() == [0, 1, 2, 3] + [0] * 60
    dropped = [
        execute(body.replace("{0}", ""), {"%r1": LANES}, ["%r2"], threads=64, schedule=s)[0]
        for s in (IN_STEP, SHUFFLED)
    ]
    assert (dropped[0] != dropped[1]).any()


COPY = """setp.lt.u32 %p1, %tid, 48;
    shl.b32 %r30, %tid, 2;
    selp.b32 %r31, 4, 0, %p1;
    cp.async.ca.shared.global [ %r30 + 0 ], [ %a0 + 0 ], 0x4, %r31;
    cp.async.commit_group;
    {wait}
    bar.sync 0;
    xor.b32 %r32, %r30, 128;
    ld.shared.b32 %r2, [%r32];"""


@pytest.mark.parametrize("schedule", [IN_STEP, SHUFFLED], ids=["late", "any"])
def test_asynchronous_copies_are_there_after_their_wait(execute, schedule):
    (found,) = execute(
        COPY.format(wait="cp.async.wait_group 0;"),
        {"%r1": LANES + 7},
        ["%r2"],
        threads=64,
        shared=256,
        schedule=schedule,
    )
    expected = np.where(LANES ^ 32 < 48, (LANES ^ 32) + 7, 0)  # what is not copied is filled with zeros
    assert (found == expected).all()


@pytest.mark.parametrize("schedule", [IN_STEP, SHUFFLED], ids=["late", "any"])
@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"])
def test_a_missing_wait_is_a_fault(execute, wait, schedule):
    with pytest.raises(Fault, match="asynchronous copy still fills"):
        execute(COPY.format(wait=wait), {"%r1": LANES}, ["%r2"], threads=64, shared=256, schedule=schedule)


def test_a_wait_is_of_one_s_own_copies(execute):
    with pytest.raises(Fault, match="read after write"):
        body = COPY.format(wait="cp.async.wait_group 0;").replace("bar.sync 0;", "")
        execute(body, {"%r1": LANES}, ["%r2"], threads=64, shared=256)


def test_sixteen_byte_copies(execute):
    body = """shl.b32 %r30, %tid, 4;
        and.b32 %r31, %tid, 7;
        ld.param.u64 %rd1, [p0];
        mad.wide.u32 %rd1, %r31, 16, %rd1;
        cp.async.cg.shared.global [%r30], [%rd1], 0x10;
        cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r30];"""
    found = execute(body, {"%r1": LANES[:32]}, ["%r2", "%r5"], shared=512)
    assert (found[0] == LANES[:32] % 8 * 4).all() and (found[1] == found[0] + 3).all()


def test_loops_of_different_length_end_together(execute):
    body = """mov.b32 %r2, 0;
        $L1: setp.ge.s32 %p1, %r2, %r1;
        @%p1 bra $L2;
        add.s32 %r2, %r2, 1;
        bra.uni $L1;
        $L2: bar.sync 0;"""
    (found,) = execute(body, {"%r1": LANES % 7}, ["%r2"], threads=64)
    assert (found == LANES % 7).all()


@pytest.mark.parametrize(
    "line",
    [
        "frobnicate.b32 %r1, %r2;",
        "add.sat.s32 %r1, %r2, %r3;",
        "ld.global.cs.b32 %r1, [%a0];",
        "add.s32 %r1, %r2;",
        "mov.b32 %r1, %q7;",
        "bra $L9;",
    ],
)
def test_what_is_unknown_is_an_error_with_its_line(execute, line):
    with pytest.raises(PtxError, match=r"PTX line 2\d"):
        execute(f"mov.b32 %r2, 0;\n{line}", {"%r2": LANES[:32]}, [])


def test_a_text_without_a_kernel_is_refused():
    with pytest.raises(PtxError, match=r"one \.entry"):
        Program(".version 8.7\n.target sm_90a\n")


@pytest.mark.parametrize("schedule", [IN_STEP, SHUFFLED], ids=["in step", "shuffled"])
def test_atomic_additions_return_what_they_found(execute, schedule):
    body = """
        shl.b32 %r30, %tid, 2;
        st.shared.b32 [%r30], 7;
        and.b32 %r31, %r30, 4;
        bar.sync 0;
        atom.shared.add.u32 %r2, [%r31], %r1;
        bar.sync 0;
        ld.shared.b32 %r3, [%r30];
    """
    found, after = execute(body, {"%r1": LANES + 1}, ["%r2", "%r3"], threads=64, shared=256, schedule=schedule)
    for word in range(2):
        added = (LANES + 1)[word::2]
        assert after[word] == 7 + added.sum() and (after[2:] == 7).all()
        order = np.argsort(found[word::2])  # some order of the threads gives these
        assert (found[word::2][order] == 7 + np.cumsum(added[order]) - added[order]).all()


TABLE = """
    and.b32 %r2, %tid, 1;
    shr.u32 %r3, %tid, 5;
    add.s32 %r2, %r2, %r3;
    $L_table: .branchtargets
        $L_a,
        $L_b,
        $L_a;
    brx.idx %r2, $L_table;
    $L_a: mov.b32 %r9, 10;
    bra.uni $L_end;
    $L_b: mov.b32 %r9, 20;
    $L_end: bar.sync 0;
"""


def test_an_indexed_branch_takes_each_thread_to_its_target(execute):
    (found,) = execute(TABLE, {}, ["%r9"], threads=64)
    assert found.tolist() == [10, 20] * 16 + [20, 10] * 16


def test_an_index_past_the_targets_is_a_fault(execute):
    with pytest.raises(Fault, match="index 3 into 3 targets"):
        execute(TABLE, {}, ["%r9"], threads=96)
