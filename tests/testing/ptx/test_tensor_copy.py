"""Tensor copies with every swizzle, and mbarriers, against the ISA's text (5.5, 9.7.9.27, 9.7.13.15)."""

import numpy as np
import pytest
import torch

from fastdeit.testing.ptx import tensor_copy
from fastdeit.testing.ptx.machine import IN_STEP, Fault, Schedule

SHUFFLED = Schedule(seed=1, shuffled=True)
BARRIER = 32768  # address of the mbarrier; data lies below

LOAD = """mov.b64 %rd30, map0;
    cvta.param.u64 %rd31, %rd30;
    setp.eq.b32 %p1, %tid, 0;
    mov.b32 %r40, 32768;
    mov.b32 %r41, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r40], 1;
    {after_init}
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r40], {nbytes};
    bar.sync 0;
    elect.sync %r42|%p2, -1;
    setp.lt.u32 %p3, %tid, 32;
    and.pred %p4, %p2, %p3;
    @%p4 cp.async.bulk.tensor.{dims}d.shared::cluster.global.mbarrier::complete_tx::bytes [%r41], [%rd31, {{{corner}}}], [%r40];
    {wait}
    {after_wait}
    @%p1 mbarrier.inval.shared::cta.b64 [%r40];
    {read}"""
WAIT = """{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared.b64 complete, [%r40], %r41;
    @!complete bra.uni waitLoop;
    }"""
READ = "shl.b32 %r50, %tid, 2;\nld.shared.b32 %r51, [%r50];"


def load(nbytes, corner, dims=2, wait=WAIT, after_init="bar.sync 0;", after_wait="bar.sync 0;", read=READ):
    return LOAD.format(
        nbytes=nbytes, corner=corner, dims=dims, wait=wait, after_init=after_init, after_wait=after_wait, read=read
    )


def swizzled_by_the_book(byte, width):
    """Byte of a box -> byte of shared memory: in each line of 128 bytes 16-byte chunks are permuted by the line's number,
    all eight of them, within halves, or within quarters."""
    line, chunk, rest = byte // 128, byte // 16 % 8, byte % 16
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[width]
    return line * 128 + ((chunk ^ (line & mask)) * 16) + rest


@pytest.mark.parametrize("width", [0, 32, 64, 128])
def test_swizzle(width):
    address = np.arange(4096)
    assert (tensor_copy.swizzled(address, width) == [swizzled_by_the_book(a, width) for a in address]).all()
    assert sorted(tensor_copy.swizzled(address, width)) == address.tolist()


