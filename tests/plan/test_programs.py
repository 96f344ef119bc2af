"""Random programs of calls, training steps and changes do the same from plans as by the ops. On the fake runtime."""

from collections import Counter

import pytest

import fastdeit
from fastdeit.plan import planned as planning
from fastdeit.plan.planned import Plan
from fastdeit.plan.training import TrainingPlan
from tests.plan.actions import in_threads
from tests.plan.events import FOLDS, MERGED_FOLDS, unmerged
from tests.plan.memory import without_old_garbage
from tests.plan.models import needs_plans
from tests.plan.programs import Watch, draw, run

pytestmark = [pytest.mark.fake_device, needs_plans]


LEFT_OUT = (
    "activation_forward",
    "fold_forward",
    "cublas",
)  # of the ends of recomputations, where they make what nothing reads


def left_out(planned, ops):
    """The launches of the ops that are not among a plan's, in which a launch that stands for two counts as these two.

    Raises:
        AssertionError: the plan's are not those of the ops, in their order, without some that may be left out.
    """
    planned, found, second = list(reversed(planned)), [], None
    for event in ops:
        if second is not None and event.name == FOLDS:
            assert second._replace(bytes=event.bytes) == event
            second = None
            continue
        ours = planned[-1] if planned else None
        if ours is not None and ours.name == MERGED_FOLDS and event.name == FOLDS:
            assert second is None
            ours, second = unmerged([ours], [event])
        if ours == event:
            planned.pop()
        else:
            assert any(name in event.name for name in LEFT_OUT), (ours, event)
            found.append(event)
    assert not planned and second is None
    return found


def names(done):
    """Of kernels and products, each as often as it was launched."""
    return Counter(name for event in done.own for name in ([FOLDS] * 2 if event.name == MERGED_FOLDS else [event.name]))


def without_layouts(done):
    return done._replace(own=[event._replace(arguments=()) for event in done.own], others=Counter())


def compare(seed, monkeypatch):
    """Runs a program three times: by the ops, which compiles kernels, from plans, and by the ops. Returns how often plans ran."""
    fastdeit.set_graphs("off")
    (name, actions), ran = draw(seed), Counter()
    with without_old_garbage():
        compare_actions(f"seed {seed}, {name}", name, actions, monkeypatch, ran)
    fastdeit.set_graphs()
    return ran


def compare_actions(title, name, actions, monkeypatch, ran):
    with monkeypatch.context() as patch:
        patch.setattr(planning, "why_not_plannable", lambda _: "a test")
        run(name, actions, Watch())
        expected = run(name, actions, Watch())
    with monkeypatch.context() as patch:
        watch = Watch()
        watch.patch(patch)
        found = run(name, actions, watch)
    ran.update(watch.ran)
    for at, (ours, ops) in enumerate(zip(found, expected, strict=True)):
        where = f"{title}, action {at} of {[(f.__name__, *o.values()) for f, o in actions[: at + 1]]}"
        assert ours.outcome == ops.outcome, where
        if name == "CaiT":  # gives blocks a slice of a gradient, which plans copy first
            ours, ops = map(without_layouts, (ours, ops))
        if actions[at][0] is in_threads:  # in any order
            assert names(ours) == names(ops), where
            ours = ours._replace(own=ops.own)
        assert len(left_out(ours.own, ops.own)) <= 6 * ours.recomputed, where
        if ours.own and actions[at][1].get("backward") in ("once", "twice", "of all"):
            assert set(ours.rehearsed) <= set(ops.own), where
        assert (ours.others, ours.offset) == (ops.others, ops.offset), where
        assert ours.memory == ops.memory, f"{ours.memory - ops.memory} {where}"


def test_programs_do_the_same_from_plans(monkeypatch):
    ran = sum((compare(seed, monkeypatch) for seed in (5, 11, 12)), Counter())
    assert ran[Plan] > 10 and ran[TrainingPlan] > 10


@pytest.mark.long
@pytest.mark.parametrize("first", [0, 7])
def test_more_programs_do_the_same_from_plans(first, monkeypatch):
    for seed in range(first, first + 7):
        compare(seed, monkeypatch)
