"""Random programs: a model, and calls, training steps and changes to it, one after the other. Run by the ops and from plans."""

import random
from collections import Counter
from typing import NamedTuple

import torch

from fastdeit.plan.planned import Plan, Plans
from fastdeit.plan.training import TrainingPlan
from fastdeit.testing import fake_cuda
from tests.plan.actions import (
    AROUND,
    BACKWARD,
    CHANGES,
    IMAGES,
    MODELS,
    MODES,
    RAISING,
    Program,
    captured,
    change,
    in_threads,
    infer,
    on_another_stream,
    starved,
    step,
)
from tests.plan.events import KINDS, of_parameters
from tests.plan.memory import memory


def draw_call(rng):
    def usually(usual, others):
        return usual if rng.random() < 0.6 else rng.choice(list(others))

    call = dict(images=usually("two", IMAGES), autocast=usually(torch.bfloat16, (None, torch.float16, torch.bfloat16)))
    if rng.random() < 0.3:
        return rng.choice((infer, infer, infer, in_threads)), call | dict(mode=rng.choice(list(MODES)))
    call |= dict(backward=usually("once", BACKWARD), zeros=usually("none", ("zeros", "kept")))
    return step, call | dict(around=usually("nothing", AROUND))


def elsewhere(rng, call, options):
    """The call as it is, or in other circumstances."""
    where = rng.choice((None, None, None, None, None, None, on_another_stream, captured, starved))
    if where is None or call is in_threads or (where in (captured, starved) and options.get("backward") in RAISING):
        return call, options
    options = dict(call=call, **options)
    if where is starved:
        options |= dict(
            small=rng.choice((64, 640, 2560, 6400, 12800)) + 64 * rng.randrange(20), large=rng.randrange(20000)
        )
    return where, options


def draw(seed, length=20):
    """A model's name, and actions: functions of a `Program` with their arguments."""
    rng = random.Random(seed)
    habits = [draw_call(rng) for _ in range(3)]
    actions = [(change, dict(what=what)) for what in rng.sample(("train", "distilled training"), rng.choice((0, 1, 2)))]
    while len(actions) < length:
        if rng.random() < 0.6:
            habit = rng.choice(habits)  # what has a plan is called three times
            actions += [elsewhere(rng, *habit) for _ in range(rng.choice((2, 3, 4)))]
        else:
            actions.append((change, dict(what=rng.choice(list(CHANGES)))))
    return rng.choice(list(MODELS)), actions


class Done(NamedTuple):
    """What an action did.

    Attributes:
        outcome: how it ended and what it gave.
        own: its kernels and products, but those of rehearsals.
        others: other launches.
        offset: of the next random numbers.
        memory: that is held after it, in bytes, beyond what was before the program.
        rehearsed: kernels and products of rehearsals.
        recomputed: how often plans ran in a recomputation.
    """

    outcome: list
    own: list
    others: Counter
    offset: list
    memory: int
    rehearsed: list
    recomputed: int


class Watch:
    """Watches plans.

    Attributes:
        ran: how often each kind of plan ran, and "recompute" how often in a recomputation.
        rehearsals: of an action, first and last event.
    """

    def __init__(self):
        self.ran, self.rehearsals = Counter(), []

    def patch(self, patch):
        for kind, method in ((Plan, "launch"), (TrainingPlan, "__call__"), (TrainingPlan, "recompute")):
            patch.setattr(kind, method, self._counted(getattr(kind, method), method if method == "recompute" else kind))
        patch.setattr(Plans, "rehearse", self._noted(Plans.rehearse))

    def _counted(self, run, name):
        return lambda *args: self.ran.update([name]) or run(*args)

    def _noted(self, rehearse):
        def noted(*args):
            first = fake_cuda.recorded()
            try:
                return rehearse(*args)
            finally:
                self.rehearsals.append((first, fake_cuda.recorded()))

        return noted


def done(program, function, options, watch):
    program.results = []
    watch.rehearsals.clear()
    recomputed = watch.ran["recompute"]
    with fake_cuda.record() as events:
        try:
            function(program, **options)
            ended = "done"
        except (Exception, KeyboardInterrupt) as error:
            ended = f"{type(error).__name__}: {str(error).partition('[')[0]}"
    during = [event for first, last in watch.rehearsals for event in events[first:last]]
    for first, last in reversed(watch.rehearsals):
        del events[first:last]
    events, during = ([e for e in each if e.kind in KINDS] for each in (events, during))
    gradients = [parameter.grad for parameter in program.model.parameters()]
    found = [] if ended != "done" or function is starved else [*program.results, *gradients]
    facts = [t if t is None else (t.shape, t.stride(), t.dtype, t.requires_grad, t.is_inference()) for t in found]
    if ended != "done" or function is starved:
        # Plans give the gradients of several blocks together: others were added before the error.
        program.model.zero_grad()
        events = []
    if function is starved:
        ended = "starved" if ended == "done" else ended
        torch.manual_seed(0)
    offset = [each.get_offset() for each in torch.cuda.default_generators]
    # A plan computes with zeros for an output's gradient that is missing. Freed memory of a parameter may be that of others.
    if options.get("backward") in ("of one", "after other data"):
        events = []
    program.results, gradients, found = [], None, None
    own, rehearsed = (
        [event for event in of_parameters(each, program.model) if event.kind in ("triton_launch", "gemm")]
        for each in (events, during)
    )
    others = Counter(event.name for event in events if event.kind not in ("triton_launch", "gemm"))
    return Done([ended, *facts], own, others, offset, memory(), rehearsed, watch.ran["recompute"] - recomputed)


def run(name, actions, watch):
    torch.manual_seed(0)
    program = Program(MODELS[name]())
    before, made = memory(), []
    for action in actions:
        each = done(program, *action, watch)
        made.append(each._replace(memory=each.memory - before))
    return made
