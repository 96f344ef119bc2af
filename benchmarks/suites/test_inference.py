"""Frozen models: from images to logits in bf16, FP8 and INT8, beside what else a vision transformer is deployed with."""

import copy

import pytest
import torch

from fastdeit.benchmarks import frozen_models, models
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.benchmarks.model_check import CHECKED_IMAGES
from fastdeit.cost.view import shape_of
from fastdeit.testing import kernel_device

CASES = by_importance(["B", "S", "Ti"], [256, 1, 8, 64, 1024], ["fp8", "bf16", "int8"])
QUICK, TURNS = 3, 1


@pytest.mark.parametrize("case", CASES, ids=label)
def test_inference(compare, toy, case):
    name, batch, precision = case
    batch = min(batch, 2) if toy else batch
    model = models.create(name, 224, "inference_bf16", toy)
    size, device = model.patch_embed.img_size[0], kernel_device()

    def inputs(images=batch):
        return (torch.randn(images, 3, size, size, device=device, dtype=torch.bfloat16),)

    fast = frozen_models.optimized(model, precision)
    frozen_models.check(model, fast, *inputs(min(batch, CHECKED_IMAGES)))
    exact = copy.deepcopy(model).double()

    def without_gradients(function):
        def run(images):
            with torch.no_grad():
                return function(images)

        if hasattr(function, "host"):
            run.host = function.host
        return run

    cost, floors = frozen_models.work(shape_of(model), batch, precision)
    candidates = frozen_models.candidates(model, fast, toy)
    compare(
        {name: without_gradients(function) for name, function in candidates.items()},
        inputs,
        cost=cost,
        matrix=True,
        floors=floors,
        expected=without_gradients(lambda images: (exact(images[:CHECKED_IMAGES].double()),)),
        agreement=True,
        images=batch,
        model=name,
        batch=batch,
        precision=precision,
    )
