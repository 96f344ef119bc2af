"""Rules for accesses to global memory: bounds, alignment, the order of those of two blocks and of a block's threads (ISA 5, 8)."""

import numpy as np
import pytest
import torch

from fastdeit.testing.ptx import stamps
from fastdeit.testing.ptx.global_memory import GlobalMemory
from fastdeit.testing.ptx.machine import IN_STEP, Fault, Schedule
from fastdeit.testing.ptx.program import PtxError
from fastdeit.testing.ptx.stamps import first_stamps

LANES = np.arange(64, dtype=np.uint32)
SHUFFLED = Schedule(seed=3, shuffled=True)


def global_copy(change):
    return f"""setp.lt.u32 %p1, %tid, 32;
        add.s64 %rd2, %a1, {change};
        ld.global.b32 %r3, [%a0];
        @%p1 st.global.b32 [%rd2], %r3;"""


@pytest.mark.parametrize(
    "change, message", [(4096, "outside the tensors"), (2, "misaligned global access"), (1 << 38, "outside the")]
)
def test_global_accesses_stay_on_the_tensor(execute, change, message):
    with pytest.raises(Fault, match=message):
        execute(global_copy(change), {"%r1": LANES}, ["%r2"], threads=64)


def test_one_instruction_may_access_several_tensors(execute):
    body = """setp.lt.u32 %p1, %tid, 16;
        selp.b64 %rd2, %a0, %a1, %p1;
        ld.global.b32 %r5, [%rd2];
        add.s32 %r5, %r5, 1000;
        st.global.b32 [%rd2], %r5;
        ld.global.b32 %r6, [%rd2];"""
    (found,) = execute(body, {"%r1": LANES, "%r2": LANES + 100}, ["%r6"], threads=64)
    np.testing.assert_array_equal(found, 1000 + LANES + 100 * (np.arange(64) >= 16))


def test_blocks_do_not_write_one_address(execute):
    execute("mov.b32 %r2, 1;", {"%r1": LANES}, [], threads=64, blocks=2)
    with pytest.raises(Fault, match="two blocks write one address"):
        execute("mov.b32 %r2, 1;", {"%r1": LANES}, ["%r2"], threads=64, blocks=2)


def test_blocks_do_not_read_what_another_wrote(execute):
    body = "mov.u32 %r5, %ctaid.x;\nsetp.eq.b32 %p1, %r5, 0;\n@%p1 st.global.b32 [%a1], %r1;\n@!%p1 ld.global.b32 %r6, [%a1];"
    with pytest.raises(Fault, match=r"reads what another block wrote|writes what another block read"):
        execute(body + "\n@%p1 mov.b32 %r2, 0;", {"%r1": LANES, "%r7": LANES}, [], threads=64, blocks=2)


@pytest.fixture
def halves():
    """Memory with 8 numbers of 16 bits, and accesses of a block at a byte: block, offset, width."""

    def fault(kind, detail):
        raise Fault(kind, detail, None)

    memory, tensor = GlobalMemory(fault), torch.arange(8, dtype=torch.int16)
    base = memory.add(tensor)

    def load(block, offset, width):
        return int(memory.load(first_stamps(np.array([block]), 1), np.array([base + offset]), width, 1)[0][0])

    def store(block, offset, width):
        memory.store(first_stamps(np.array([block]), 1), np.array([base + offset]), width, [np.zeros(1, f"u{width}")])

    return load, store


@pytest.mark.parametrize("offset, width", [(2, 2), (0, 2), (0, 4), (0, 8)])
def test_blocks_do_not_access_parts_of_what_another_wrote(halves, offset, width):
    load, store = halves
    store(0, 0, 4)
    for access, message in ((load, "reads what another block wrote"), (store, "two blocks write one address")):
        with pytest.raises(Fault, match=message):
            access(1, offset, width)


