"""DeiT-B's training step on images that are already there, whole and in its parts, with what fastdeit.train puts together.

What a step's plain call takes beyond its replay as a graph is the host's.
"""

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch.utils.flop_counter import FlopCounterMode

from fastdeit import costs
from fastdeit.benchmarks import models, peers
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.cost_view import shape_of
from fastdeit.costs import Cost
from fastdeit.testing import kernel_device
from fastdeit.train.config import load_config
from fastdeit.train.engine import create_criterion
from fastdeit.train.optimization import create_ema, create_optimizer

PARTS = ["step", "student", "optimizer", "loss", "teacher", "ema"]
CASES = by_importance([256, 64], PARTS)
QUICK, TURNS = 1, 1
_ADAMW = Cost(12, 28, 1)  # a parameter: reads it, its gradient and both moments, writes all but the gradient
_EMA = Cost(3, 12, 1)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_training(compare, toy, case):
    batch, part = case
    batch = 2 if toy else batch
    candidates, inputs, facts = _PARTS[part](batch, toy)
    images = batch if part in ("step", "student", "teacher") else None
    compare(candidates, inputs, images=images, part=part, batch=batch, **facts)


def _student(batch: int, toy: bool):
    return _steps(batch, toy, update=False)


def _step(batch: int, toy: bool):
    return _steps(batch, toy, update=True)


def _steps(batch: int, toy: bool, update: bool):
    """Forward, DeiT's loss without a teacher, backward, and the update of all parameters if asked for."""
    model = models.create("B", 224, "train_amp", toy)
    model.set_distilled_training(False)
    config, criterion = _config(), create_criterion(_config(), None)
    size = model.patch_embed.img_size[0]

    def inputs():
        images = torch.randn(batch, 3, size, size, device=kernel_device())
        return images, torch.randn(batch, model.num_classes, device=kernel_device()).softmax(dim=1)

    def call(function, module):
        optimizer = _capturable(create_optimizer(config, module))

        def run(images, targets):
            optimizer.zero_grad(set_to_none=True)
            with models.autocast("train_amp"):
                loss = criterion(images, function(images), targets)
            loss.backward()
            if update:
                optimizer.step()
            return loss.detach()

        return run

    cost, floors = models.work(shape_of(model), batch, "train_amp")
    if update:
        adamw, student = _per_parameter(_ADAMW, model), floors
        cost += adamw

        def floors(ceilings):
            update_us = ceilings.floor_us(adamw, matrix=False)
            return tuple(floor + update_us for floor in student(ceilings))

    return models.candidates(model, call, toy), inputs, dict(cost=cost, matrix=True, floors=floors)


def _optimizer(batch: int, toy: bool):
    model = models.create("B", 224, "train_amp", toy)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    plain = torch.optim.AdamW(model.parameters(), foreach=True)
    found = {"fastdeit": create_optimizer(_config(), model), "AdamW, foreach": plain}
    steps = {name: _capturable(optimizer).step for name, optimizer in found.items()}
    return steps, tuple, dict(cost=_per_parameter(_ADAMW, model), matrix=False)


def _ema(batch: int, toy: bool):
    model = models.create("B", 224, "train_amp", toy)
    ema = create_ema(_config().replace(model_ema_decay=0.9999), model)
    single = ModelEmaV3(model, decay=0.9999, foreach=False)
    found = {"fastdeit": lambda: ema.update(model), "tensor by tensor": lambda: single.update(model)}
    return found, tuple, dict(cost=_per_parameter(_EMA, model), matrix=False)


def _loss(batch: int, toy: bool):
    """From both heads' logits, mixed targets and the teacher's logits to the logits' gradients."""
    from fastdeit.losses import DistillationCrossEntropy

    classes = 10 if toy else 1000
    fused = DistillationCrossEntropy("hard", 0.5)

    def eager(logits, dist_logits, target, teacher):
        base = torch.sum(-target * torch.log_softmax(logits, dim=-1), dim=-1).mean()
        return 0.5 * base + 0.5 * torch.nn.functional.cross_entropy(dist_logits, teacher.argmax(dim=1))

    def inputs():
        def randn():
            return torch.randn(batch, classes, device=kernel_device())

        return randn().bfloat16(), randn().bfloat16(), randn().softmax(dim=1), randn().bfloat16()

    def call(function):
        def run(logits, dist_logits, target, teacher):
            wrt = logits.requires_grad_(), dist_logits.requires_grad_()
            return torch.autograd.grad(function(*wrt, target, teacher), wrt)

        return run

    found = {"fastdeit": call(lambda a, b, target, teacher: fused((a, b), target, teacher)), "deit eager": call(eager)}
    if not toy:
        found["torch.compile"] = call(peers.compiled(eager))
    cost = costs.distillation_cross_entropy_forward(batch, classes, soft_target=True)
    cost += costs.distillation_cross_entropy_backward(batch, classes, soft_target=True)
    return found, inputs, dict(cost=cost, matrix=False)


def _teacher(batch: int, toy: bool):
    """The teacher's forward pass as a run makes it, and in other forms of the same network."""
    name, size = ("regnety_002", 32) if toy else (_config().teacher_model, 224)
    teacher = timm.create_model(name, pretrained=False).to(kernel_device()).eval().requires_grad_(False)
    last = timm.create_model(name, pretrained=False).to(kernel_device(), memory_format=torch.channels_last)
    last.load_state_dict(teacher.state_dict())
    last = last.eval().requires_grad_(False)

    def call(function):
        def run(images):
            with torch.no_grad(), models.autocast("train_amp"):
                return function(images)

        return run

    def inputs():
        return (torch.randn(batch, 3, size, size, device=kernel_device()),)

    found = {"fastdeit": call(teacher), "channels last": call(last)}
    if not toy:
        found["channels last, torch.compile"] = call(peers.compiled(last))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher(inputs()[0][:1])
    weights = sum(p.numel() for p in teacher.parameters())
    cost = Cost(counter.get_total_flops() * batch, 2 * weights + 4 * batch * 3 * size * size, 1)
    return found, inputs, dict(cost=cost, matrix=True)


_PARTS = dict(step=_step, student=_student, optimizer=_optimizer, loss=_loss, teacher=_teacher, ema=_ema)


def _config():
    return load_config("deit_base_distilled").replace(distillation_type="none")


def _capturable(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer whose step a CUDA graph may hold; it computes the same."""
    for group in optimizer.param_groups:
        group["capturable"] = kernel_device().type == "cuda"
    return optimizer


def _per_parameter(cost: Cost, model: torch.nn.Module) -> Cost:
    number = sum(p.numel() for p in model.parameters())
    return Cost(cost.flops * number, cost.bytes * number, cost.launches)
