"""Sectors, wavefronts and instruction classes, by patterns whose costs are known."""

import numpy as np
import pytest

from fastdeit.testing.ptx.counts import Counts, Observer, instruction_class, sectors_of, wavefronts_of

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
    observer = Observer()
    body = "shl.b32 %r30, %tid, 7;\nst.shared.b32 [%r30], %r1;"
    execute(body, {"%r1": np.zeros(32, np.uint32)}, [], shared=4096, observer=observer)
    assert (observer.sectors, observer.ideal_sectors, observer.wavefronts, observer.ideal_wavefronts) == (4, 4, 32, 1)


def test_counts_add_up():
    both = Counts({"float": 1}, 10, 8, 3, 3, 0) + Counts({"float": 2, "integer": 1}, 2, 2, 3, 1, 5)
    assert both == Counts({"float": 3, "integer": 1}, 12, 10, 6, 4, 5)
    assert both.sector_ratio == 1.2 and both.wavefront_ratio == 1.5 and Counts().sector_ratio == 1
