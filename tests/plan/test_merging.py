"""Launches of a plan that stand for two: which are made, in place of which, and how they are compared. On the fake runtime."""

import functools

import pytest
import torch

import fastdeit
from fastdeit.kernels.gemm.folded_weights import fold_both_forward
from fastdeit.kernels.gemm.folded_weights_kernels import fold_four_forward_kernel
from fastdeit.kernels.runtime import launch as launching
from fastdeit.kernels.runtime.raw_launch import aligned_arguments
from fastdeit.kernels.runtime.refusal import KernelRefused
from fastdeit.plan import span as span_plans
from fastdeit.plan.merging import with_merged_folds
from fastdeit.plan.tape import Launch, Operation, Tape, View
from fastdeit.testing import fake_cuda
from tests.plan.events import FOLDS, MERGED_FOLDS, dataflow, precision, recorded, unmerged
from tests.plan.models import PLAIN, build, images, needs_plans, only_plan, plan_it
from tests.plan.test_blocks import block_and_tokens
from tests.plan.test_blocks import build as build_of_library
from tests.plan.test_blocks import step as library_step
from tests.plan.test_checkpointing import checkpointed_model
from tests.plan.test_training import freeze, step

pytestmark = [pytest.mark.fake_device, needs_plans]
MOST_LAUNCHES = {torch.bfloat16: 27, None: 26}  # of a block's training step, by autocast


def step_launches(autocast, **options):
    model = build(dtype=None if autocast else torch.bfloat16, **options).train()
    x = images(model)
    plan_it(lambda: step(model, x, autocast))
    only_plan(model)
    return recorded(lambda: step(model, x, autocast))


def count(events, name=MERGED_FOLDS):
    return sum(event.name == name for event in events)


@pytest.mark.parametrize("autocast", MOST_LAUNCHES, ids=str)
def test_launches_of_a_block_in_a_training_step(autocast):
    few, many = (len(step_launches(autocast, depth=depth)) for depth in (2, 3))
    assert many - few <= MOST_LAUNCHES[autocast]


def test_what_is_merged_in_a_run():
    """In forward of a training step and in a recomputation, a launch for each two branches."""
    model = checkpointed_model()
    plan_it(lambda: library_step(model))
    assert count(recorded(lambda: library_step(model))) == 2 * 2
    assert count(step_launches(torch.bfloat16, name=PLAIN, init_values=0.1, depth=4)) == 3
    # ViT's queries, keys and values are one weight, made before its fold. A block that ends in LayerScale does not fold that one.
    for name, merged in (("ViT", 2), ("timm with LayerScale", 0)):
        model = build_of_library(name).train()
        one = functools.partial(library_step, model)
        plan_it(one)
        assert count(recorded(one)) == merged
    block, x = block_and_tokens("ViT", None)
    with torch.no_grad(), precision(torch.bfloat16):
        plan_it(lambda: block(x))
        events = recorded(lambda: block(x))
    assert count(events) == 0 and count(events, FOLDS) == 2


def test_weights_that_backward_does_not_read_are_folded_where_they_are_used():
    model = build(PLAIN, depth=4).train()
    freeze(model, "patch", "pos", "cls", "blocks.0", "blocks.1")
    x = images(model)
    plan_it(lambda: step(model, x, torch.bfloat16))
    only_plan(model)
    events = recorded(lambda: step(model, x, torch.bfloat16))
    assert count(events, FOLDS) >= 4 and count(events) == 1


def test_memory_that_lives_within_forward_grows_by_biases_alone(monkeypatch):
    sizes = []
    for merges in (True, False):
        if not merges:
            monkeypatch.setattr(span_plans, "with_merged_folds", lambda events, _: events)
        model = build(depth=4).train()
        plan_it(lambda: step(model, images(model), torch.bfloat16))  # noqa: B023
        (span,) = only_plan(model)._spans
        sizes.append((span.saved_sizes, span._passing_size, span.once.sizes))
    (saved, passing, backward), (others, least, expected) = sizes
    assert (saved, backward) == (others, expected)
    assert 0 <= passing - least <= 2 * 2 * (768 + 192) + 1024


