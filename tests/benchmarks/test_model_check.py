"""The check before a model or block is timed: fastdeit's kernels pass it, what is wrong does not."""

import copy

import pytest
import torch
from timm.layers import DropPath

from fastdeit import backends
from fastdeit.benchmarks import model_check, models
from fastdeit.benchmarks.model_check import check, cross_entropy
from fastdeit.testing import kernel_device


def model_and_images(kind="train_amp", name="B"):
    """A tiny one, as a suite makes it, and what the check takes with it."""
    model = models.create(name, 224, kind, toy=True)
    x = torch.randn(2, 3, 32, 32).to(kernel_device(), models.input_dtype(kind))
    labels = torch.tensor([3, 7], device=kernel_device())
    return model, kind, x, cross_entropy(labels) if kind.startswith("train") else None


@pytest.mark.parametrize(
    ("kind", "name"),
    [("train_amp", "B"), ("train_fp16", "deit3-B"), ("train_bf16", "B"), ("inference_bf16", "deit3-B")],
)
def test_the_kernels_pass(kind, name):
    with backends.use_backend("triton"):
        errors = check(*model_and_images(kind, name))
    for rows in zip(*errors.values(), strict=True):  # maxima, then root mean squares: of results, and of gradients
        assert all(len(row) == 1 + kind.startswith("train") and all(error > 0 for error in row) for row in rows)


def test_a_block_s_kernels_pass_with_the_gradient_of_its_input():
    model, kind, *_ = model_and_images()
    x = torch.randn(2, 6, 64, device=kernel_device())
    with backends.use_backend("triton"):
        check(model.blocks[0], kind, x, lambda outputs: outputs[0].square().sum(), input_gradient=True)


@pytest.fixture
def wrong(monkeypatch):
    """wrong(change): what is taken for the accelerated copy is timm's model after change(copy)."""

    def replace(change):
        def copied(module):
            module = copy.deepcopy(module)
            change(module)
            return module

        monkeypatch.setattr(models, "accelerated", copied)

    return replace


def test_one_parameters_gradient_that_is_off_is_found(wrong):
    wrong(lambda model: model.blocks[1].mlp.fc1.bias.register_hook(lambda gradient: 1.1 * gradient))
    with pytest.raises(AssertionError, match="the model's gradients: maximum"):
        check(*model_and_images())


def test_logits_that_are_off_are_found(wrong):
    wrong(lambda model: model.norm.weight.data.mul_(1.1))
    with pytest.raises(AssertionError, match="the model's results: "):
        check(*model_and_images("inference_amp"))


def test_drop_path_draws_the_same_in_every_dtype():
    """Else timm's own distance from float64, and with it the limit, would be that between different masks."""
    bernoulli, drawn = torch.Tensor.bernoulli_, []
    for dtype in (torch.bfloat16, torch.float64):
        with model_check._fixed_masks():
            x = torch.ones(64, 2, dtype=dtype, device=kernel_device())
            drawn.append([DropPath(0.5).train()(x) for _ in range(2)])
    for low, exact in zip(*drawn, strict=True):
        assert torch.equal(low.double(), exact) and set(exact.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(*drawn[0]) and torch.Tensor.bernoulli_ is bernoulli


def test_what_does_not_fit_is_checked_on_half_of_it(monkeypatch):
    double, sizes = torch.Tensor.double, []

    def limited(x):
        if x.shape[1:] == (3, 32, 32):
            sizes.append(len(x))
            if len(x) > 1:
                raise torch.OutOfMemoryError("out of memory")
        return double(x)

    monkeypatch.setattr(torch.Tensor, "double", limited)
    check(*model_and_images())
    assert sizes == [2, 1]
