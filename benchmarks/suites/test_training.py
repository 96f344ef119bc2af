"""DeiT-B's training step on images that are already there, whole and in its parts, with what fastdeit.train puts together.

`loop` is what a run does between two batches, host included. What a plain call of another part takes beyond its replay as a graph
is the host's.
"""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch.utils.flop_counter import FlopCounterMode

from fastdeit import ops
from fastdeit.benchmarks import models
from fastdeit.benchmarks.baselines import op_baselines as baselines
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.benchmarks.model_check import CHECKED_IMAGES, check, cross_entropy
from fastdeit.cost import formulas as costs
from fastdeit.cost.formulas import Cost
from fastdeit.cost.view import shape_of
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device
from fastdeit.train.augmentation import BatchAugmentation
from fastdeit.train.config import load_config
from fastdeit.train.device import reproducible
from fastdeit.train.engine import Trainer, create_criterion
from fastdeit.train.models import quickened
from fastdeit.train.optimization import create_ema, create_optimizer

WITH_IMAGES = ("step", "student", "loop", "distilled", "teacher", "augmentation")
QUICK, TURNS = 1, 1
_ADAMW = Cost(12, 28, 1)  # a parameter: reads it, its gradient and both moments, writes all but the gradient
_EMA = Cost(3, 12, 1)


def _student(batch: int, toy: bool):
    return _steps(batch, toy, update=False)


def _step(batch: int, toy: bool):
    return _steps(batch, toy, update=True)


def _distilled(batch: int, toy: bool):
    """The step with the teacher in it, compiled for all candidates alike."""
    return _steps(batch, toy, update=True, distils=True)


def _steps(batch: int, toy: bool, update: bool, distils: bool = False):
    """Forward, DeiT's loss, backward, and the update of all parameters if asked for."""
    model = models.create("B", 224, "train_amp", toy)
    model.set_distilled_training(distils)
    size = model.patch_embed.img_size[0]
    config = _config(distils)
    teacher = _create_teacher(toy) if distils else None
    criterion = create_criterion(config, None if teacher is None else quickened(teacher, kernel_device()))

    def inputs(number=batch):
        images = torch.randn(number, 3, size, size, device=kernel_device())
        return images, torch.randn(number, model.num_classes, device=kernel_device()).softmax(dim=1)

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

    images, targets = inputs(min(batch, CHECKED_IMAGES))
    errors = check(model, "train_amp", images, cross_entropy(targets.argmax(dim=1)))
    found = models.candidates(model, call, toy)
    besides = Cost(0, 0, 0)
    if update:
        besides += _per_parameter(_ADAMW, model)
    cost, floors = _student_work(model, batch, besides)
    if teacher is not None:
        of_teacher = _teacher_cost(teacher, batch, size)
        cost += of_teacher
        floors = _later(floors, of_teacher, matrix=True)
    return found, inputs, dict(cost=cost, matrix=True, floors=floors, errors=errors)


def _loop(batch: int, toy: bool):
    """A run's whole step without a teacher: seeds, augmentation, verdict, moving average and bookkeeping as well."""
    model = models.create("B", 224, "train_amp", toy)
    model.set_distilled_training(False)
    size, classes = model.patch_embed.img_size[0], model.num_classes

    def call(function, module, captured=False):
        config = _config().replace(
            img_size=size, batch_size=batch, workers=0, repeated_aug=1, cuda_graphs=captured, model_ema_decay=0.9999
        )
        trainer = Trainer(config, module, None, range(batch), classes)
        trainer.net = function

        def run(images, targets):
            trainer.step = 0
            with reproducible(config):
                trainer._train_step(0, images, targets)
            if captured and not toy and trainer.whole_step.reason is not None:
                raise RuntimeError(trainer.whole_step.outcome)

        run.host = "the run's graph, and the host" if captured else "kernel by kernel, and the host"
        return run

    def inputs():
        pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=kernel_device())
        return pixels, torch.randint(0, classes, (batch,), device=kernel_device())

    images = torch.randn(min(batch, CHECKED_IMAGES), 3, size, size, device=kernel_device())
    labels = torch.randint(0, classes, (len(images),), device=kernel_device())
    errors = check(model, "train_amp", images, cross_entropy(labels))
    found = models.candidates(model, call, toy)
    found["fastdeit, cuda_graphs"] = call(models.accelerated(model), model, captured=True)
    cost, floors = _student_work(model, batch, _per_parameter(_ADAMW, model) + _per_parameter(_EMA, model))
    return found, inputs, dict(cost=cost, matrix=True, floors=floors, errors=errors)