def test_a_hook_on_the_kernel_of_either_form_ends_a_plan(monkeypatch):
    model = build(depth=4).train()
    plan_it(lambda: step(model, images(model), torch.bfloat16))
    plan = only_plan(model)
    for module, name in ((fastdeit.kernels.gemm.folded_weights, "fold_both_forward_kernel"), (None, "")):
        kernel = fold_four_forward_kernel if module is None else getattr(module, name)
        assert plan.still_holds()
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "pre_run_hooks", [lambda *_, **__: None])
            assert not plan.still_holds()


# ---- events, one by one


class Layers:
    """Parameters of a branch, and their fold."""

    def __init__(self, inner=256, offset=0):
        memory = torch.zeros(2 * 256 * 256 + offset, device="cuda")[offset:]
        self.first, self.last = memory[: 256 * 256].view(256, 256), torch.zeros(256, inner, device="cuda")
        self.vectors = [torch.zeros(256, device="cuda") for _ in range(5)]
        self.all = [self.first, self.last, *self.vectors]

    def fold(self):
        bias, last_bias, scale, shift, gamma = self.vectors
        factors = dict(column_scale=scale, column_shift=shift, row_scale=gamma)
        return fold_both_forward((self.first, bias), (self.last, last_bias), torch.bfloat16, **factors)


def folds_of(branches, between=lambda: None, before=lambda: None):
    """The events of folding some branches, and the buffers of the weights that each makes."""
    for each in branches:
        each.fold()  # compiles the kernel
    tape = Tape([t for each in branches for t in each.all], [])
    made = []  # so that no memory is used twice
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), tape:
        before()
        for number, each in enumerate(branches):
            made.append(between() if number else None)
            made.append(each.fold())
    assert tape.refused is None
    folds = [event for event in tape.events if isinstance(event, Launch)]
    return tape.events, [{event.args[at].buffer for at in (4, 9)} for event in folds]


def is_merged(event):
    return isinstance(event, Launch) and event.made.kernel is fold_four_forward_kernel


def test_a_launch_for_two_has_the_arguments_of_both():
    events, kept = folds_of([Layers(), Layers(inner=512, offset=1)])
    (made,) = with_merged_folds(events, kept[1])
    assert is_merged(made) and made.args == (*events[0].args, *events[1].args)
    assert made.made.grid == (events[0].made.grid[0] + events[1].made.grid[0], 1, 1)
    assert made.made.constexprs == events[0].made.constexprs
    assert set(made.buffers) == {*events[0].buffers, *events[1].buffers}
    half = len(events[0].args)
    aligned = [aligned_arguments(event.made) for event in events]
    assert aligned_arguments(made.made) == aligned[0] | {half + at for at in aligned[1]}
    pointers = {at for at, arg in enumerate(events[0].args) if isinstance(arg, View)}
    assert aligned == [pointers, pointers - {0}]  # the second one's first weight lies 4 bytes behind such a boundary


def test_folds_are_merged_two_by_two():
    events, kept = folds_of([Layers() for _ in range(5)])
    found = with_merged_folds(events, set().union(*kept))
    assert [is_merged(event) for event in found] == [True, True, False] and found[2] is events[4]
    assert found[0].made is found[1].made and found[0].args != found[1].args  # one kernel is looked for once


def between(name):
    """What happens between the folds of two branches, given the second one's layers."""
    return {
        "nothing that concerns it": lambda other: torch.empty(8, device="cuda").mul_(2),
        "its scale is written": lambda other: other.vectors[2].mul_(2),
        "its weight is made": lambda other: setattr(other, "first", other.first * 2),
        "its tiles differ": lambda other: None,
    }[name]


