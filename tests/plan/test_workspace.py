"""Offsets of buffers in a plan's workspace."""

import random

import pytest
import torch

from fastdeit.plan.code import why_not_code
from fastdeit.plan.tape import Buffer, Descriptor, Launch, Operation, View
from fastdeit.plan.workspace import early_and_late, lifetimes, packed, packed_into, stacked


def view(buffer):
    return View(buffer, 0, torch.float32, (buffer.nbytes // 4,), (1,))


def test_a_buffer_lives_from_its_first_event_to_its_last():
    given, weight, a, b = Buffer(0, input=0), Buffer(64, address=4096), Buffer(64), Buffer(128)
    steps = [(given, weight, a), (weight, a, b), (b, weight, a)]
    events = [Operation("mm", (view(left), view(right)), view(out), None) for left, right, out in steps]
    assert lifetimes(events) == {a: (0, 2), b: (1, 2)}


def test_a_descriptor_of_what_is_another_tensor_at_each_call_cannot_be_repeated():
    given, inside, result = Buffer(64, input=0), Buffer(64), Buffer(64)
    for buffer, refused in ((inside, False), (given, True), (result, True)):
        launch = Launch(None, (Descriptor(view(buffer), (16,), (1,)), view(given), view(result), 3))
        assert (why_not_code([launch], [given, None], [view(result), None]) is not None) == refused


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


def random_lives(count):
    lives = {}
    for _ in range(count):
        first = random.randrange(100)
        lives[Buffer(random.choice((1, 512, 4000, 1 << 16)))] = first, first + random.randrange(20)
    return lives


@pytest.mark.parametrize("seed", range(20))
def test_buffers_among_others_share_no_byte_with_them_while_they_live(seed):
    random.seed(seed)
    taken = {buffer: (0, last) for buffer, (_, last) in random_lives(30).items()}
    allocations = stacked({buffer: last for buffer, (_, last) in taken.items()}, 3)
    assert len(allocations) == 3 and sum(len(each.offsets) for each in allocations) == len(taken)
    lives = random_lives(60)
    inside, rest = packed_into(lives, taken, allocations)
    assert sum(map(len, inside)) + len(rest) == len(lives) and 0 < len(rest) < len(lives)
    for each, more in zip(allocations, inside, strict=True):
        placed = each.offsets | more
        assert all(offset >= 0 and offset + buffer.nbytes <= each.size for buffer, offset in placed.items())
        for one in placed:
            for other in more:
                (first, last), (start, end) = (taken | lives)[one], lives[other]
                if one is not other and first <= end and start <= last:
                    apart = placed[one] + one.nbytes <= placed[other] or placed[other] + other.nbytes <= placed[one]
                    assert apart


def test_what_becomes_free_first_lies_together():
    buffers = [Buffer(1024) for _ in range(8)]
    last = {buffer: number for number, buffer in enumerate(buffers)}
    assert [list(each.offsets) for each in stacked(last, 2)] == [buffers[:4], buffers[4:]]
    assert stacked({}, 2) == []


def test_early_are_those_that_are_done_with_when_less_than_half_is_needed():
    large, middle, small, last = Buffer(4096), Buffer(2048), Buffer(1024), Buffer(512)
    lives = {large: (0, 3), middle: (1, 5), small: (2, 8), last: (20, 22)}
    assert early_and_late(lives) == ({large: (0, 3)}, {middle: (1, 5), small: (2, 8), last: (20, 22)})
    assert early_and_late({large: (0, 3), middle: (4, 9)}) == ({large: (0, 3), middle: (4, 9)}, {})
    assert early_and_late({}) == ({}, {})