@pytest.mark.parametrize("offset, width", [(2, 2), (0, 4), (0, 8)])
def test_blocks_do_not_write_parts_of_what_another_read(halves, offset, width):
    load, store = halves
    load(0, 0, 8)
    with pytest.raises(Fault, match="writes what another block read"):
        store(1, offset, width)


def test_blocks_may_write_neighbours(halves):
    load, store = halves
    store(0, 0, 4)
    store(1, 4, 2)
    store(2, 6, 2)
    assert load(0, 0, 4) == load(1, 4, 2) == load(2, 6, 2) == 0
    assert load(3, 8, 8) == 0x0007_0006_0005_0004


def test_every_element_of_an_access_belongs_to_a_tensor():
    def fault(kind, detail):
        raise Fault(kind, detail, None)

    memory = GlobalMemory(fault)
    base = memory.add(torch.zeros(8, dtype=torch.int16)[::2])
    stamps = first_stamps(np.array([0]), 1)
    assert memory.load(stamps, np.array([base + 4]), 2, 1)[0] == 0
    with pytest.raises(Fault, match="offset 2 is no element"):
        memory.load(stamps, np.array([base]), 4, 1)


# Thread t's element of %a0 is at %a0, thread 0's at %rd4; that of thread t ^ 32 at %rd2, of t ^ 1 at %rd3. Each has read its own.
PLACES = """ld.param.u64 %rd4, [p0];
    xor.b32 %r30, %tid, 32;
    mad.wide.u32 %rd2, %r30, 4, %rd4;
    xor.b32 %r31, %tid, 1;
    mad.wide.u32 %rd3, %r31, 4, %rd4;
    shl.b32 %r32, %tid, 2;
    mov.b32 %r5, 7;
    setp.eq.b32 %p1, %tid, 0;
    setp.eq.b32 %p2, %tid, {last};
    bar.sync 0;
    {accesses}
    cp.async.commit_group;
    cp.async.wait_group 0;"""
READ, WRITE = "ld.global.b32 %r2, [%rd4];\n", "st.global.b32 [%rd4], %r5;\n"
LAST_WRITES, WARP_BARRIER = "@%p2 st.global.b32 [%rd4], %r1;", "bar.warp.sync -1;\n"
READS, OVERWRITES = "reads what another thread of the block wrote", "writes what another thread of the block read"
REWRITES = "writes another value than another thread of the block"


def access(execute, accesses, threads=64, schedule=IN_STEP):
    body = PLACES.format(accesses=accesses, last=threads - 1)
    execute(body, {"%r1": LANES[:threads]}, threads=threads, shared=256, schedule=schedule)


@pytest.mark.parametrize("schedule", [IN_STEP, SHUFFLED], ids=["in step", "shuffled"])
@pytest.mark.parametrize("other, orders", [("%rd2", ["bar.sync 0;"]), ("%rd3", ["bar.sync 0;", "bar.warp.sync -1;"])])
@pytest.mark.parametrize(
    "first, second, message",
    [
        ("st.global.b32 [%a0], %r1;", "ld.global.b32 %r2, [{}];", READS),
        ("st.global.b32 [%a0], %r1;", "cp.async.ca.shared.global [%r32], [{}], 0x4;", READS),
        ("ld.global.b32 %r2, [%a0];", "st.global.b32 [{}], %r1;", OVERWRITES),
        ("st.global.b32 [%a0], %r1;", "st.global.b32 [{}], %r1;", REWRITES),
    ],
)
def test_barriers_order_accesses_of_two_threads_of_a_block(execute, first, second, message, other, orders, schedule):
    second = second.format(other)
    for between in ("", "bar.warp.sync -1;", "bar.sync 0;"):
        if between in orders:
            access(execute, f"{first}\n{between}\n{second}", schedule=schedule)
            continue
        with pytest.raises(Fault, match=message if schedule is IN_STEP else "another thread of the block"):
            access(execute, f"{first}\n{between}\n{second}", schedule=schedule)


