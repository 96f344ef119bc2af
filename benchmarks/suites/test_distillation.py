"""The hard-distillation loss of both heads, forward and backward, from mixed soft targets and the teacher's logits."""

import pytest
import torch
import torch.nn.functional as F

from fastdeit import ops
from fastdeit.benchmarks.baselines import op_baselines as baselines
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.cost import formulas as costs
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device


def deit(logits, dist_logits, target, teacher):
    """facebookresearch/deit's formula on PyTorch's own operations."""
    base = torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()
    return 0.5 * base + 0.5 * F.cross_entropy(dist_logits, teacher.argmax(dim=1))


def liger(logits, dist_logits, target, teacher):
    cross_entropy = baselines.imported("liger_kernel.transformers.functional", "liger_cross_entropy")
    return 0.5 * cross_entropy(logits, target.argmax(dim=1)) + 0.5 * cross_entropy(dist_logits, teacher.argmax(dim=1))


def timm_task(logits, dist_logits, target, teacher):
    """What timm's token distillation task takes, with deit's weights."""
    criterion = baselines.imported("timm.loss", "SoftTargetCrossEntropy")()
    return 0.5 * criterion(logits, target) + 0.5 * F.cross_entropy(dist_logits, teacher.argmax(dim=1))


CASES = by_importance([1000, 21841, 10], [256, 1024, 64, 4096], ["both", "forward"])
QUICK, TURNS = 1, 2
LIGER = "Liger, labels alone"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_distillation_cross_entropy(compare, toy, case):
    classes, batch, direction = case
    batch, classes = (3, min(classes, 50)) if toy else (batch, classes)
    dtype = torch.float32 if toy else torch.bfloat16

    def inputs(size=batch):
        def randn():
            return torch.randn(size, classes, device=kernel_device())

        return randn().to(dtype), randn().to(dtype), randn().softmax(dim=1), randn().to(dtype)

    def loss(function):
        def forward(*arguments):
            with torch.no_grad():
                return (function(*arguments),)

        def both(logits, dist_logits, target, teacher):
            wrt = logits.requires_grad_(), dist_logits.requires_grad_()
            value = function(*wrt, target, teacher)
            return value.detach(), *torch.autograd.grad(value, wrt)

        return forward if direction == "forward" else both

    def expected(*arguments):
        return [result.detach() for result in loss(deit)(*(a.detach().double() for a in arguments))]

    op = ops.distillation_cross_entropy
    assert_as_accurate_as_eager(
        op, ops.distillation_cross_entropy_reference, *inputs(min(batch, 64)), frozen=(2, 3), backend="auto"
    )
    candidates = {"fastdeit": op, "deit eager": deit, "timm's task": timm_task}
    if not toy:
        candidates |= {"torch.compile": baselines.compiled(deit), LIGER: liger}
    sizes = dict(soft_target=True, logits_bytes=dtype.itemsize, target_bytes=4, teacher_bytes=dtype.itemsize)
    forward = costs.distillation_cross_entropy_forward(batch, classes, **sizes)
    backward = costs.distillation_cross_entropy_backward(batch, classes, **sizes)
    compare(
        {name: loss(function) for name, function in candidates.items()},
        inputs,
        expected=expected,
        different=(LIGER,),
        cost=forward if direction == "forward" else forward + backward,
        matrix=False,
        direction=direction,
        batch=batch,
        classes=classes,
        dtype=str(dtype),
    )
