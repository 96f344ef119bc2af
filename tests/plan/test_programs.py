"""Random programs of calls, training steps and changes do the same from plans as by the ops. On the fake runtime."""

import copy
import functools
import random
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fastdeit
from fastdeit.plan import planned as planning
from fastdeit.plan.planned import Plan
from fastdeit.plan.training import TrainingPlan
from fastdeit.testing import fake_cuda
from tests.plan import models, test_blocks
from tests.plan.changes import LoRA, replaced_data
from tests.plan.events import KINDS, of_parameters, precision, unmerged
from tests.plan.models import needs_plans

pytestmark = [pytest.mark.fake_device, needs_plans]

MODELS = {
    "distilled": models.build,
    "in bf16": functools.partial(models.build, dtype=torch.bfloat16),
    "drop path": functools.partial(models.build, drop_path_rate=0.3, memory="lean"),
    "LayerScale": functools.partial(models.build, models.PLAIN, init_values=0.1),
    "timm's blocks": functools.partial(test_blocks.build, "timm"),
    "torchvision": functools.partial(test_blocks.build, "torchvision"),
    "ViT": functools.partial(test_blocks.build, "ViT"),
}
IMAGES = {
    "two": lambda kind: torch.zeros(2, 3, 64, 64, **kind),
    "one": lambda kind: torch.zeros(1, 3, 64, 64, **kind),
    "channels last": lambda kind: torch.zeros(2, 3, 64, 64, **kind).to(memory_format=torch.channels_last),
    "sliced": lambda kind: torch.zeros(2, 3, 64, 128, **kind)[..., ::2],
    "expanded": lambda kind: torch.zeros(1, 3, 64, 64, **kind).expand(2, -1, -1, -1),
    "with a gradient": lambda kind: torch.zeros(2, 3, 64, 64, **kind, requires_grad=True),
}


class Program:
    """What a program has at hand: its model, and how to take changes back."""

    def __init__(self, model):
        self.model, self.undo, self.results = model, [], []

    def called(self, images):
        like = next(self.model.parameters())
        self.x = IMAGES[images](dict(dtype=like.dtype, device="cuda"))
        made = self.model(self.x)
        return made if isinstance(made, tuple) else (made,) if isinstance(made, torch.Tensor) else tuple(made.values())

    def block(self, index):
        kinds = ("Block", "EncoderBlock", "ViTLayer")
        return [module for module in self.model.modules() if type(module).__name__ in kinds][index]

    def norm(self, index):
        return next(module for module in self.block(index).modules() if isinstance(module, nn.LayerNorm))

    def replace(self, parent, name, child):
        before = getattr(parent, name)
        setattr(parent, name, child)
        self.undo.append(lambda: setattr(parent, name, before))


# ---- calls

MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}


def infer(program, images, autocast, mode):
    with MODES[mode](), precision(autocast):
        program.results += program.called(images)


def step(program, images, autocast, backward, zeros):
    if zeros != "kept":
        program.model.zero_grad(set_to_none=zeros == "none")
    with precision(autocast):
        outputs = program.called(images)
    program.results += outputs
    BACKWARD[backward](program, sum(output.square().sum() for output in outputs[: 1 if backward == "of one" else None]))


def twice(program, loss):
    loss.backward(retain_graph=True)
    loss.backward()


def after_other_data(program, loss):
    replaced_data(program.norm(-1).weight)
    replaced_data(next(module for module in program.block(-1).modules() if isinstance(module, nn.Linear)).weight)
    loss.backward()


def of_all(program, loss):
    wanted = [each for each in (program.x, *program.model.parameters()) if each.requires_grad]
    program.results += torch.autograd.grad(loss, wanted, allow_unused=True)


def with_a_hook_that_raises(program, loss):
    def hook(_):
        raise ValueError("of the program")

    handle = next(p for p in program.block(0).parameters() if p.requires_grad).register_hook(hook)
    try:
        loss.backward()
    finally:
        handle.remove()


BACKWARD = {
    "once": lambda _, loss: loss.backward(),
    "of one": lambda _, loss: loss.backward(),
    "never": lambda _, loss: None,
    "twice": twice,
    "after other data": after_other_data,
    "of all": of_all,
    "with a hook that raises": with_a_hook_that_raises,
}

# ---- changes


def freeze(program, part):
    for name, parameter in program.model.named_parameters():
        parameter.requires_grad_(part not in name)


def in_place(program):
    with torch.no_grad():
        for parameter in program.model.parameters():
            parameter.mul_(0.5)


def take_back(program):
    if program.undo:
        program.undo.pop()()


def lora(program):
    names = [name for name, child in program.block(-1).named_modules() if isinstance(child, nn.Linear)]
    parent, _, name = names[0].rpartition(".")
    parent = program.block(-1).get_submodule(parent)
    layer = getattr(parent, name)
    program.replace(parent, name, LoRA(layer).to(layer.weight.dtype))


def load(program, assign):
    loaded = {name: tensor.clone() for name, tensor in program.model.state_dict().items()}
    program.model.load_state_dict(loaded, assign=assign)


def copied(program):
    program.model, program.undo = copy.deepcopy(program.model), []


