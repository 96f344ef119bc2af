"""One block, forward or forward and backward. Each set of inputs has a block of its own, as each layer of a model has."""

import copy

import pytest
import torch

from fastdeit.benchmarks import models
from fastdeit.benchmarks.baselines.op_baselines import autotuned, compiled
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.benchmarks.model_check import CHECKED_IMAGES, check
from fastdeit.cost.view import shape_of
from fastdeit.testing import kernel_device

CASES = by_importance(list(models.NAMES), [224, 384], [256, 64, 1024, 1], models.KINDS)
QUICK, TURNS = 1, 2


@pytest.mark.parametrize("case", CASES, ids=label)
def test_block(compare, toy, case):
    name, img_size, batch, kind = case
    batch = min(batch, 2) if toy else batch
    model = models.create(name, img_size, kind, toy)
    shape, trains = shape_of(model), kind.startswith("train")
    device, dtype = kernel_device(), models.input_dtype(kind)
    source = model.blocks[-1]
    ours: dict[int, torch.nn.Module] = {}

    def inputs(images=batch):
        block = type(source)(shape.channels, shape.heads, qkv_bias=True, init_values=_init_values(source))
        block = block.to(device, dtype).train(trains)
        ours[id(block)] = models.accelerated(block)
        size = (images, shape.tokens, shape.channels)
        return torch.randn(size, device=device, dtype=dtype), block, torch.randn(size, device=device, dtype=dtype)

    def call(function):
        def inference(x, block, upstream):
            with torch.no_grad(), models.autocast(kind):
                return (function(block, x),)

        def train(x, block, upstream):
            x.requires_grad_()
            with models.autocast(kind):
                output = function(block, x)
            return output.detach(), *torch.autograd.grad(output, (x, *block.parameters()), upstream)

        return train if trains else inference

    def eager(block, x):
        return block(x)

    def expected(x, block, upstream):
        return [_exact(block, x[:2]).detach(), *[None] * (1 + len(list(block.parameters())) if trains else 0)]

    x, block, upstream = inputs(min(batch, CHECKED_IMAGES))

    def loss(outputs):
        return (outputs[0] * upstream[: len(outputs[0])].to(outputs[0])).sum()

    check(block, kind, x, loss if trains else None, input_gradient=trains)
    ours.clear()
    candidates = {"fastdeit": call(lambda block, x: ours[id(block)](x)), "timm eager": call(eager)}
    if not toy:
        candidates["timm + torch.compile"] = call(compiled(eager))
        candidates["timm + torch.compile max-autotune"] = call(autotuned(eager))
    cost, floors = models.work(shape, batch, kind, block=True)
    compare(
        candidates,
        inputs,
        cost=cost,
        matrix=True,
        floors=floors,
        expected=expected,
        images=batch,
        model=name,
        tokens=shape.tokens,
        batch=batch,
        run=kind,
    )


def _exact(block, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(block).double()(x.double())


def _init_values(block) -> float | None:
    """LayerScale's initial value, if the block has one."""
    gamma = getattr(block.ls1, "gamma", None)
    return None if gamma is None else 1e-4
