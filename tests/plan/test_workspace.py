"""Offsets of buffers in a plan's workspace."""

import random

import pytest
import torch

from fastdeit.plan.tape import Buffer, Operation, View
from fastdeit.plan.workspace import lifetimes, packed


def view(buffer):
    return View(buffer, 0, torch.float32, (buffer.nbytes // 4,), (1,))


def test_a_buffer_lives_from_its_first_event_to_its_last():
    given, weight, a, b = Buffer(0, input=0), Buffer(64, address=4096), Buffer(64), Buffer(128)
    steps = [(given, weight, a), (weight, a, b), (b, weight, a)]
    events = [Operation("mm", (view(left), view(right)), view(out), None) for left, right, out in steps]
    assert lifetimes(events) == {a: (0, 2), b: (1, 2)}


@pytest.mark.parametrize("seed", range(20))
def test_buffers_that_live_at_one_time_share_no_byte(seed):
    random.seed(seed)
    lives = {}
    for _ in range(60):
        first = random.randrange(100)
        lives[Buffer(random.choice((0, 4, 512, 513, random.randrange(1 << 20))))] = first, first + random.randrange(12)
    offsets, total = packed(lives)
    ends = {buffer: offsets[buffer] + buffer.nbytes for buffer in lives}
    assert max(ends.values()) <= total and all(offset >= 0 and offset % 512 == 0 for offset in offsets.values())
    for one, (first, last) in lives.items():
        for other, (start, end) in lives.items():
            if one is not other and first <= end and start <= last:
                assert ends[one] <= offsets[other] or ends[other] <= offsets[one]
    most = max(sum(b.nbytes for b, (first, last) in lives.items() if first <= at <= last) for at in range(120))
    assert most <= total <= 1.6 * most


def test_memory_is_used_again():
    lives = {Buffer(1024): (i, i + 1) for i in range(50)}
    assert packed(lives)[1] == 2048
