"""Whole models: a forward pass, or forward, loss and backward, from images to logits or gradients of all parameters."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastdeit.benchmarks import models
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.benchmarks.model_peers import HfDeit
from fastdeit.cost_view import shape_of
from fastdeit.testing import assert_close_to_oracle, kernel_device

CASES = by_importance(list(models.NAMES), [224, 384], [256, 64, 1024, 1, 8], models.KINDS)
QUICK, TURNS = 2, 1
_CHECKED_IMAGES = 4


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
            loss = sum(F.cross_entropy(output.float(), labels) for output in outputs)
            return torch.autograd.grad(loss, parameters)

        return train if trains else inference

    _check(model, kind, *inputs(_CHECKED_IMAGES))
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
        images=batch,
        model=name,
        img_size=size,
        batch=batch,
        run=kind,
    )


def _check(model, kind: str, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Holds the accelerated model's logits to float64 beside timm's, without the randomness of training."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double())
        with models.autocast(kind):
            got, eager = models.accelerated(model)(images), model(images)
    assert_close_to_oracle("logits", got, exact, eager, exact.abs().max().item())
    model.train(was_training)
