"""What timm's models can be asked for: shapes that change, tokens dropped or added, features, copies and groups of parameters."""

import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3

import fastdeit

NO_DISTILLATION = "deit_tiny_patch16_224"
OPTIONS = {
    "registers": dict(name=NO_DISTILLATION, reg_tokens=3),
    "registers without positions": dict(name=NO_DISTILLATION, reg_tokens=3, no_embed_class=True),
    "patch dropout": dict(patch_drop_rate=0.5, img_size=64),
    "dynamic image size": dict(dynamic_img_size=True),
    "dynamic image size, padded": dict(dynamic_img_size=True, dynamic_img_pad=True),
    "drop path and LayerScale": dict(drop_path_rate=0.5, init_values=0.3),
    "norm before the blocks": dict(name=NO_DISTILLATION, pre_norm=True),
    "average pooling": dict(name=NO_DISTILLATION, global_pool="avg"),
    "average of tokens and patches": dict(name=NO_DISTILLATION, global_pool="avgmax"),
    "no class token": dict(name=NO_DISTILLATION, class_token=False, global_pool="avg"),
    "no head": dict(num_classes=0),
}


def same_step(settings, timms, x, **tolerance):
    """One step of a copy that is accelerated, against timm's in float64: the same but for the order of sums."""
    timms = timms.double()
    accelerated = fastdeit.accelerate(copy.deepcopy(timms))
    results = [settings.step(model, model, x.double()) for model in (accelerated, timms)]
    for name, expected in results[1].items():
        # float64 throughout but for drop path's factor, which is float32
        torch.testing.assert_close(results[0][name], expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    return accelerated


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_gives_timms_numbers_in_training(settings, small, kernels_stood_in, option):
    """With timm's random numbers where the option draws any: masks, dropped patches."""
    options = OPTIONS[option]
    same_step(settings, small(**options).train(), settings.images(4, options.get("img_size", 32)))
    assert kernels_stood_in


@pytest.mark.parametrize("side", [32, 48, 64])
@pytest.mark.parametrize("name", [NO_DISTILLATION, "deit_tiny_distilled_patch16_224"])
def test_any_image_size_with_resampled_positions(settings, small, kernels_stood_in, side, name):
    same_step(settings, small(name=name, dynamic_img_size=True), settings.images(2, side))


def test_another_input_size_set_afterwards(settings, small, kernels_stood_in):
    """Fine-tuning at a higher resolution: positions are resampled in an accelerated model as in timm's."""
    timms = small()
    model = fastdeit.accelerate(copy.deepcopy(timms))
    for m in (model, timms):
        m.set_input_size(img_size=48)
    assert torch.equal(model.pos_embed, timms.pos_embed)
    same_step(settings, model, settings.images(2, 48))


def test_a_new_head_and_distilled_training_switched_on_and_off(settings, small, kernels_stood_in):
    model = fastdeit.accelerate(small()).train()
    model.reset_classifier(9)
    x = settings.images()
    assert model(x).shape == (3, 9)
    for enabled, training, pair in ((True, True, True), (True, False, False), (False, True, False)):
        model.train(training).set_distilled_training(enabled)
        got, expected = model(x), fastdeit.restore(copy.deepcopy(model))(x)
        assert isinstance(got, tuple) is isinstance(expected, tuple) is pair
        torch.testing.assert_close(got, expected)


FEATURES = {
    "forward_features": lambda m, x: m.forward_features(x),
    "forward_head of features": lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
    "forward_intermediates": lambda m, x: m.forward_intermediates(x, norm=True, return_prefix_tokens=True),
    "intermediates only": lambda m, x: m.forward_intermediates(x, indices=[0, 2], intermediates_only=True),
    "intermediates, stopped early": lambda m, x: m.forward_intermediates(x, indices=1, stop_early=True),
    "get_intermediate_layers": lambda m, x: m.get_intermediate_layers(x, n=2, reshape=True, norm=True),
    "with an attention mask": lambda m, x: m(x, attn_mask=torch.ones(6, 6, dtype=torch.bool).tril()),
    "logits": lambda m, x: m(x),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_are_timms(settings, small, kernels_stood_in, feature):
    timms = small(depth=3, init_values=0.3).double().eval()
    expected = FEATURES[feature](timms, settings.images().double())
    got = FEATURES[feature](fastdeit.accelerate(timms), settings.images().double())
    torch.testing.assert_close(got, expected)
    assert kernels_stood_in


def test_intermediates_keep_their_values_after_the_forward_pass(settings, small, kernels_stood_in):
    """No op writes into a tensor that a hook has kept."""
    model, kept = fastdeit.accelerate(small(depth=3).eval()), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: kept.append((out, out.detach().clone())))
    model(settings.images())
    assert len(kept) == 3
    assert all(torch.equal(*pair) for pair in kept)


def test_timms_feature_wrapper(settings, kernels_stood_in):
    options = dict(features_only=True, img_size=32, embed_dim=64, num_heads=2, depth=3, out_indices=(0, 2))
    torch.manual_seed(0)
    timms = timm.create_model(NO_DISTILLATION, **options).eval()
    expected = timms(settings.images())
    torch.testing.assert_close(fastdeit.accelerate(timms)(settings.images()), expected)
    assert kernels_stood_in


def test_pruned_to_its_first_blocks(settings, small, kernels_stood_in):
    timms = small(depth=3).eval()
    model = fastdeit.accelerate(copy.deepcopy(timms))
    for m in (model, timms):
        m.prune_intermediate_layers([1], prune_head=True)
    assert len(model.blocks) == 2
    torch.testing.assert_close(model(settings.images()), timms(settings.images()))


def test_functional_call_uses_the_given_weights(settings, small, fused_device):
    model = fastdeit.accelerate(small(seed=0)).to(fused_device)
    other = fastdeit.accelerate(small(seed=1)).to(fused_device)
    x = settings.images(device=fused_device)
    weights = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    got = torch.func.functional_call(model, weights, (x,))
    assert torch.equal(got, other(x))
    gradients = torch.autograd.grad(got.sum(), list(weights.values()))
    expected = torch.autograd.grad(other(x).sum(), list(other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_moving_average_made_of_an_accelerated_model_is_fused_too(settings, small, kernels_stood_in, decay):
    model = fastdeit.accelerate(small())
    average = ModelEmaV3(model, decay=decay)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    before = copy.deepcopy(average.module).state_dict()
    average.update(model)
    kernels_stood_in.clear()
    got = average.module.eval()(settings.images())
    assert kernels_stood_in
    mixed = fastdeit.restore(copy.deepcopy(model)).eval()
    mixed.load_state_dict({k: decay * before[k] + (1 - decay) * v for k, v in model.state_dict().items()})
    torch.testing.assert_close(got, mixed(settings.images()))


@pytest.mark.parametrize("accelerate_first", [True, False])
def test_layer_decay_groups_are_timms(small, accelerate_first):
    """The same names in the same groups at the same scales, and the optimizer holds the model's own parameters."""
    timms, model = small(depth=3), small(depth=3)
    if accelerate_first:
        fastdeit.accelerate(model)
    groups = [
        [
            (group["lr_scale"], group["weight_decay"], [names[id(p)] for p in group["params"]])
            for group in param_groups_layer_decay(m, 0.05, no_weight_decay_list=m.no_weight_decay(), layer_decay=0.7)
        ]
        for m in (timms, model)
        for names in [{id(p): name for name, p in m.named_parameters()}]
    ]
    assert groups[0] == groups[1]
    assert len({scale for scale, *_ in groups[0]}) == 3 + 2  # embedding, blocks, head
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    fastdeit.accelerate(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
