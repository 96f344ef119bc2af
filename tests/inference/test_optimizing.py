"""`optimize_for_inference` in bf16 and fp16: numerics, what is folded, what is refused, and what the module is."""

import copy

import pytest
import timm
import torch
from torch import nn

import fastdeit
from fastdeit import backends, optimize_for_inference, testing
from fastdeit.inference.device import check_device
from fastdeit.testing import kernel_device

MODELS = {
    "deit distilled": dict(),
    "deit": dict(name="deit_tiny_patch16_224"),
    "deit III": dict(name="deit3_small_patch16_224", init_values=0.2),
    "clip": dict(name="vit_base_patch16_clip_224"),  # a norm in front of the blocks, no bias of the patches
    "registers": dict(name="vit_small_patch14_reg4_dinov2", init_values=0.2),
    "without biases": dict(name="vit_tiny_patch16_224", qkv_bias=False),
}


@pytest.mark.parametrize("images", ["float", "uint8"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("case", MODELS)
def test_logits_keep_the_contract(small, raw_images, normalised, assert_within_contract, case, precision, images):
    model = small(**MODELS[case])
    fast, floats = optimize_for_inference(model, precision, images=images), normalised(model, raw_images)
    got = fast(floats.float() if images == "float" else raw_images)
    assert got.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert_within_contract(model, floats, got)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_on_the_kernels(small, raw_images, normalised, assert_within_contract, precision):
    model = small(depth=2, init_values=0.2)
    fast = optimize_for_inference(model, precision, images="uint8").to(kernel_device())
    with backends.use_backend("triton"), testing.poisoned_memory():
        got = fast(raw_images[:2].to(kernel_device())).cpu()
    assert_within_contract(model, normalised(model, raw_images[:2]), got)


def heads(model, images):
    tokens = model.forward_features(images)
    return model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])


READ = {
    "class": lambda model, images: heads(model, images)[0],
    "distillation": lambda model, images: heads(model, images)[1],
    "mean": lambda model, images: model(images),
    "softmax_sum": lambda model, images: sum(logits.softmax(-1) for logits in heads(model, images)),
}


@pytest.mark.parametrize("readout", READ)
def test_readouts(small, raw_images, normalised, assert_within_contract, readout):
    model = small()
    images = normalised(model, raw_images)
    assert_within_contract(model, images, optimize_for_inference(model, readout=readout)(images), READ[readout])


def test_nothing_is_left_to_compute_that_a_frozen_model_need_not(small):
    names = {name for name, _ in optimize_for_inference(small(init_values=0.2)).named_buffers()}
    assert not {name for name in names if "norm" in name or "gamma" in name}
    assert {name for name in names if name.startswith("heads")} == {"heads.mean.weight", "heads.mean.bias"}


def test_the_last_block_computes_the_prefix_alone(small, raw_images, normalised):
    model = small()
    fast, rows = optimize_for_inference(model), []
    for block in fast.blocks:
        block.proj.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    fast(normalised(model, raw_images))
    assert rows == [18, 2]


@pytest.mark.parametrize(("gamma", "apart"), [(1e-6, True), (2e-4, True), (0.2, False)])
def test_a_layer_scale_that_float16_weights_cannot_take_stays_apart(
    small, raw_images, normalised, assert_within_contract, gamma, apart
):
    model = small(init_values=0.2)
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma.fill_(gamma)
            block.ls2.gamma.fill_(gamma)
    fast, images = optimize_for_inference(model, "fp16"), normalised(model, raw_images)
    assert ("blocks.0.gamma1" in dict(fast.named_buffers())) is apart
    assert_within_contract(model, images, fast(images))


def test_the_given_model_is_untouched(small):
    model = fastdeit.accelerate(small()).train()
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    fast = optimize_for_inference(model)
    assert [type(m) for m in model.modules()] == classes and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    own = {t.data_ptr() for t in model.state_dict().values()}
    assert not own & {t.data_ptr() for t in fast.buffers()}
    assert not list(fast.parameters())


def test_an_accelerated_model_gives_the_same(small, raw_images, normalised):
    model = small()
    images = normalised(model, raw_images)
    plain = optimize_for_inference(model)(images)
    assert torch.equal(optimize_for_inference(fastdeit.accelerate(model))(images), plain)


def test_refresh_takes_over_new_weights_in_place(small, raw_images, normalised):
    model = small()
    fast, images = optimize_for_inference(model), normalised(model, raw_images)
    places = [t.data_ptr() for t in fast.buffers()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    fast.refresh(model)
    assert torch.equal(fast(images), optimize_for_inference(model)(images))
    assert [t.data_ptr() for t in fast.buffers()] == places


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(depth=3), "another: blocks differ"),
        (dict(num_classes=4), "another: classes differ"),
        (dict(name="deit_tiny_patch16_224"), "another: prefix differ"),
    ],
)
def test_refresh_from_another_model(small, other, message):
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(small()).refresh(small(**other))


def test_a_refresh_that_folds_otherwise(small):
    model = small(init_values=0.2)
    torch.nn.init.ones_(model.blocks[0].ls1.gamma)
    fast = optimize_for_inference(model, "fp16")
    torch.nn.init.constant_(model.blocks[0].ls1.gamma, 1e-7)
    with pytest.raises(ValueError, match=r"others for blocks\.0\.gamma1; optimize it anew"):
        fast.refresh(model)


