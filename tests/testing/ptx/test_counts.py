"""Sectors, wavefronts and instruction classes, by patterns whose costs are known."""

import numpy as np
import pytest

from fastdeit.aot.execution import Accesses
from fastdeit.testing.ptx.counts import Counts, Observer, instruction_class, sectors_of, wavefronts_of
from fastdeit.testing.ptx.machine import IN_STEP, Machine

LANES = np.arange(32)


@pytest.mark.parametrize(
    "address, nbytes, expected",
    [
        (4 * LANES, 4, (4, 4)),  # 128 bytes in a row
        (4 * LANES + 16, 4, (5, 4)),  # half a sector off
        (16 * LANES, 16, (16, 16)),
        (128 * LANES, 4, (32, 4)),  # a sector a thread
        (0 * LANES, 4, (1, 1)),  # one address for all
        (2 * LANES, 2, (2, 2)),
    ],
)
def test_sectors(address, nbytes, expected):
    assert sectors_of(LANES, address, nbytes) == expected


def test_sectors_are_of_each_warp():
    lanes = np.arange(64)
    assert sectors_of(lanes, 0 * lanes, 4) == (2, 2)


@pytest.mark.parametrize(
    "address, nbytes, expected",
    [
        (4 * LANES, 4, (1, 1)),
        (0 * LANES, 4, (1, 1)),  # broadcast
        (128 * LANES, 4, (32, 1)),  # one bank
        (8 * LANES, 4, (2, 1)),
        (132 * LANES, 4, (1, 1)),  # padded rows
        (8 * LANES, 8, (2, 2)),  # half a warp at a time
        (16 * LANES, 16, (4, 4)),  # a quarter
        (128 * LANES, 16, (32, 4)),
        (2 * LANES, 2, (1, 1)),
    ],
)
def test_wavefronts(address, nbytes, expected):
    assert wavefronts_of(LANES, address, nbytes) == expected


@pytest.mark.parametrize(
    "opcode, expected",
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "matrix"),
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "matrix"),
        ("wgmma.wait_group.sync.aligned", "barrier"),
        ("ex2.approx.ftz.f32", "special"),
        ("fma.rn.f32", "float"),
        ("add.s32", "integer"),
        ("setp.lt.s32", "integer"),
        ("ld.global.v4.b32", "global"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "shared"),
        ("cp.async.cg.shared.global", "copy"),
        ("cvt.rn.bf16x2.f32", "convert"),
    ],
)
def test_classes(opcode, expected):
    assert instruction_class(opcode) == expected


def test_an_observer_sees_a_machine_s_accesses(execute):
    observer, programs = Observer(), []

    def make(program, shared):
        programs.append(Machine(program, shared, IN_STEP))
        return programs[0]

    body = "shl.b32 %r30, %tid, 7;\nst.shared.b32 [%r30], %r1;"
    execute(body, {"%r1": np.zeros(32, np.uint32)}, [], shared=4096, observer=observer, make=make)
    counts = observer.counts(programs[0].program, programs[0].executed)
    assert counts.once == Accesses(loaded=4, ideal_loaded=4, wavefronts=32, ideal_wavefronts=1)
    assert counts.loop == Accesses()
    assert counts.instructions["shared"] == counts.instructions["global"] == 1


def test_what_a_loop_accesses_is_counted_apart(execute):
    observer, programs = Observer(), []

    def make(program, shared):
        programs.append(Machine(program, shared, IN_STEP))
        return programs[0]

    body = """
        mov.u32 %r3, 0;
        shl.b32 %r30, %tid, 2;
        st.shared.b32 [%r30], %r1;
        $again:
        st.shared.b32 [%r30], %r1;
        add.u32 %r3, %r3, 1;
        setp.lt.u32 %p1, %r3, 5;
        @%p1 bra $again;
    """
    execute(body, {"%r1": np.zeros(32, np.uint32)}, ["%r1"], shared=4096, observer=observer, make=make)
    counts = observer.counts(programs[0].program, programs[0].executed)
    assert counts.loop == Accesses(wavefronts=5, ideal_wavefronts=5)
    assert counts.once == Accesses(4, 4, stored=4, ideal_stored=4, wavefronts=1, ideal_wavefronts=1)


def test_counts_add_up():
    one, other = Accesses(10, 8, wavefronts=3, ideal_wavefronts=3), Accesses(2, 2, wavefronts=3, ideal_wavefronts=1)
    both = Counts({"float": 1}, one, other) + Counts({"float": 2, "integer": 1}, other, other)
    assert both == Counts({"float": 3, "integer": 1}, one + other, other + other)
    assert both.once == Accesses(12, 10, wavefronts=6, ideal_wavefronts=4)
    assert both.once.sector_ratio == 1.2 and both.once.wavefront_ratio == 1.5