@pytest.mark.parametrize("schedule", [IN_STEP, SHUFFLED], ids=["late", "any"])
@pytest.mark.parametrize("mode, columns", [(0, 64), (1, 16), (2, 32), (3, 64)])
def test_a_box_is_loaded_with_zeros_outside(execute, mode, columns, schedule):
    """A box of 16-bit numbers that hangs over both upper edges of the tensor."""
    tensor = torch.arange(1, 12 * 72 + 1, dtype=torch.int16).reshape(12, 72)
    rows = 8
    nbytes = rows * columns * 2
    read = f"setp.lt.u32 %p5, %tid, {nbytes // 4};\nmov.b32 %r51, 0;\nshl.b32 %r50, %tid, 2;\n@%p5 ld.shared.b32 %r51, [%r50];"
    start = (8, 72 - columns // 2)
    body = load(nbytes, f"{start[1]}, {start[0]}", read=read)
    (found,) = execute(
        body, {}, ["%r51"], threads=256, shared=BARRIER + 8, schedule=schedule, maps=[(tensor, (rows, columns), mode)]
    )
    got = found.view(np.uint16)
    box = np.zeros((rows, columns), np.uint16)
    inside = tensor.numpy()[start[0] :, start[1] : start[1] + columns]
    box[: inside.shape[0], : inside.shape[1]] = inside
    width = {0: 0, 1: 32, 2: 64, 3: 128}[mode]
    for r in range(rows):
        for c in range(columns):
            assert got[swizzled_by_the_book((r * columns + c) * 2, width) // 2] == box[r, c]


def test_four_dimensions_and_strides(execute):
    whole = torch.arange(2 * 3 * 4 * 16, dtype=torch.int32).reshape(2, 4, 3, 16)
    tensor = whole.transpose(1, 2)  # (2, 3, 4, 16)
    body = load(4 * 16 * 4, "0, 0, 2, 1", dims=4)
    (found,) = execute(body, {}, ["%r51"], threads=64, shared=BARRIER + 8, maps=[(tensor, (1, 1, 4, 16), 0)])
    assert (found == tensor[1, 2].reshape(-1).numpy()).all()


def test_negative_coordinates_read_zeros(execute):
    tensor = torch.ones(8, 16, dtype=torch.int32)
    (found,) = execute(load(256, "0, -2"), {}, ["%r51"], threads=64, shared=BARRIER + 8, maps=[(tensor, (4, 16), 0)])
    assert found.reshape(4, 16).sum(1).tolist() == [0, 0, 16, 16]


STORE = """mov.b64 %rd30, map0;
    cvta.param.u64 %rd31, %rd30;
    shl.b32 %r50, %tid, 2;
    st.shared.b32 [%r50], %r1;
    {fence}
    {barrier}
    setp.eq.b32 %p1, %tid, 0;
    mov.b32 %r41, 0;
    mov.b32 %r43, 6;
    @%p1 cp.async.bulk.tensor.{dims}d.global.shared::cta.bulk_group [%rd31, {{{corner}}}], [%r41];
    @%p1 cp.async.bulk.commit_group;
    {wait}
    bar.sync 0;
    st.shared.b32 [%r50], %r1;"""


def store(
    fence="fence.proxy.async.shared::cta;",
    barrier="bar.sync 0;",
    wait="@%p1 cp.async.bulk.wait_group.read 0;",
    dims=2,
    corner="%r41, %r43",
):
    return STORE.format(fence=fence, barrier=barrier, wait=wait, dims=dims, corner=corner)


def run_store(execute, body, schedule=IN_STEP):
    tensor = torch.zeros(8, 16, dtype=torch.int32)
    execute(
        body,
        {"%r1": np.arange(64, dtype=np.uint32) + 1},
        [],
        threads=64,
        shared=1024,
        schedule=schedule,
        maps=[(tensor, (4, 16), 0)],
    )
    return tensor


@pytest.mark.parametrize("schedule", [IN_STEP, SHUFFLED], ids=["late", "any"])
def test_a_store_is_clipped_at_the_edge(execute, schedule):
    tensor = run_store(execute, store(), schedule)
    assert not tensor[:6].any() and tensor[6:].reshape(-1).tolist() == list(range(1, 33))


def test_a_store_of_four_dimensions(execute):
    whole = torch.zeros(2, 12, 3, 16, dtype=torch.int32)
    tensor = whole.transpose(1, 2)  # (2, 3, 12, 16)
    body = "mov.b32 %r44, 2;\nmov.b32 %r45, 1;\n" + store(dims=4, corner="%r41, %r43, %r44, %r45")
    values = np.arange(64, dtype=np.uint32) + 1
    execute(body, {"%r1": values}, [], threads=64, shared=1024, maps=[(tensor, (1, 1, 4, 16), 0)])
    assert (tensor[1, 2, 6:10].reshape(-1).numpy() == values).all()
    assert whole.count_nonzero() == 64


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(fence=""), "missing proxy fence"),
        (dict(barrier=""), "asynchronous read of what another thread wrote without barrier"),
        (dict(wait=""), "wgmma or a tensor store may still read"),
        (dict(wait="@%p1 cp.async.bulk.wait_group.read 1;"), "wgmma or a tensor store may still read"),
    ],
)
@pytest.mark.parametrize("schedule", [IN_STEP, SHUFFLED], ids=["late", "any"])
def test_a_store_needs_fence_barrier_and_wait(execute, change, message, schedule):
    with pytest.raises(Fault, match=message):
        run_store(execute, store(**change), schedule)


def test_a_block_does_not_end_before_its_stores_have_read(execute):
    body = store(wait="")
    with pytest.raises(Fault, match="may still read shared memory when its block ends"):
        run_store(execute, body[: body.index("commit_group;") + len("commit_group;")])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(wait=""), "still under way|invalidated|still fills"),
        (dict(nbytes=512), r"deadlock.*\[256\] bytes"),
        (dict(nbytes=128), "deadlock"),
        (dict(after_wait=""), "invalidated at 32768 while other threads may still wait"),
        (dict(wait=WAIT.replace("%r41", "%r49")), "invalidated at 32768 with|still fills"),
    ],
)
def test_an_mbarrier_is_used_in_order(execute, change, message):
    body = "mov.b32 %r49, 1;\n" + load(**(dict(nbytes=256, corner="0, 0") | change))
    tensor = torch.ones(8, 16, dtype=torch.int32)
    with pytest.raises(Fault, match=message):
        execute(body, {}, ["%r51"], threads=64, shared=BARRIER + 8, maps=[(tensor, (4, 16), 0)])