CHANGES = {
    "freeze nothing": lambda program: freeze(program, "?"),
    "freeze biases": lambda program: freeze(program, "bias"),
    "freeze norms": lambda program: freeze(program, "norm"),
    "in place": in_place,
    "other data": lambda program: replaced_data(program.norm(0).bias),
    "all other data": lambda program: list(map(replaced_data, program.model.parameters())),
    "a shared parameter": lambda program: program.replace(program.norm(1), "weight", program.norm(0).weight),
    "another parameter": lambda program: program.replace(
        program.norm(1), "weight", nn.Parameter(program.norm(1).weight.detach().clone())
    ),
    "LoRA": lora,
    "a hook": lambda program: program.undo.append(program.block(-1).register_forward_hook(lambda *_: None).remove),
    "another epsilon": lambda program: program.replace(program.norm(0), "eps", 1e-3),
    "taken back": take_back,
    "taken back, too": take_back,
    "train": lambda program: program.model.train(),
    "eval": lambda program: program.model.eval(),
    "loaded": lambda program: load(program, False),
    "assigned": lambda program: load(program, True),
    "bf16": lambda program: program.model.bfloat16(),
    "fp32": lambda program: program.model.float(),
    "to the CPU and back": lambda program: program.model.cpu() and program.model.cuda(),
    "copied": copied,
    "lean": lambda program: fastdeit.accelerate(program.model, memory="lean"),
    "accelerated": lambda program: fastdeit.accelerate(program.model),
    "restored": lambda program: fastdeit.restore(program.model),
    "distilled training": lambda program: getattr(program.model, "set_distilled_training", bool)(),
}


def change(program, what):
    CHANGES[what](program)


# ---- programs


def draw_call(rng):
    def usually(usual, others):
        return usual if rng.random() < 0.6 else rng.choice(list(others))

    call = dict(images=usually("two", IMAGES), autocast=usually(torch.bfloat16, (None, torch.float16)))
    if rng.random() < 0.4:
        return infer, call | dict(mode=rng.choice(list(MODES)))
    return step, call | dict(backward=usually("once", BACKWARD), zeros=usually("none", ("zeros", "kept")))


def draw(seed, length=20):
    """A model's name, and actions: functions of a `Program` with their arguments."""
    rng = random.Random(seed)
    habits = [draw_call(rng) for _ in range(3)]
    actions = [(change, dict(what=what)) for what in rng.sample(("train", "distilled training"), rng.choice((0, 1, 2)))]
    while len(actions) < length:
        if rng.random() < 0.6:
            actions += [rng.choice(habits)] * rng.choice((2, 3, 4))  # what has a plan is called three times
        else:
            actions.append((change, dict(what=rng.choice(list(CHANGES)))))
    return rng.choice(list(MODELS)), actions


class Done(NamedTuple):
    """What an action did: how it ended and what it gave, its kernels and products, other launches, and the next random numbers."""

    outcome: list
    own: list
    others: Counter
    offset: int


def done(program, function, options):
    program.results = []
    with fake_cuda.record(*KINDS) as events:
        try:
            function(program, **options)
            ended = "done"
        except Exception as error:
            ended = f"{type(error).__name__}: {str(error).partition('[')[0]}"
    gradients = [parameter.grad for parameter in program.model.parameters()]
    found = [] if ended != "done" else [*program.results, *gradients]
    facts = [t if t is None else (t.shape, t.stride(), t.dtype, t.requires_grad, t.is_inference()) for t in found]
    offset = torch.cuda.default_generators[0].get_offset()
    if ended != "done":  # plans give the gradients of several blocks together: others were added before the error
        program.model.zero_grad()
        events = []
    # A plan computes with zeros for an output's gradient that is missing. Freed memory of a parameter may be that of others.
    if options.get("backward") in ("of one", "after other data"):
        events = []
    program.results = []
    own = [event for event in of_parameters(events, program.model) if event.kind in ("triton_launch", "gemm")]
    others = Counter(event.name for event in events if event.kind not in ("triton_launch", "gemm"))
    return Done([ended, *facts], own, others, offset)


def run(name, actions):
    torch.manual_seed(0)
    program = Program(MODELS[name]())
    return [done(program, *action) for action in actions]


def compare(seed, monkeypatch):
    """Runs a program three times: by the ops, which compiles kernels, from plans, and by the ops. Returns how often plans ran."""
    fastdeit.set_graphs("off")
    (name, actions), ran = draw(seed), Counter()
    with monkeypatch.context() as patch:
        patch.setattr(planning, "why_not_plannable", lambda _: "a test")
        run(name, actions)
        expected = run(name, actions)
    with monkeypatch.context() as patch:
        for kind, method in ((Plan, "launch"), (TrainingPlan, "__call__")):
            original = getattr(kind, method)
            patch.setattr(kind, method, lambda *a, run=original, kind=kind: ran.update([kind]) or run(*a))
        found = run(name, actions)
    fastdeit.set_graphs()
    for at, (ours, ops) in enumerate(zip(found, expected, strict=True)):
        where = f"seed {seed}, {name}, action {at} of {[(f.__name__, *o.values()) for f, o in actions[: at + 1]]}"
        assert ours.outcome == ops.outcome, where
        assert unmerged(ours.own, ops.own) == ops.own, where
        assert (ours.others, ours.offset) == (ops.others, ops.offset), where
    return ran


def test_programs_do_the_same_from_plans(monkeypatch):
    ran = sum((compare(seed, monkeypatch) for seed in (5, 11, 12)), Counter())
    assert ran[Plan] > 10 and ran[TrainingPlan] > 10


@pytest.mark.long
@pytest.mark.parametrize("first", [0, 7])
def test_more_programs_do_the_same_from_plans(first, monkeypatch):
    for seed in range(first, first + 7):
        compare(seed, monkeypatch)
