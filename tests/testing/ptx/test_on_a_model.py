"""A block and a training step end to end on compiled kernels: with `--on ptx:sm_90`, as `make test-compiled` runs it."""

import copy

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.models.vision_transformer import Block

import fastdeit
from fastdeit import backends, testing
from fastdeit.losses import DistillationLoss

pytestmark = pytest.mark.skipif(
    not backends.on_gpu(torch.empty(0)) or torch.cuda.is_available(), reason="needs --on ptx:ARCH"
)


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def step(block, x, dtype):
    """Output and gradients of a block, under autocast but for float64."""
    x = x.to(dtype).requires_grad_()
    block = copy.deepcopy(block).to(dtype)
    with autocast(dtype == torch.float32):
        out = block(x)
    out.float().square().mean().backward() if dtype != torch.float64 else out.square().mean().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}


def test_a_block_under_autocast_is_as_accurate_as_timms():
    block = Block(128, 2, qkv_bias=True, init_values=0.1)
    x = torch.randn(2, 50, 128)
    oracle, eager = step(block, x, torch.float64), step(block, x, torch.float32)
    fused = torch.nn.Sequential(copy.deepcopy(block))
    fastdeit.accelerate(fused)
    assert type(fused[0]) is not Block
    testing.assert_model_close_to_oracle(step(fused[0], x, torch.float32), oracle, eager)


def training_step(model, images, labels, dtype):
    model = copy.deepcopy(model).to(dtype)
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)).to(dtype)
    with torch.no_grad():
        teacher[1].weight.copy_(torch.linspace(-1, 1, teacher[1].weight.numel()).view_as(teacher[1].weight))
    criterion = DistillationLoss(LabelSmoothingCrossEntropy(0.1), teacher, "hard", 0.5, 1.0)
    images = images.to(dtype)
    with autocast(dtype == torch.float32):
        outputs = model(images)
        loss = criterion(images, outputs, labels)
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def test_a_training_step_with_distillation_is_as_accurate_as_timms():
    sizes = dict(img_size=32, patch_size=8, embed_dim=64, num_heads=1, depth=2, num_classes=10)
    model = timm.create_model("deit_tiny_distilled_patch16_224", **sizes).train()
    model.set_distilled_training(True)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    oracle = training_step(model, images, labels, torch.float64)
    eager = training_step(model, images, labels, torch.float32)
    fused = copy.deepcopy(model)
    fastdeit.accelerate(fused)
    testing.assert_model_close_to_oracle(training_step(fused, images, labels, torch.float32), oracle, eager)