def test_threads_learn_of_an_mbarrier_at_a_barrier(execute):
    body = load(256, "0, 0", after_init="").replace("bar.sync 0;\n    elect", "elect")
    with pytest.raises(Fault, match="used at 32768 by other threads than the initialising one"):
        execute(body, {}, [], threads=64, shared=BARRIER + 8, maps=[(torch.ones(8, 16, dtype=torch.int32), (4, 16), 0)])


def test_a_dropped_arrival_is_a_deadlock(execute):
    body = "\n".join(line for line in load(256, "0, 0").splitlines() if "expect_tx" not in line)
    with pytest.raises(Fault, match=r"deadlock.*\[1\] arrivals"):
        execute(body, {}, [], threads=64, shared=BARRIER + 8, maps=[(torch.ones(8, 16, dtype=torch.int32), (4, 16), 0)])


def test_only_threads_that_waited_see_a_copy(execute):
    wait = "@!%p1 bra $LX;\n" + WAIT + "\n$LX: mov.b32 %r60, 0;"
    with pytest.raises(Fault, match="without having waited on its mbarrier"):
        body = load(256, "0, 0", wait=wait, after_wait="", read=READ).replace(
            "@%p1 mbarrier.inval.shared::cta.b64 [%r40];", ""
        )
        execute(
            body,
            {},
            ["%r51"],
            threads=64,
            shared=BARRIER + 8,
            maps=[(torch.ones(8, 16, dtype=torch.int32), (4, 16), 0)],
        )


@pytest.mark.parametrize(
    "access", ["st.shared.b32 [%r50], %r50;", "ld.shared.b32 %r52, [%r50];"], ids=["write", "read"]
)
def test_a_copy_to_where_threads_accessed_memory_needs_a_proxy_fence(execute, access):
    before = (
        "shl.b32 %r50, %tid, 2;\nst.shared.b32 [%r50], %r50;\nfence.proxy.async.shared::cta;\nbar.sync 0;\n" + access
    )
    given = dict(threads=64, shared=BARRIER + 8, maps=[(torch.ones(8, 16, dtype=torch.int32), (4, 16), 0)])
    with pytest.raises(
        Fault, match=r"missing proxy fence: no fence\.proxy\.async between generic accesses and a tensor copy"
    ):
        execute(f"{before}\n{load(256, '0, 0')}", {}, ["%r51"], **given)
    (found,) = execute(f"{before}\nfence.proxy.async.shared::cta;\n{load(256, '0, 0')}", {}, ["%r51"], **given)
    assert (found == 1).all()


def test_phases_alternate(execute):
    body = """setp.eq.b32 %p1, %tid, 0;
        mov.b32 %r40, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r40], 2;
        bar.sync 0;
        mbarrier.try_wait.parity.shared.b64 %p2, [%r40], 1;
        mbarrier.try_wait.parity.shared.b64 %p3, [%r40], 0;
        setp.lt.u32 %p9, %tid, 2;
        @%p9 mbarrier.arrive.shared::cta.b64 _, [%r40];
        bar.sync 0;
        mbarrier.try_wait.parity.shared.b64 %p4, [%r40], 0;
        mbarrier.try_wait.parity.shared.b64 %p5, [%r40], 1;"""
    found = execute(body, {}, ["%p2", "%p3", "%p4", "%p5"], shared=8)
    assert [int(f[0]) for f in found] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "shape, strides, box", [((8, 16), (17, 1), (4, 16)), ((8, 16), (16, 1), (300, 16)), ((8, 16), (16, 2), (4, 16))]
)
def test_a_map_that_hardware_refuses_is_refused(shape, strides, box):
    with pytest.raises(ValueError, match="tensor map"):
        tensor_copy.TensorMap.encode(1 << 38, shape, strides, 4, {"block_size": box, "swizzle": 0})