@pytest.mark.parametrize(
    "accesses",
    [
        "ld.global.b32 %r2, [%a0];\nst.global.b32 [%a0], %r5;\nld.global.b32 %r2, [%a0];\nst.global.b32 [%a0], %r1;",
        WRITE,
        "st.global.b32 [%a0], %r5;\nst.global.b32 [%rd2], %r5;",
        f"{READ}bar.sync 0;\n{LAST_WRITES}",
        f"{READ}bar.sync 0;\n@%p2 {READ}{LAST_WRITES}",
    ],
    ids=["its own", "one value by all", "one value twice", "behind reads by all", "behind a read of its own"],
)
def test_a_block_may_access_what_nobody_else_does_and_store_a_value_several_times(execute, accesses):
    access(execute, accesses)


@pytest.mark.parametrize(
    "accesses, message",
    [
        (READ + LAST_WRITES, OVERWRITES),
        (READ + WARP_BARRIER + LAST_WRITES, OVERWRITES),
        (f"@%p1 {READ}@%p2 {READ}@%p2 {READ}{LAST_WRITES}", OVERWRITES),
        (f"@%p1 {READ}@%p2 {READ}{WARP_BARRIER}@%p2 {READ}{WARP_BARRIER}{LAST_WRITES}", OVERWRITES),
        (WRITE + LAST_WRITES, REWRITES),
        (f"@%p1 {WRITE}@%p2 {WRITE}@%p2 {WRITE}{LAST_WRITES}", REWRITES),
        ("st.global.b32 [%rd4], %r1;", "two threads store different values at one address"),
    ],
)
def test_an_access_is_ordered_behind_those_of_every_other_thread(execute, accesses, message):
    """The last thread's own access is the last of several before it writes."""
    with pytest.raises(Fault, match=message):
        access(execute, accesses)


def test_threads_of_one_warp_are_ordered_by_its_barrier(execute):
    access(execute, READ + WARP_BARRIER + LAST_WRITES, threads=32)
    with pytest.raises(Fault, match=OVERWRITES):
        access(execute, READ + LAST_WRITES, threads=32)


HALVES = """and.b32 %r30, %tid, 1;
    setp.eq.b32 %p1, %r30, 0;
    mov.b16 %rs5, 7;
    bar.sync 0;
    """


@pytest.mark.parametrize(
    "accesses, message",
    [
        ("st.global.b16 [%a0], %rs1;\nld.global.b16 %rs2, [%a0];", None),
        ("st.global.b16 [%a0], %rs1;\n@%p1 ld.global.b32 %r2, [%a0];", READS),
        ("@!%p1 st.global.b16 [%a0], %rs5;\nmov.b32 %r2, 0x70009;\n@%p1 st.global.b32 [%a0], %r2;", None),
        ("@!%p1 st.global.b16 [%a0], %rs5;\nmov.b32 %r2, 0x80007;\n@%p1 st.global.b32 [%a0], %r2;", REWRITES),
    ],
)
def test_each_element_of_a_word_has_an_order_of_its_own(execute, accesses, message):
    def run():
        execute(HALVES + accesses, {"%rs1": LANES.astype(np.uint16)}, threads=64)

    if message is None:
        run()
        return
    with pytest.raises(Fault, match=message):
        run()


def test_a_block_with_more_barriers_than_a_stamp_counts_is_refused():
    now = first_stamps(np.array([5]), 64)
    last_epoch = now | (1 << 18) - 1 << stamps.EPOCH
    assert (stamps.after_barrier(now) > now).all()
    with pytest.raises(PtxError, match="a block passes more barriers"):
        stamps.after_barrier(last_epoch)
    for _ in range((1 << 12) - 1):
        now = stamps.after_warp_barrier(now)
    with pytest.raises(PtxError, match="a warp passes more barriers"):
        stamps.after_warp_barrier(now)
