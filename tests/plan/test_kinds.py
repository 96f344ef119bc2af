"""Which kinds of call have plans, where there are more kinds than plans."""

import random

import pytest
import torch

from fastdeit.blocks.snapshot import KEY
from fastdeit.plan import kinds as kinds_of_call
from fastdeit.plan import planned as planning
from fastdeit.plan.kinds import SEEN, Kinds
from fastdeit.plan.planned import Plan, described
from tests.plan.events import precision
from tests.plan.models import build, images, needs_plans, plans

pytestmark = [needs_plans, pytest.mark.fake_device]


@pytest.fixture
def two_plans(monkeypatch):
    """A model keeps two plans."""
    for module in (kinds_of_call, planning):
        monkeypatch.setattr(module, "MOST_PLANS", 2)


@pytest.fixture
def recordings(monkeypatch):
    """One entry for each recording."""
    made = []

    class Counted(planning.Tape):
        def __init__(self, *args, **options):
            made.append(1)
            super().__init__(*args, **options)

    monkeypatch.setattr(planning, "Tape", Counted)
    return made


@torch.no_grad()
def call(model, *batches):
    with precision(torch.bfloat16):
        for batch in batches:
            model(images(model, batch))


def planned_batches(model):
    return {key[0][0] for key, kind in model.__dict__[KEY].made[1].kinds if kind.planned()}


def test_frequent_kinds_keep_their_plans(two_plans, recordings):
    model = build(depth=1)
    call(model, *[1, 2] * 3)
    assert planned_batches(model) == {1, 2} and len(recordings) == 2
    call(model, *[1, 2, 3, 4, 5] * 20)  # between two calls of 1 or 2, one of each other
    assert planned_batches(model) == {1, 2} and len(recordings) == 2
    assert {type(entry) for entry in plans(model)} == {Plan, str}
    lines = {line.partition(" x ")[0]: line.partition(": ")[2] for line in described(model)}
    assert {lines[batch] for batch in "345"} == {"not planned: 2 other kinds have plans"}


def test_a_kind_that_is_called_no_more_gives_its_plan_to_one_that_is(two_plans, recordings):
    model = build(depth=1)
    call(model, *[1, 2] * 3, *[2, 3] * 7)
    assert planned_batches(model) == {1, 2}
    call(model, 2, 3)
    assert planned_batches(model) == {2, 3} and len(recordings) == 3
    call(model, *[2, 3] * 3, 1)
    assert planned_batches(model) == {2, 3} and len(recordings) == 3


def test_kinds_at_random_are_seldom_recorded(two_plans, recordings):
    model, chosen = build(depth=1), random.Random(0)
    call(model, *(chosen.randrange(1, 7) for _ in range(300)))
    assert len(planned_batches(model)) == 2 and 2 <= len(recordings) <= 300 / 20


def test_steps_and_calls_share_the_plans(two_plans):
    model = build(depth=1)
    for _ in range(3):
        for batch in (1, 2, 3):
            with precision(torch.bfloat16):
                model(images(model, batch)).sum().backward()
            call(model, batch)
    assert len(planned_batches(model)) <= 2 and sum(not isinstance(entry, str) for entry in plans(model)) == 2


def test_kinds_without_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(kinds_of_call, "_MOST_OTHERS", 3)
    kinds = Kinds()
    for number in range(10):
        kinds.called((number,)).entry = SEEN if number else "a plan"
        kinds.called((0,)).entry = object()
    assert [key for key, _ in kinds] == [(0,), (7,), (8,), (9,)]
