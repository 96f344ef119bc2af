"""Weights and activations at the end of float16's range: what float32 attention survives, float16 training survives."""

import copy

import pytest
import torch

import fastdeit

LIMIT = torch.finfo(torch.float16).max


def logits(attention, tokens):
    """The largest q.k, not yet scaled, of an attention module on its input."""
    q, k, _ = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.mT).abs().max()


def with_large_logits(model, x, size):
    """Scales queries and keys so that the largest scaled logit of each block is +-size, whatever comes before it."""
    exact = copy.deepcopy(model).double()
    for attention, twin in zip(
        (block.attn for block in model.blocks), (block.attn for block in exact.blocks), strict=True
    ):
        seen = []
        handle = twin.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            exact(x.double())
            factor = (size / (logits(twin, seen[0]) * twin.scale)).sqrt()
            for module in (attention, twin):
                for parameter in module.qkv.parameters():
                    parameter[: 2 * module.attn_dim] *= factor
        handle.remove()
    return model


def with_large_stream(model, x, size):
    """Positions of +-size: the residual stream's squares, and so its variance, are far over what float16 holds."""
    with torch.no_grad():
        model.pos_embed.copy_(size * torch.sign(model.pos_embed))
    return model


def with_large_hidden(model, x, size):
    """Hidden units of about +-size in each Mlp, which the second layer brings down again."""
    for block in model.blocks:
        with torch.no_grad():
            block.mlp.fc1.bias.copy_(size * torch.sign(block.mlp.fc1.bias))
            block.mlp.fc2.weight.mul_(2**-10)
    return model


# The second one's unscaled products overflow float16. Its logits have a unit in the last place of 0.002 in float32 too, so that any
# backward that computes exp(logit - lse) errs by more than float16's rounding: it is to be finite, no more.
FINITE_ONLY = "logits of 3e4"
ADVERSARIES = {
    "logits of 1e4": (with_large_logits, 1e4),
    FINITE_ONLY: (with_large_logits, 3e4),
    "a residual stream of 3e4": (with_large_stream, 3e4),
    "hidden units of 6e4": (with_large_hidden, 6e4),
}


@pytest.fixture(params=ADVERSARIES)
def adversary(request, settings, small, fused_device):
    make, size = ADVERSARIES[request.param]
    x = settings.images(device=fused_device)
    return request.param, make(small(init_values=0.3, seed=1).to(fused_device), x, size), x


def autocast(model):
    def forward(x):
        with torch.autocast(x.device.type, torch.float16):
            return model(x)

    return forward


def assert_finite(step):
    for name, tensor in step.items():
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("whole_model", [False, True], ids=["autocast", "model.half()"])
def test_float16_stays_finite_and_as_accurate_as_timms(settings, adversary, whole_model):
    name, timms, x = adversary
    if whole_model:
        timms, x = timms.half(), x.half()
    exact = settings.step(timms.float(), timms, x.float())
    assert_finite(exact)
    assert all(tensor.abs().max() < LIMIT for tensor in exact.values())
    timms.to(x.dtype)
    forward = (lambda model: model) if whole_model else autocast
    if name == FINITE_ONLY:
        model = fastdeit.accelerate(timms)
        assert_finite(settings.step(model, forward(model), x))
    else:
        model = settings.assert_step_as_accurate_as_timms(timms, x, forward=forward)
        assert_finite({parameter_name: p.grad for parameter_name, p in model.named_parameters()})


def test_products_in_float16_would_not_survive(settings, small):
    """What the products of the second adversary are to attention that rounds q.k: infinite."""
    x = settings.images()
    model = with_large_logits(small(), x, 3e4)
    seen = []
    model.blocks[0].attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        assert logits(model.blocks[0].attn, seen[0]).half().isinf()


def test_training_goes_on_where_the_logits_are_large(settings, small, fused_device):
    """Steps under autocast with a GradScaler: none is skipped, none gives NaN."""
    x = settings.images(device=fused_device)
    model = fastdeit.accelerate(with_large_logits(small().to(fused_device), x, 1e4))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    scaler = torch.amp.GradScaler(x.device.type, init_scale=2.0**8)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(autocast(model)(x).float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**8
    assert all(torch.isfinite(p).all() for p in model.parameters())
