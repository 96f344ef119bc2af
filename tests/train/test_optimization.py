"""Optimizer groups and learning rates, against values worked out by hand."""

import math

import pytest
import timm
import torch

from fastdeit.train.config import Config
from fastdeit.train.optimization import Schedule, create_ema, create_optimizer, parameter_groups


@pytest.fixture(scope="module")
def model():
    return timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=1, depth=1, num_classes=3
    )


def test_matrices_decay_and_nothing_else_does(model):
    """Biases, norms, tokens and positions do not; the split is complete."""
    none, decayed = parameter_groups(model, create_optimizer(Config(), model))
    assert (none.weight_decay, decayed.weight_decay) == (0.0, 0.05)
    assert set(decayed.names) == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
        "head_dist.weight",
    }
    assert set(none.names) | set(decayed.names) == {name for name, _ in model.named_parameters()}
    assert {"cls_token", "dist_token", "pos_embed", "blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"} <= set(
        none.names
    )
    assert none.parameters + decayed.parameters == sum(p.numel() for p in model.parameters())


def test_the_optimizer_is_the_recipes(model):
    optimizer = create_optimizer(Config(batch_size=1024), model)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]


def test_sgd_takes_momentum_instead_of_betas(model):
    optimizer = create_optimizer(Config(opt="sgd"), model)
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9


def test_an_unknown_optimizer_is_named(model):
    with pytest.raises(ValueError, match="opt: timm cannot make 'nothing'"):
        create_optimizer(Config(opt="nothing"), model)


# Batch 1024, so peak 1e-3; 10 epochs of 4 updates, 2 of warm-up from 1e-6, down to 1e-5.
# Warm-up: 1e-6 + t/T (1e-3 - 1e-6). Then 1e-5 + 0.5 (1e-3 - 1e-5) (1 + cos(pi t/T)), t counted from the start of training.
BY_EPOCH = {
    0: 1e-6,
    1: 5.005e-4,
    2: 9.0545e-4,  # cos 36 deg = 0.809017: 1e-5 + 4.95e-4 * 1.809017 = 9.054634e-4
    5: 5.05e-4,  # cos 90 deg = 0
    9: 3.4227e-5,  # cos 162 deg = -0.951057: 1e-5 + 4.95e-4 * 0.048943
}
BY_UPDATE = {
    0: 1e-6,
    1: 1.25875e-4,  # an eighth of the warm-up
    7: 8.75125e-4,  # seven eighths
    8: 9.054634e-4,
    20: 5.05e-4,
    39: 1.1526e-5,  # cos 175.5 deg = -0.996917: 1e-5 + 4.95e-4 * 0.003083
}


def schedule(model, **changes):
    config = Config(batch_size=1024, epochs=10, warmup_epochs=2, **changes)
    optimizer = create_optimizer(config, model)
    return Schedule(config, optimizer, updates_per_epoch=4), optimizer


def test_learning_rates_by_epoch(model):
    rates, optimizer = schedule(model)
    for epoch, expected in BY_EPOCH.items():
        for update in range(4):
            rates.set(4 * epoch + update)
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 2, rel=1e-4)


def test_learning_rates_by_update(model):
    rates, _ = schedule(model, sched_on_updates=True)
    for update, expected in BY_UPDATE.items():
        assert rates.set(update) == pytest.approx(expected, rel=1e-4)


def test_the_learning_rate_depends_on_the_step_alone(model):
    forwards, _ = schedule(model, sched_on_updates=True)
    jumping, _ = schedule(model, sched_on_updates=True)
    in_order = [forwards.set(step) for step in range(40)]
    assert [jumping.set(step) for step in reversed(range(40))] == in_order[::-1]


def test_the_moving_average_is_off_at_zero(model):
    assert create_ema(Config(model_ema_decay=0.0), model) is None


def test_the_moving_average_moves_by_its_decay():
    linear = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(linear.weight)
    ema = create_ema(Config(model_ema_decay=0.9), linear)
    torch.nn.init.ones_(linear.weight)
    for step in (2, 3):  # at step 1 timm's average is a copy
        ema.update(linear, step=step)
    assert math.isclose(ema.module.weight.item(), 1 - 0.9**2, rel_tol=1e-6)
