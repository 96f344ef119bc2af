"""Every precision that people train and run in: outputs, all gradients and dtypes, against float64 and beside timm's own."""

import pytest
import torch
from torch.amp import GradScaler

import fastdeit

LOW = [torch.bfloat16, torch.float16]


def under_autocast(dtype):
    def forward(model):
        def call(x):
            with torch.autocast(x.device.type, dtype):
                return model(x)

        return call

    return forward


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}])
def test_autocast(settings, small, fused_device, dtype, options):
    timms = small(**options).to(fused_device).train()
    timms.set_distilled_training(True)
    x = settings.images(device=fused_device)
    model = settings.assert_step_as_accurate_as_timms(timms, x, forward=under_autocast(dtype))
    with torch.autocast(fused_device.type, dtype):
        assert not settings.why_not_fused(model)


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_a_model_in_one_dtype(settings, small, fused_device, dtype):
    timms = small(init_values=0.3).to(fused_device, dtype).train()
    timms.set_distilled_training(True)
    x = settings.images(device=fused_device, dtype=dtype)
    model = settings.assert_step_as_accurate_as_timms(timms, x)
    if dtype in LOW or fused_device.type == "cpu":
        assert not settings.why_not_fused(model)


def scaled_steps(model, x, steps=2):
    """Steps of SGD under float16 autocast from a scale that overflows: the scale after each, and whether the weights moved."""
    scaler = GradScaler(x.device.type, init_scale=2.0**24, backoff_factor=2.0**-8)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scales, moved = [], []
    for _ in range(steps):
        before = model.blocks[0].mlp.fc1.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.float16):
            out = model(x)
        scaler.scale(out.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(model.blocks[0].mlp.fc1.weight, before))
    return scales, moved


def test_a_grad_scaler_skips_the_step_that_overflows_and_takes_the_next(settings, small, fused_device):
    x = settings.images(device=fused_device)
    expected = [2.0**16] * 2, [False, True]
    for model in (small(), fastdeit.accelerate(small())):
        assert scaled_steps(model.to(fused_device), x) == expected