@pytest.mark.parametrize(
    ("what", "merged"),
    [
        ("nothing that concerns it", True),
        ("its scale is written", False),
        ("its weight is made", False),
        ("its tiles differ", False),
    ],
)
def test_a_fold_comes_first_only_where_nothing_before_it_makes_what_it_reads(what, merged):
    branches = [Layers(), Layers(inner=260 if what == "its tiles differ" else 256)]
    events, kept = folds_of(branches, between=lambda: between(what)(branches[1]))
    found = with_merged_folds(events, kept[1])
    assert any(map(is_merged, found)) is merged
    if merged:
        assert is_merged(found[0]) and found[1:] == events[1:-1] and len(found) > 1
    else:
        assert found == events


def test_a_fold_does_not_come_before_what_touches_its_results():
    """A recording has no such events: what a fold makes is new."""
    events, kept = folds_of([Layers(), Layers()])
    first, second = events
    own = second.args[9]
    read = Operation("copy_", (own,), first.args[9])
    assert with_merged_folds([first, read, second], kept[1]) == [first, read, second]
    same = Launch(first.made, (*first.args[:9], own, *first.args[10:]))
    assert with_merged_folds([same, second], kept[1]) == [same, second]


def test_a_weight_made_before_both_may_be_read_earlier():
    branches = [Layers(), Layers()]
    events, kept = folds_of(branches, before=lambda: setattr(branches[1], "first", branches[1].first * 2))
    (made,) = {event.out.buffer for event in events if not isinstance(event, Launch)}
    assert any(map(is_merged, with_merged_folds(events, kept[1] | {made})))


@pytest.mark.parametrize("missing", [0, 1])
def test_a_weight_that_is_not_kept_is_not_made_earlier(missing):
    events, kept = folds_of([Layers(), Layers()])
    weights = [event.args[at].buffer for event in events for at in (4, 9)]
    assert set(weights) == kept[0] | kept[1]
    assert with_merged_folds(events, kept[1] - {weights[2 + missing]}) == events
    assert len(with_merged_folds(events, kept[1])) == 1  # the first one's stay where they are


@pytest.mark.parametrize("why", ["refused", "taken over", "capture", "scratch memory"])
def test_where_no_kernel_can_be_had_nothing_is_merged(why, monkeypatch):
    events, kept = folds_of([Layers(), Layers()])

    def refuse(*_):
        raise KernelRefused("fold_four_forward_kernel", "gemm", "a test")

    if why == "capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif why == "scratch memory":
        monkeypatch.setattr("fastdeit.kernels.runtime.raw_launch.raw_launcher", lambda launch: None)
    else:
        monkeypatch.setattr(launching, "described_launch", refuse if why == "refused" else lambda *_: None)
    assert with_merged_folds(events, kept[1]) == events


# ---- how launches are compared


def launched(call):
    with fake_cuda.record("triton_launch") as events:
        call()
    return events


def test_a_launch_for_two_is_split_into_these_two():
    """Into what the ops launch, and into nothing else where a tensor, a size or the grid is another."""
    branches = [Layers(), Layers(inner=512)]
    for each in branches:
        each.fold()
    with fake_cuda.separate_memory():
        kept = []
        first, other, second = launched(lambda: kept.extend((branches[0].fold(), launch_other(), branches[1].fold())))
    ops = [first, other, second]
    own = (*first.arguments[:-2], *second.arguments)
    grid = (first.grid[0] + second.grid[0], 1, 1)
    merged = first._replace(name=MERGED_FOLDS, grid=grid, arguments=own, bytes=1)
    assert unmerged([merged, other], ops) == ops and dataflow(unmerged([merged, other], ops)) == dataflow(ops)
    assert unmerged(ops, ops) == ops
    for at in range(len(own) - 2):
        wrong = merged._replace(arguments=(*own[:at], b"\x01" * len(own[at]), *own[at + 1 :]))
        assert unmerged([wrong, other], ops) != ops
    assert unmerged([merged._replace(grid=(grid[0] + 1, 1, 1)), other], ops) != ops
    assert unmerged([other, merged], ops) != ops and unmerged([merged], ops) != ops
    assert unmerged([merged, merged, other], [first, second, *ops]) == [first, second, *ops]


def launch_other():
    return fastdeit.ops.layer_norm(torch.zeros(4, 256, device="cuda"), None, None)
