"""`optimize_for_inference` in fp8 and int8: numerics against the quantized reference, what is excluded, calibration, bad input."""

import math

import pytest
import torch

from fastdeit import backends, optimize_for_inference
from fastdeit.inference.conversion import converted
from fastdeit.inference.host import Host
from fastdeit.inference.model import OptimizedModel
from fastdeit.testing import assert_close_to_oracle, kernel_device

BOTH = pytest.mark.parametrize("precision", ["fp8", "int8"])


@pytest.fixture
def calibration(raw_images, normalised, small):
    """Normalised images with labels, since an untrained model sees one class in all of them."""
    return [(normalised(small(), raw_images).float(), torch.arange(len(raw_images)))]


def exact(model, fast):
    """The quantized reference: the same 8-bit weights and scales, everything else in float64."""
    names = {name for name in dict(fast.named_buffers()) if "norm" in name or name.endswith("input_scale")}
    scales = {name: tensor for name, tensor in fast.named_buffers() if name in names}
    weights = converted(Host(model), fast.options, scales, torch.float64)
    return OptimizedModel(fast.architecture, fast.options, weights).eval()


def relative(got, expected):
    return ((got.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


@BOTH
def test_the_kernels_keep_the_contract_against_the_quantized_reference(small, calibration, precision):
    model = small(init_values=0.2)
    fast, images = optimize_for_inference(model, precision, calibration=calibration), calibration[0][0][:2]
    reference, own = exact(model, fast)(images), fast(images)
    with backends.use_backend("triton"):
        got = fast.to(kernel_device())(images.to(kernel_device())).cpu()
    assert_close_to_oracle("logits", got, reference, own)
    assert 1e-4 < relative(reference, model.double()(images.double())) < 0.06  # what the mode costs is something else


@BOTH
@pytest.mark.parametrize("images", ["float", "uint8"])
def test_logits_are_near_those_of_the_model(small, raw_images, normalised, precision, images):
    model = small()
    given = raw_images if images == "uint8" else normalised(model, raw_images).float()
    calibration = [(given[:3], torch.tensor([0, 1, 2])), (given[3:], torch.tensor([3, 4, 5]))]
    fast = optimize_for_inference(model, precision, calibration=calibration, images=images)
    assert fast(given).dtype == torch.bfloat16
    with torch.no_grad():
        assert relative(fast(given), model.double()(normalised(model, raw_images))) < 0.04


@BOTH
def test_weights_take_a_quarter_of_float32(small, calibration, precision):
    model = small(embed_dim=128, depth=4)
    fast = optimize_for_inference(model, precision, calibration=calibration)
    for name, tensor in fast.named_buffers():
        if name.startswith("blocks") and name.endswith("weight") and "norm" not in name:
            assert tensor.element_size() == 1, name
    blocks = sum(p.numel() * 4 for p in model.blocks.parameters())
    assert sum(t.numel() * t.element_size() for t in fast.blocks.buffers()) < 0.27 * blocks


@BOTH
@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), {"qkv", "proj", "fc1", "fc2"}),
        (["blocks.*.mlp.fc1"], {"qkv", "proj", "fc2"}),
        (["blocks.*.mlp.fc2"], {"qkv", "proj", "fc1"}),
        (["blocks.*.attn"], {"fc1", "fc2"}),
        (["blocks.*.attn.proj", "head"], {"qkv", "fc1", "fc2"}),
    ],
)
def test_excluded_layers_stay_in_bf16(small, calibration, precision, exclude, left):
    model = small()
    fast = optimize_for_inference(model, precision, calibration=calibration, exclude=exclude)
    assert {layer.split(".")[2] for layer in fast.options.quantized} == left
    images = calibration[0][0]
    with torch.no_grad():
        assert relative(fast(images), model.double()(images.double())) < 0.04


def test_outlier_channels_move_into_the_weights_exactly(small, calibration):
    """SmoothQuant's factors are powers of two: in the reference without rounding nothing changes but what is rounded to 8 bits."""
    model = small()
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.weight[5] = block.norm2.weight[7] = (
                60.0  # an outlier, which takes the steps from all other channels
            )
            block.attn.qkv.weight[:, 5] /= 60.0
            block.mlp.fc1.weight[:, 7] /= 60.0
    fast, images = optimize_for_inference(model, "int8", calibration=calibration), calibration[0][0]
    factors = fast.blocks[0].norm1.weight
    assert torch.equal(factors.log2(), factors.log2().round()) and factors.unique().numel() > 1
    with torch.no_grad():
        assert relative(fast(images), model.double()(images.double())) < 0.03


def test_sizes_that_8_bit_products_do_not_have_stay_in_bf16(small, calibration):
    fast = optimize_for_inference(small(mlp_ratio=1.125), "int8", calibration=calibration)  # 72 hidden channels
    assert {layer.split(".")[2] for layer in fast.options.quantized} == {"qkv", "proj"}


@pytest.mark.parametrize("value_range", ["maximum", "percentile"])
def test_what_a_static_scale_reaches(small, calibration, value_range):
    model, seen = small(), []
    with torch.no_grad():
        model.blocks[0].mlp.act.register_forward_hook(lambda module, args, out: seen.append(out.abs()))
        model(calibration[0][0])
        model.blocks[0].mlp.act._forward_hooks.clear()
    fast = optimize_for_inference(model, "int8", calibration=calibration, value_range=value_range)
    reached = fast.blocks[0].fc2.input_scale.item() * 127
    expected = seen[0].flatten().quantile(1.0 if value_range == "maximum" else 0.9999, interpolation="higher").item()
    assert reached == pytest.approx(expected, rel=0.02)
    if value_range == "percentile":
        assert reached < seen[0].max().item() * 0.999