def _augmentation(batch: int, toy: bool):
    """From uint8 pixels and classes to what model and loss take."""
    size, classes = (32, 10) if toy else (224, 1000)
    config = _config()
    found = {"fastdeit": config, "without erasing": config.replace(reprob=0.0)}

    def call(config):
        augment = BatchAugmentation(config, classes, kernel_device())
        return lambda images, targets: augment(images, targets, 0)

    def inputs():
        pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=kernel_device())
        return pixels, torch.randint(0, classes, (batch,), device=kernel_device())

    pixels = batch * 3 * size * size
    cost = Cost(2 * pixels, 5 * pixels, 1)  # each is read as a byte and written as a float
    return {name: call(config) for name, config in found.items()}, inputs, dict(cost=cost, matrix=False)


def _student_work(model: torch.nn.Module, batch: int, besides: Cost):
    """Forward, backward and what comes after them: its least, and a function from ceilings to floors."""
    cost, floors = models.work(shape_of(model), batch, "train_amp")
    return cost + besides, _later(floors, besides, matrix=False)


def _later(floors: Callable, cost: Cost, matrix: bool) -> Callable:
    """Floors with work after theirs."""

    def later(ceilings):
        return tuple(floor + ceilings.floor_us(cost, matrix=matrix) for floor in floors(ceilings))

    return later


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

    def ours(logits, dist_logits, target, teacher):
        return fused((logits, dist_logits), target, teacher)

    few = (argument[:64] for argument in inputs())
    assert_as_accurate_as_eager(ours, ops.distillation_cross_entropy_reference, *few, frozen=(2, 3), backend="auto")
    found = {"fastdeit": call(ours), "deit eager": call(eager)}
    if not toy:
        found["torch.compile"] = call(baselines.compiled(eager))
    cost = costs.distillation_cross_entropy_forward(batch, classes, soft_target=True)
    cost += costs.distillation_cross_entropy_backward(batch, classes, soft_target=True)
    return found, inputs, dict(cost=cost, matrix=False)


def _teacher(batch: int, toy: bool):
    """The teacher's forward pass as a run makes it, and in other forms of the same network."""
    size = 32 if toy else 224
    eager = _create_teacher(toy)
    last = copy.deepcopy(eager).to(memory_format=torch.channels_last)
    cost = _teacher_cost(eager, batch, size)

    def call(function):
        def run(images):
            with torch.no_grad(), models.autocast("train_amp"):
                return function(images)

        return run

    def inputs():
        return (torch.randn(batch, 3, size, size, device=kernel_device()),)

    ours = quickened(copy.deepcopy(eager), kernel_device())
    found = {"fastdeit": call(ours), "timm eager": call(eager), "channels last": call(last)}
    if not toy:
        found["channels last, torch.compile"] = call(baselines.compiled(last))
    return found, inputs, dict(cost=cost, matrix=True)


def _create_teacher(toy: bool) -> torch.nn.Module:
    name = "regnety_002" if toy else _config(distils=True).teacher_model
    model = timm.create_model(name, pretrained=False, num_classes=10 if toy else 1000)
    return model.to(kernel_device()).eval().requires_grad_(False)


def _teacher_cost(teacher: torch.nn.Module, batch: int, size: int) -> Cost:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher(torch.zeros(1, 3, size, size, device=kernel_device()))
    weights = sum(p.numel() for p in teacher.parameters())
    return Cost(counter.get_total_flops() * batch, 2 * weights + 4 * batch * 3 * size * size, 1)


_PARTS = dict(
    step=_step,
    student=_student,
    loop=_loop,
    distilled=_distilled,
    teacher=_teacher,
    optimizer=_optimizer,
    ema=_ema,
    augmentation=_augmentation,
    loss=_loss,
)
PARTS = list(_PARTS)  # the most telling first


@pytest.mark.parametrize("case", by_importance([256, 64], PARTS), ids=label)
def test_training(compare, toy, case):
    batch, part = case
    batch = 2 if toy else batch
    candidates, inputs, facts = _PARTS[part](batch, toy)
    images = batch if part in WITH_IMAGES else None
    compare(candidates, inputs, images=images, part=part, batch=batch, **facts)


def _config(distils: bool = False):
    config = load_config("deit_base_distilled")
    return config if distils else config.replace(distillation_type="none")


def _capturable(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer whose step a CUDA graph may hold; it computes the same."""
    for group in optimizer.param_groups:
        group["capturable"] = kernel_device().type == "cuda"
    return optimizer


def _per_parameter(cost: Cost, model: torch.nn.Module) -> Cost:
    number = sum(p.numel() for p in model.parameters())
    return Cost(cost.flops * number, cost.bytes * number, cost.launches)