def test_autocast_and_gradients_change_nothing(small, raw_images, normalised):
    model = small()
    fast, images = optimize_for_inference(model), normalised(model, raw_images).float()
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(fast(images), fast(images.requires_grad_()))
    assert not fast(images).requires_grad


def test_an_empty_batch(small, raw_images):
    assert optimize_for_inference(small(), images="uint8")(raw_images[:0]).shape == (0, 10)


def test_the_precision_is_fixed(small):
    fast = optimize_for_inference(small())
    with pytest.raises(TypeError, match="a model optimized in bf16 keeps its dtypes"):
        fast.half()
    assert fast.to("cpu").dtype == torch.bfloat16


def replaced_head(model):
    model.head_dist = nn.Identity()


def hooked(model):
    model.blocks[1].mlp.register_forward_hook(lambda *_: None)


def hooked_model(model):
    model.register_forward_pre_hook(lambda *_: None)


def gated(model):
    model.blocks[0].attn.proj = nn.Sequential(model.blocks[0].attn.proj)


def adapted(model):
    model.blocks[1].mlp.fc1 = nn.Sequential(model.blocks[1].mlp.fc1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced_head, "head_dist is a Identity"),
        (hooked, "block 1: a hook is registered on its Mlp"),
        (hooked_model, "a hook is registered on its VisionTransformerDistilled"),
        (gated, "block 0: a projection is a Sequential"),
        (adapted, "block 1: a projection is a Sequential"),
    ],
)
def test_a_model_that_is_not_plain(small, change, reason):
    model = small()
    change(model)
    with pytest.raises(ValueError, match=f"VisionTransformerDistilled is not fused as a whole: {reason}"):
        optimize_for_inference(model)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda small: nn.Linear(3, 4), "Linear is not fused as a whole: it is no vision transformer of those known"),
        (lambda small: small().blocks[0], "Block is not fused as a whole: only blocks or layers of it are"),
        (lambda small: small(name="deit_tiny_patch16_224", global_pool="avg"), "the pooling reads every token"),
        (lambda small: small(num_classes=0), "head is a Identity, which gives no logits"),
        (lambda small: timm.create_model("resnet18"), "ResNet is not fused as a whole: it is no vision transformer"),
    ],
)
def test_a_model_that_is_not_fused_as_a_whole(small, make, reason):
    with pytest.raises(ValueError, match=reason):
        optimize_for_inference(make(small))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(precision="fp32"), "precision: expected one of bf16, fp16"),
        (dict(images="uint16"), "images: expected one of float, uint8, got 'uint16'"),
        (dict(readout="sum"), "readout: expected one of class, distillation, mean, softmax_sum, got 'sum'"),
        (dict(images="uint8", mean=(0.5,)), "mean: expected 3 finite numbers, got"),
        (dict(images="uint8", std=(0.5, 0.0, 0.5)), "std: expected 3 finite numbers above 0, got"),
        (dict(mean=(0.5, 0.5, 0.5)), "expected None with images='float'"),
    ],
)
def test_bad_options(small, options, message):
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(small(), **options)


def test_a_readout_that_the_model_has_not(small):
    with pytest.raises(ValueError, match="expected 'class' for a model without a distillation head, got 'mean'"):
        optimize_for_inference(small(name="deit_tiny_patch16_224"), readout="mean")


def test_a_model_that_does_not_say_how_images_are_normalised(small):
    model = small()
    model.pretrained_cfg = None
    with pytest.raises(ValueError, match="mean: expected 3 numbers for images='uint8', since the model does not say"):
        optimize_for_inference(model, images="uint8")


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        optimize_for_inference("deit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("images", "given", "error", "message"),
    [
        (
            "uint8",
            torch.rand(2, 3, 32, 32),
            TypeError,
            r"expected torch.uint8, levels from 0 to 255 .* got torch.float32",
        ),
        ("uint8", torch.zeros(2, 3, 32, 32, dtype=torch.int64), TypeError, "got torch.int64"),
        ("float", torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "raw ones need a model .* images='uint8'"),
        ("float", torch.zeros(2, 1, 32, 32), ValueError, r"expected shape \(B, 3, 32, 32\), got \(2, 1, 32, 32\)"),
        ("float", torch.zeros(3, 32, 32), ValueError, r"got \(3, 32, 32\)"),
        ("float", [1.0], TypeError, "expected a tensor, got list"),
        (
            "float",
            torch.zeros(2, 3, 32, 32, device="meta"),
            ValueError,
            "expected device cpu as the model has, got meta",
        ),
    ],
)
def test_bad_images(small, images, given, error, message):
    with pytest.raises(error, match=message):
        optimize_for_inference(small(), images=images)(given)


@pytest.mark.parametrize(
    ("precision", "capability", "least"), [("bf16", (7, 5), "8.0"), ("int8", (7, 5), "8.0"), ("fp8", (8, 6), "8.9")]
)
def test_a_gpu_that_is_too_old(monkeypatch, precision, capability, least):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has = f"{capability[0]}.{capability[1]}"
    with pytest.raises(
        ValueError, match=f"'{precision}' needs a GPU of compute capability {least} or newer, and cuda:0 has {has}"
    ):
        check_device(precision, torch.device("cuda:0"))
