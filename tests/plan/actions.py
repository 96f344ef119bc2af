"""What random programs consist of: models, calls, training steps, and changes to a model. On the fake device."""

import contextlib
import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdeit
from tests.plan import models, test_blocks
from tests.plan.changes import LoRA, replaced_data
from tests.plan.events import precision
from tests.plan.memory import little_memory

MODELS = {
    "distilled": models.build,
    "in bf16": functools.partial(models.build, dtype=torch.bfloat16),
    "drop path": functools.partial(models.build, drop_path_rate=0.3, memory="lean"),
    "LayerScale": functools.partial(models.build, models.PLAIN, init_values=0.1),
    "timm's blocks": functools.partial(test_blocks.build, "timm"),
    "torchvision": functools.partial(test_blocks.build, "torchvision"),
    "ViT": functools.partial(test_blocks.build, "ViT"),
    "CaiT": functools.partial(test_blocks.build, "CaiT"),
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
        self.model, self.undo, self.results, self.x = model, [], [], None
        self.checkpoints = False

    def called(self, images, around=lambda model, x: model(x)):
        like = next(self.model.parameters())
        self.x = IMAGES[images](dict(dtype=like.dtype, device=like.device))
        made = around(self.model, self.x)
        return made if isinstance(made, tuple) else (made,) if isinstance(made, torch.Tensor) else tuple(made.values())

    def block(self, index):
        kinds = ("Block", "EncoderBlock", "ViTLayer", "LayerScaleBlock")
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


def step(program, images, autocast, backward, zeros, around="nothing"):
    if zeros != "kept":
        program.model.zero_grad(set_to_none=zeros == "none")
    with precision(autocast):
        outputs = program.called(images, AROUND[around])
    program.results += outputs
    program.checkpoints |= around != "nothing"
    BACKWARD[backward](program, sum(output.square().sum() for output in outputs[: 1 if backward == "of one" else None]))


AROUND = {
    "nothing": lambda model, x: model(x),
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=True),
}


def twice(program, loss):
    loss.backward(retain_graph=True)
    loss.backward()


def after_other_data(program, loss):
    if program.checkpoints:  # an error from plans
        return
    replaced_data(program.norm(-1).weight)
    replaced_data(next(module for module in program.block(-1).modules() if isinstance(module, nn.Linear)).weight)
    loss.backward()


def of_all(program, loss):
    wanted = [each for each in (program.x, *program.model.parameters()) if each.requires_grad]
    program.results += torch.autograd.grad(loss, wanted, allow_unused=True)


def with_a_hook_that_raises(program, loss, kind=ValueError):
    def hook(_):
        raise kind("of the program")

    handle = next(p for p in program.block(0).parameters() if p.requires_grad).register_hook(hook)
    try:
        loss.backward()
    finally:
        handle.remove()


def interrupted(program, loss):
    with_a_hook_that_raises(program, loss, KeyboardInterrupt)


def raises(program, loss):
    raise ValueError("of the program")


BACKWARD = {
    "once": lambda _, loss: loss.backward(),
    "of one": lambda _, loss: loss.backward(),
    "never": lambda _, loss: None,
    "twice": twice,
    "after other data": after_other_data,
    "of all": of_all,
    "with a hook that raises": with_a_hook_that_raises,
    "interrupted": interrupted,
    "raises": raises,
}


RAISING = ("with a hook that raises", "interrupted", "raises", "after other data")


@functools.cache
def other_stream():
    return torch.cuda.Stream()


def on_another_stream(program, call, **options):
    stream = other_stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            call(program, **options)
    finally:
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()


def in_threads(program, images, autocast, mode):
    """Two threads that call one model at the same time."""
    start, errors = threading.Barrier(2), []
    settings = fastdeit.get_backend()

    def work():
        start.wait()
        try:
            with MODES[mode](), precision(autocast), fastdeit.use_backend(settings):
                program.results += program.called(images)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def captured(program, call, **options):
    """A call, and another one in a graph that the program captures: no kernel may be launched there for the first time."""
    call(program, **options)
    program.results.clear()
    program.model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(program, **options)
    graph.replay()
    program.model.zero_grad(set_to_none=True)
    program.results.clear()


def starved(program, call, small, large, **options):
    """A call for which there is too little memory, or just enough."""
    with little_memory(small, large), contextlib.suppress(torch.OutOfMemoryError):
        call(program, **options)
    program.x = None


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
    program.replace(parent, name, LoRA(layer).to(layer.weight.device, layer.weight.dtype))


def load(program, assign):
    loaded = {name: tensor.clone() for name, tensor in program.model.state_dict().items()}
    program.model.load_state_dict(loaded, assign=assign)


def copied(program):
    program.model, program.undo = copy.deepcopy(program.model), []


def pickled(program):
    program.model, program.undo = pickle.loads(pickle.dumps(program.model)), []


def swapped(program, dtype):
    """A conversion that swaps the contents of parameters instead of their data."""
    program.model.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        program.model.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def optimized(program, kind, **options):
    kind([p for p in program.model.parameters() if p.requires_grad], lr=0.1, **options).step()


def averaged(program):
    average = timm.utils.ModelEmaV3(program.model)
    program.model.zero_grad()
    average.update(program.model)
    for _ in range(3):
        infer(Program(average.module), "two", torch.bfloat16, "no_grad")


def checkpointed(program, on):
    program.checkpoints = True
    for name in ("set_grad_checkpointing", "gradient_checkpointing_enable" if on else "gradient_checkpointing_disable"):
        if hasattr(program.model, name):
            getattr(program.model, name)(*([on] if name.startswith("set") else []))


CHANGES: dict[str, Callable[[Program], Any]] = {
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
    "to another device": lambda program: program.model.to("cuda:1"),
    "back": lambda program: program.model.to("cuda:0"),
    "copied": copied,
    "pickled": pickled,
    "shared": lambda program: program.model.share_memory(),
    "swapped to bf16": lambda program: swapped(program, torch.bfloat16),
    "swapped to fp32": lambda program: swapped(program, torch.float32),
    "SGD": lambda program: optimized(program, torch.optim.SGD, foreach=True),
    "AdamW": lambda program: optimized(program, torch.optim.AdamW, fused=True),
    "averaged": averaged,
    "lean": lambda program: fastdeit.accelerate(program.model, memory="lean"),
    "accelerated": lambda program: fastdeit.accelerate(program.model),
    "restored": lambda program: fastdeit.restore(program.model),
    "distilled training": lambda program: getattr(program.model, "set_distilled_training", bool)(),
    "checkpointed": lambda program: checkpointed(program, True),
    "not checkpointed": lambda program: checkpointed(program, False),
}


def change(program, what):
    CHANGES[what](program)
