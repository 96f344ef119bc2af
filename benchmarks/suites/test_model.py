"""Whole models: a forward pass, or forward, loss and backward, from images to logits or gradients of all parameters."""

import copy

import pytest
import torch

from fastdeit.benchmarks import models
from fastdeit.benchmarks.baselines.model_baselines import HfDeit
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.benchmarks.model_check import CHECKED_IMAGES, check, cross_entropy
from fastdeit.cost.view import shape_of
from fastdeit.testing import kernel_device

CASES = by_importance(list(models.NAMES), [224, 384], [256, 64, 1024, 1, 8], models.KINDS)
QUICK, TURNS = 2, 1


@pytest.mark.parametrize("case", CASES, ids=label)
def test_model(compare, toy, case):
    name, img_size, batch, kind = case
    batch = min(batch, 2) if toy else batch
    model = models.create(name, img_size, kind, toy)
    size, trains = model.patch_embed.img_size[0], kind.startswith("train")
    device, dtype = kernel_device(), models.input_dtype(kind)

    def inputs(images=batch):
        labels = torch.randint(model.num_classes, (images,), device=device)
        return torch.randn(images, 3, size, size, device=device, dtype=dtype), labels

    def call(function, module):
        parameters = list(module.parameters())

        def inference(images, labels):
            with torch.no_grad(), models.autocast(kind):
                return models.logits(function(images))

        def train(images, labels):
            with models.autocast(kind):
                outputs = models.logits(function(images))
            return torch.autograd.grad(cross_entropy(labels)(outputs), parameters)

        return train if trains else inference

    images, labels = inputs(min(batch, CHECKED_IMAGES))
    errors = check(model, kind, images, cross_entropy(labels) if trains else None)
    exact = None if trains else copy.deepcopy(model).double()

    def expected(images, labels):
        with torch.no_grad():
            return models.logits(exact(images[:2].double()))

    cost, floors = models.work(shape_of(model), batch, kind)
    candidates = models.candidates(model, call, toy)
    if not (trains or toy) and hasattr(model, "head_dist"):  # theirs cannot train with two heads
        candidates["Hugging Face's DeiT"] = call(HfDeit(model), model)
    compare(
        candidates,
        inputs,
        cost=cost,
        matrix=True,
        floors=floors,
        expected=None if trains else expected,
        errors=errors if trains else None,
        images=batch,
        model=name,
        img_size=size,
        batch=batch,
        run=kind,
    )
