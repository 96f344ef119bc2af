"""What people do with gradients: accumulate them, recompute activations for them, clip them, freeze parts of the model."""

import copy
import itertools

import pytest
import torch

import fastdeit
from fastdeit import testing


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_accumulated_gradients_are_those_of_the_whole_batch(settings, small, fused_device):
    timms = small(init_values=0.3).to(fused_device)
    x = settings.images(6, device=fused_device)
    accelerated, exact = fastdeit.accelerate(copy.deepcopy(timms)), copy.deepcopy(timms).double()
    for model in (timms, accelerated):
        for part in x.split(2):
            model(part).sum().backward()
    exact(x.double()).sum().backward()
    testing.assert_model_close_to_oracle(*map(gradients, (accelerated, exact, timms)))


def test_accumulating_adds_in_place_to_what_is_there(settings, small, fused_device):
    """Twice the same batch gives twice its gradients to the bit: none of them shares memory with another."""
    model = fastdeit.accelerate(small(init_values=0.3).to(fused_device))
    x = settings.images(device=fused_device)
    model(x).sum().backward()
    once, buffers = gradients(model), [p.grad.data_ptr() for p in model.parameters()]
    model(x).sum().backward()
    assert [p.grad.data_ptr() for p in model.parameters()] == buffers
    for name, twice in gradients(model).items():
        assert torch.equal(twice, 2 * once[name]), name


def test_gradients_share_no_memory(settings, small, fused_device):
    model = fastdeit.accelerate(small(init_values=0.3).to(fused_device))
    model(settings.images(device=fused_device)).sum().backward()
    spans = sorted((p.grad.data_ptr(), p.grad.data_ptr() + p.grad.nbytes) for p in model.parameters())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


FROZEN = {
    "the patch embedding, as MoCo v3 does": lambda name: name.startswith("patch_embed"),
    "all but the heads": lambda name: not name.startswith("head"),
    "all but the norms": lambda name: "norm" not in name,
    "all but the biases": lambda name: not name.endswith("bias"),
    "the first block": lambda name: name.startswith("blocks.0"),
    "all but attention": lambda name: "attn" not in name,
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(settings, small, fused_device, frozen):
    timms = small(init_values=0.3).to(fused_device)
    for name, parameter in timms.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    model = settings.assert_step_as_accurate_as_timms(timms, settings.images(device=fused_device))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) is FROZEN[frozen](name), name


def test_the_gradient_of_the_images(settings, small, fused_device):
    """As saliency maps and adversarial training take it."""
    timms = small().to(fused_device)
    x, results = settings.images(device=fused_device), []
    for model in (fastdeit.accelerate(copy.deepcopy(timms)), copy.deepcopy(timms).double(), timms):
        image = x.to(next(model.parameters()).dtype).requires_grad_()
        results.append({"images": torch.autograd.grad(model(image).square().sum(), image)[0]})
    testing.assert_model_close_to_oracle(*results)


def test_timms_checkpointing_replays_drop_path(settings, small, kernels_stood_in):
    """The gradients are the same bits with it as without it only if the second forward draws the masks of the first."""
    model = fastdeit.accelerate(small(depth=3, drop_path_rate=0.5, init_values=0.3)).train()
    model.blocks.register_forward_hook(lambda *_: None)  # block by block, as a checkpointed model runs
    results, calls = [], []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        kernels_stood_in.clear()
        results.append(settings.step(model, model, settings.images(16)))
        results[-1]["generator"] = torch.get_rng_state()
        calls.append(kernels_stood_in.total())
    plain, checkpointed = results
    assert calls[1] > calls[0] > 0  # fused in both forwards
    for name, expected in plain.items():
        assert torch.equal(checkpointed[name], expected), name
