"""Stamps: who accesses memory, and behind which barriers (PTX ISA 8, 9.7.13). They order the accesses of a block's threads.

From the lowest bit on a stamp holds 10 bits for the thread, 12 that count barriers of its warp since the block's last one, two
marks, 18 that count barriers of the block, and 21 for the block's number in the grid plus 1. A mark says that the stamp stands for
several threads that accessed a place behind the same barriers: of one warp, or of several.
"""

import numpy as np
from numpy import ndarray

from fastdeit.testing.ptx.program import PtxError

EPOCH, _BLOCK = 24, 42  # where the barriers of the block begin, and the block's number
THREAD = np.int64(0x3FF)
WARP = np.int64(0x3E0)  # of the thread's number, what names its warp
_WARP_BARRIER = np.int64(1 << 10)
_WARP_BARRIERS = np.int64(0xFFF << 10)
_LANES, _WARPS = np.int64(1 << 22), np.int64(1 << 23)  # the marks
NOBODY = np.int64(0)
BLOCKS = np.int64((1 << 63) - 1)  # threads of several blocks


def first_stamps(blocks: ndarray, threads: int) -> ndarray:
    """Of each thread of the blocks with these numbers in the grid, before any barrier."""
    return np.repeat(blocks.astype(np.int64) + 1 << _BLOCK, threads) + np.tile(np.arange(threads), len(blocks))


def floor_of(stamps: ndarray) -> ndarray:
    """The lowest stamp that is as late as each: of threads of its block, since the block's last barrier."""
    return stamps >> EPOCH << EPOCH


def after_barrier(stamps: ndarray) -> ndarray:
    """Of the same threads, behind a barrier of their block."""
    later = floor_of(stamps) + (1 << EPOCH) | stamps & THREAD
    if (later >> _BLOCK != stamps >> _BLOCK).any():
        raise PtxError("a block passes more barriers than a stamp counts")
    return later


def after_warp_barrier(stamps: ndarray) -> ndarray:
    """Of the same threads, behind a barrier of their warp."""
    if (stamps & _WARP_BARRIERS == _WARP_BARRIERS).any():
        raise PtxError("a warp passes more barriers than a stamp counts")
    return stamps + _WARP_BARRIER


def other_block(last: ndarray, now: ndarray) -> ndarray:
    """Whether somebody of another block than that of `now` made an access."""
    return (last != NOBODY) & (last >> _BLOCK != now >> _BLOCK)


def unordered(last: ndarray, now: ndarray) -> ndarray:
    """Whether no barrier stands between accesses of two threads of a block, `last` with or without a mark."""
    differ = last ^ now
    other_warp, same_barriers = differ & (WARP | _WARPS) != 0, differ & _WARP_BARRIERS == 0
    return (differ >> EPOCH == 0) & (other_warp | same_barriers & (differ != 0))


def merged(last: ndarray, now: ndarray) -> ndarray:
    """What stands for an access at `now` and those before it, at `last`, that it is not ordered behind.

    Of several such stamps behind the same barrier of a block the largest stands for all of them.
    """
    mark = np.where((last ^ now) & (WARP | _WARPS) != 0, _WARPS, _LANES)
    return np.where(other_block(last, now), BLOCKS, np.where(unordered(last, now), now | mark, now))