@BOTH
def test_refresh_keeps_the_scales(small, calibration, precision):
    model = small()
    fast = optimize_for_inference(model, precision, calibration=calibration)
    before = {name: tensor.clone() for name, tensor in fast.named_buffers()}
    fast.refresh(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fast.named_buffers())
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2.0)
    fast.refresh(model)
    assert torch.equal(fast.blocks[0].fc1.scale, 2 * before["blocks.0.fc1.scale"])
    assert torch.equal(fast.blocks[0].fc2.input_scale, before["blocks.0.fc2.input_scale"])


LABELS = torch.arange(6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda x: None,
            ValueError,
            "calibration: expected batches of images, from which fp8 has its scales, got None",
        ),
        (lambda x: [], ValueError, "calibration: expected images, 256 are enough, got none"),
        (lambda x: [x[:0]], ValueError, "calibration: expected images, 256 are enough, got none"),
        (lambda x: [(x, torch.full((6,), 3))], ValueError, "images of several classes, got 6 of class 3 alone"),
        (lambda x: [(x * math.nan, LABELS)], ValueError, "calibration: expected finite images, got NaN"),
        (
            lambda x: [(x, LABELS), (x / 0, LABELS)],
            ValueError,
            "calibration: expected finite images, got NaN or infinity",
        ),
        (lambda x: x, TypeError, r"calibration: expected an iterable of batches, such as \[images\], got a tensor"),
        (lambda x: 256, TypeError, "calibration: expected an iterable of batches of images, got int"),
        (lambda x: ["a.png"], TypeError, "calibration: expected batches of images, or pairs with labels, got str"),
        (lambda x: [(x.byte(), LABELS)], TypeError, r"images: expected a floating-point tensor .* got torch\.uint8"),
        (lambda x: [(x[:, :, :16], LABELS)], ValueError, r"images: expected shape \(B, 3, 32, 32\)"),
    ],
)
def test_bad_calibration(small, calibration, change, error, message):
    with pytest.raises(error, match=message):
        optimize_for_inference(small(), "fp8", calibration=change(calibration[0][0]))


def test_calibration_in_which_a_model_sees_one_class(small, calibration):
    model = small()
    with torch.no_grad():
        model.head.bias[4] = model.head_dist.bias[4] = 100.0
    with pytest.raises(ValueError, match="images of several classes, got 6 of class 4 alone"):
        optimize_for_inference(model, "fp8", calibration=[calibration[0][0]])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(exclude=["blocks.7.*"]), ValueError, r"exclude: no module of the model matches 'blocks\.7\.\*'"),
        (dict(exclude=[3]), TypeError, "exclude: expected names of modules or patterns of them, got 3"),
        (dict(exclude="blocks"), ValueError, "exclude: expected to leave a layer to quantize"),
        (dict(value_range="minmax"), ValueError, "value_range: expected one of maximum, percentile, got 'minmax'"),
    ],
)
def test_bad_options(small, calibration, options, error, message):
    with pytest.raises(error, match=message):
        optimize_for_inference(small(), "int8", calibration=calibration, **options)


@pytest.mark.parametrize(
    ("option", "value"), [("calibration", []), ("value_range", "maximum"), ("exclude", ["blocks.0"])]
)
def test_options_of_quantization_with_bf16(small, option, value):
    with pytest.raises(ValueError, match=f"{option}: expected nothing for bf16, in which no layer is quantized"):
        optimize_for_inference(small(), "bf16", **{option: value})


def _calibrated(fast):
    """Its scales of activations, and the factors for channels."""
    return {
        n: t for n, t in fast.named_buffers() if n.endswith("input_scale") or (".norm" in n and n.endswith("weight"))
    }


@BOTH
@pytest.mark.parametrize("turned", [False, True])
def test_scales_reach_the_values_of_every_batch(small, precision, turned):
    model = small(init_values=0.2)
    torch.nn.init.normal_(model.patch_embed.proj.weight)
    batches = [(images, torch.arange(4)) for images in (torch.randn(4, 3, 32, 32), torch.zeros(4, 3, 32, 32))]
    options = dict(precision=precision, value_range="maximum")
    alone = [_calibrated(optimize_for_inference(model, calibration=[batch], **options)) for batch in batches]
    together = optimize_for_inference(model, calibration=batches[::-1] if turned else batches, **options)
    for name, tensor in _calibrated(together).items():
        both = torch.stack([found[name] for found in alone])  # a channel's factor divides its largest value
        assert torch.equal(tensor, both.amax(0) if name.endswith("input_scale") else both.amin(0)), name
    assert any(not torch.equal(alone[0][name], alone[1][name]) for name in alone[0])


def test_a_channels_factor_balances_its_inputs_and_its_weights(small, calibration):
    """SmoothQuant's equation 4 with alpha = 0.5, to the nearest power of two."""
    model = small(init_values=0.2)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(torch.logspace(-1, 1, 64))
    plain, largest = optimize_for_inference(model, "bf16"), {}

    def tap(layer, x):
        largest[layer] = x.abs().amax((0, 1)).float()
        return x

    plain.blocks[0].tap = tap
    plain(calibration[0][0])
    fast = optimize_for_inference(model, "int8", calibration=calibration)
    for norm, layer in (("norm1", "qkv"), ("norm2", "fc1")):
        weights = plain.get_buffer(f"blocks.0.{layer}.weight").float().abs().amax(0)
        expected = (largest[layer] / weights).sqrt().log2().round().neg().exp2()
        assert torch.equal(fast.get_buffer(f"blocks.0.{norm}.weight").float(), expected)
