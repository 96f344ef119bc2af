"""Blocks that a model calls one by one, other libraries' and timm's, launch from plans what the ops launch. On the fake runtime."""

import copy
import functools

import pytest
import timm
import torch
from torch import nn

import fastdeit
from fastdeit.nn.block import Block
from fastdeit.nn.host_block import HostBlock
from fastdeit.plan import planned as planning
from fastdeit.plan.code import why_not_gradients
from fastdeit.plan.planned import Plan, described
from fastdeit.plan.tape import Buffer, View
from fastdeit.plan.training import TrainingPlan
from tests.plan.changes import LoRA, hidden_hook, own_forward, replaced_data
from tests.plan.events import (
    WithoutPlans,
    dataflow,
    of_parameters,
    precision,
    recorded,
    requested_bytes,
    reset_peak,
    unmerged,
)
from tests.plan.models import apart, needs_plans, plan_it, plans
from tests.plan.test_training import keep_apart, unplanned

torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5")
pytestmark = [pytest.mark.fake_device, needs_plans]


def torchvisions(**options):
    sizes = dict(image_size=64, patch_size=16, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=768)
    return torchvision.models.VisionTransformer(**sizes | options)


def hugging_faces(config="ViTConfig", model="ViTForImageClassification", **options):
    sizes = dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768, image_size=64)
    return getattr(transformers, model)(getattr(transformers, config)(patch_size=16, **sizes | options))


def pooled(**options):
    """timm's, which calls its blocks one by one as its head reads the mean of all tokens."""
    return timm.create_model("vit_tiny_patch16_224", global_pool="avg", depth=2, img_size=64, **options)


MODELS = {
    "timm": pooled,
    "timm with LayerScale": functools.partial(pooled, init_values=0.1),
    "timm with drop path": functools.partial(pooled, drop_path_rate=0.3),
    "timm with both": functools.partial(pooled, init_values=0.1, drop_path_rate=0.3),
    "timm that skips": functools.partial(pooled, init_values=0.1, drop_path_rate=0.6),
    "CaiT": functools.partial(timm.create_model, "cait_xxs24_224", depth=1, img_size=64, drop_path_rate=0.3),
    "torchvision": torchvisions,
    "ViT": hugging_faces,
    "ViT without biases": functools.partial(hugging_faces, qkv_bias=False),
    "CLIP": functools.partial(hugging_faces, "CLIPVisionConfig", "CLIPVisionModel"),
    "DINOv2": functools.partial(hugging_faces, "Dinov2Config", "Dinov2Model"),
    "BEiT with drop path": functools.partial(hugging_faces, "BeitConfig", "BeitModel", drop_path_rate=0.3),
    "BEiT": functools.partial(hugging_faces, "BeitConfig", "BeitModel", drop_path_rate=0.0),
}
CASES = {
    "timm": ("timm", None, torch.bfloat16, "usual"),
    "torchvision": ("torchvision", None, torch.bfloat16, "usual"),
    "torchvision in bf16": ("torchvision", torch.bfloat16, None, "usual"),
    "ViT": ("ViT", None, torch.bfloat16, "usual"),
    "ViT in bf16": ("ViT", torch.bfloat16, None, "usual"),
    "ViT in fp16": ("ViT", None, torch.float16, "usual"),
    "lean": ("ViT", None, torch.bfloat16, "lean"),
    "no biases": ("ViT without biases", None, torch.bfloat16, "usual"),
    "CLIP": ("CLIP", torch.bfloat16, None, "usual"),
    "LayerScale": ("timm with LayerScale", None, torch.bfloat16, "usual"),
    "LayerScale in bf16": ("timm with LayerScale", torch.bfloat16, None, "usual"),
    "LayerScale in fp16": ("timm with LayerScale", None, torch.float16, "usual"),
    "DINOv2 in fp16": ("DINOv2", torch.float16, None, "usual"),
    "drop path that skips": ("timm that skips", None, torch.bfloat16, "usual"),
    "drop path that skips, in fp16": ("timm that skips", torch.float16, None, "lean"),
    "drop path": ("timm with drop path", None, torch.bfloat16, "usual"),
    "drop path in bf16": ("timm with drop path", torch.bfloat16, None, "usual"),
    "both": ("timm with both", None, torch.bfloat16, "lean"),
    "both in bf16": ("timm with both", torch.bfloat16, None, "usual"),
    "class token": ("CaiT", None, torch.bfloat16, "usual"),
    "DINOv2": ("DINOv2", None, torch.bfloat16, "usual"),
    "DINOv2 in bf16": ("DINOv2", torch.bfloat16, None, "usual"),
    "BEiT": ("BEiT", None, torch.bfloat16, "usual"),
    "BEiT with drop path": ("BEiT with drop path", None, torch.bfloat16, "usual"),
    "BEiT with drop path, in bf16": ("BEiT with drop path", torch.bfloat16, None, "lean"),
    "BEiT in bf16": ("BEiT", torch.bfloat16, None, "usual"),
}


@functools.cache
def _built(name):
    with torch.device("cuda"):
        return fastdeit.accelerate(MODELS[name]().eval())


def build(name, dtype=None, memory="usual"):
    drop_path = "skip" if "skips" in name else "mask"
    return fastdeit.accelerate(copy.deepcopy(_built(name)).to(dtype), memory=memory, drop_path=drop_path)


def images(model):
    return torch.zeros(2, 3, 64, 64, device="cuda", dtype=next(model.parameters()).dtype)


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, (HostBlock, Block))]


def block_and_tokens(name, dtype, memory="usual"):
    """The second block, in training mode."""
    block = blocks_of(build(name, dtype, memory))[1].train()
    return block, torch.zeros(2, 17, 192, device="cuda", dtype=dtype, requires_grad=True)


def called(block, x):
    """A block's tokens."""
    kind = type(block).__name__
    if "ClassAttn" in kind:
        return block(x[:, 1:], x[:, :1])
    out = block(x, None) if kind.startswith(("ViT", "CLIP")) else block(x)
    return out[0] if isinstance(out, tuple) else out


def output(model, **options):
    made = model(images(model), **options)
    return made if isinstance(made, torch.Tensor) else made[0]


def step(model, autocast=torch.bfloat16, **options):
    model.zero_grad(set_to_none=True)
    with precision(autocast):
        made = output(model, **options)
    made.square().sum().backward()


def planned_kinds(model):
    return [[type(entry) for entry in plans(block)] for block in blocks_of(model)]


@pytest.mark.parametrize("case", CASES)
def test_a_plan_launches_what_the_ops_launch_on_the_same_tensors(case, monkeypatch):
    name, dtype, autocast, memory = CASES[case]
    block, x = block_and_tokens(name, dtype, memory)
    keep_apart(monkeypatch)
    monkeypatch.setattr(planning, "packed", apart)

    def forward():
        with torch.no_grad(), precision(autocast):
            return called(block, x)

    plan_it(forward)
    assert [type(entry) for entry in plans(block)] == [Plan]
    planned = recorded(forward)
    with WithoutPlans():
        ops = recorded(forward)
    assert len(planned) >= 7 and dataflow(planned) == dataflow(ops)
    assert of_parameters(planned, block) == of_parameters(ops, block)


@pytest.mark.parametrize("case", CASES)
def test_a_plan_with_gradients_launches_what_the_ops_launch_on_the_same_tensors(case, monkeypatch):
    name, dtype, autocast, memory = CASES[case]
    block, x = block_and_tokens(name, dtype, memory)
    keep_apart(monkeypatch)

    def forward_and_backward():
        with precision(autocast):
            made = called(block, x)
        return made, torch.autograd.grad(made, [x, *block.parameters()], torch.ones_like(made))

    for _ in range(2):
        forward_and_backward()
    assert [type(entry) for entry in plans(block)] == [TrainingPlan]
    planned = recorded(forward_and_backward)
    monkeypatch.undo()
    with WithoutPlans():
        ops = recorded(forward_and_backward)
    planned = unmerged(planned, ops)
    assert len(planned) >= 20 and dataflow(planned) == dataflow(ops)
    assert of_parameters(planned, block) == of_parameters(ops, block)


@pytest.mark.parametrize("name", ["timm", "timm with both", "torchvision", "ViT", "DINOv2"])
def test_a_model_trains_and_infers_from_the_plans_of_its_blocks(name, monkeypatch):
    model = build(name).train()
    plan_it(lambda: step(model))
    assert planned_kinds(model) == [[TrainingPlan]] * 2
    planned = recorded(lambda: step(model))
    assert all(
        p.grad is not None for name, p in model.named_parameters() if "mask_token" not in name and p.requires_grad
    )
    ops = unplanned(monkeypatch, lambda: step(model))
    assert of_parameters(unmerged(planned, ops), model) == of_parameters(ops, model)
    model.eval()
    fastdeit.set_graphs("auto")
    with torch.no_grad(), precision(torch.bfloat16):
        for _ in range(10):  # more than the calls after which a model's plan is captured
            output(model)
        planned = recorded(lambda: output(model))
        with WithoutPlans():
            ops = recorded(lambda: output(model))
    assert planned_kinds(model) == [[Plan]] * 2
    assert of_parameters(planned, model) == of_parameters(ops, model)
    assert {line.rpartition(": ")[2] for block in blocks_of(model) for line in described(block)} == {
        "planned, launched"
    }
    lines = [line for line in fastdeit.explain(model).plans if line.endswith("planned, launched")]
    of_both = {
        "timm": ["blocks.0-1"],
        "timm with both": ["blocks.0-1"],
        "DINOv2": ["encoder.layer.0-1"],
        "torchvision": ["layers.encoder_layer_0-1"],
        "ViT": ["vit.layers.0-1"],
    }[name]
    assert len(lines) == len(of_both)
    assert all(f"{each} with 2 x 17 x 192 float32" in line for each, line in zip(of_both, lines, strict=True))


def test_gradients_of_weights_that_are_packed_share_memory_as_without_a_plan(monkeypatch):
    model = build("ViT").train()
    attention = model.vit.layers[1].attention
    for _ in range(4):
        step(model)
        grads = [getattr(attention, name).weight.grad for name in ("q_proj", "k_proj", "v_proj")]
        assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1
        assert [grad.storage_offset() for grad in grads] == [0, 192 * 192, 2 * 192 * 192]
    assert planned_kinds(model) == [[TrainingPlan]] * 2


def change_config(model, **values):
    for name, value in values.items():
        setattr(model.config, name, value)


def users_attention(model):
    sdpa = transformers.AttentionInterface()["sdpa"]
    transformers.AttentionInterface.register("of_a_test", lambda *a, **k: sdpa(*a, **k))
    change_config(model, _attn_implementation="of_a_test")


CHANGES = {
    "a hook on a projection": lambda m: m.vit.layers[1].attention.q_proj.register_forward_hook(lambda *_: None),
    "a hook before a block": lambda m: m.vit.layers[1].register_forward_pre_hook(lambda *_: None),
    "a hook that changes what leaves a block": lambda m: m.vit.layers[0].register_forward_hook(lambda *a: a[2] * 2),
    "a hook on inactive dropout": lambda m: m.vit.layers[1].dropout.register_forward_hook(lambda *_: None),
    "a hook in another dictionary": lambda m: hidden_hook(m.vit.layers[1].mlp.fc1),
    "LoRA": lambda m: setattr(m.vit.layers[1].attention, "k_proj", LoRA(m.vit.layers[1].attention.k_proj)),
    "a forward on the instance": lambda m: own_forward(m.vit.layers[1].attention.o_proj),
    "a parametrization": lambda m: nn.utils.parametrize.register_parametrization(
        m.vit.layers[1].mlp.fc2, "weight", nn.Identity()
    ),
    "another parameter": lambda m: setattr(
        m.vit.layers[1].layernorm_before, "weight", nn.Parameter(torch.ones(192, device="cuda"))
    ),
    "other data": lambda m: replaced_data(m.vit.layers[1].attention.v_proj.weight),
    "weights in bf16": lambda m: m.vit.layers.bfloat16(),
    "another block": lambda m: m.vit.layers.__setitem__(1, copy.deepcopy(m.vit.layers[0])),
    "active dropout": lambda m: setattr(m.vit.layers[1].dropout, "p", 0.1) or m.vit.layers[1].dropout.train(),
    "active dropout of attention": lambda m: (
        setattr(m.vit.layers[1].attention, "attention_dropout", 0.1) or m.vit.layers[1].train()
    ),
    "another epsilon": lambda m: setattr(m.vit.layers[1].layernorm_after, "eps", 1e-3),
    "eager attention": lambda m: change_config(m, _attn_implementation="eager"),
    "attention of the user's": users_attention,
    "a frozen block": lambda m: m.vit.layers[1].requires_grad_(False),
    "memory": lambda m: fastdeit.accelerate(m, memory="lean"),
    "an excluded part": lambda m: fastdeit.accelerate(m, exclude="vit.layers.1.mlp"),
    "restore": fastdeit.restore,
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_the_next_call(change, gradients, monkeypatch):
    model = build("ViT").train(gradients)

    def call(model, **options):
        if gradients:
            return step(model, **options)
        with torch.no_grad(), precision(torch.bfloat16):
            return output(model, **options)

    plan_it(lambda: call(model))
    assert planned_kinds(model) == [[TrainingPlan if gradients else Plan]] * 2
    apply = CHANGES[change]
    options = apply if isinstance(apply, dict) else {}
    twin = copy.deepcopy(model)
    if not options:
        apply(twin)
        apply(model)
    call(twin, **options)  # compiles kernels
    first = of_parameters(recorded(lambda: call(model, **options)), model)
    expected = of_parameters(unplanned(monkeypatch, lambda: call(model, **options)), model)
    later = [of_parameters(recorded(lambda: call(model, **options)), model) for _ in range(3)]
    assert all(unmerged(events, expected) == expected for events in (first, *later))


TAILS = {
    "a hook is registered on its LayerScale": lambda block: block.ls2.register_forward_hook(lambda *_: None),
    "a hook is registered on its DropPath": lambda block: block.drop_path2.register_forward_pre_hook(lambda *_: None),
    "its LayerScale has a forward of its own": lambda block: own_forward(block.ls2),
    "its LayerScale is a LayerScale that works in place": lambda block: setattr(block.ls2, "inplace", True),
    "its drop path is a StochasticDepth": lambda block: setattr(
        block, "drop_path2", torchvision.ops.StochasticDepth(0.3, "row")
    ),
}


@pytest.mark.parametrize("reason", TAILS)
def test_a_last_layer_scale_or_drop_path_that_may_do_more_is_called_and_said(reason, monkeypatch):
    block, x = block_and_tokens("timm with both", None)
    called_parts = []

    def call():
        with torch.no_grad(), precision(torch.bfloat16):
            block(x)

    plan_it(call)
    assert [type(entry) for entry in plans(block)] == [Plan]
    TAILS[reason](block)
    for part in (block.ls2, block.drop_path2):
        monkeypatch.setattr(part, "_call_impl", functools.partial(_noted, part, called_parts))
    plan_it(call)
    assert plans(block) == [reason] and called_parts == [block.ls2, block.drop_path2] * 3


def _noted(part, called_parts, *args):
    called_parts.append(part)
    return nn.Module._call_impl(part, *args)


@pytest.mark.parametrize("dtype, autocast", [(None, torch.bfloat16), (torch.bfloat16, None)])
@pytest.mark.parametrize("name", ["ViT", "DINOv2"])
@pytest.mark.parametrize("gradients, most", [(False, 1.01), (True, 1.02)])
def test_blocks_take_no_more_memory_than_the_ops(name, dtype, autocast, gradients, most, monkeypatch):
    with torch.device("cuda"):
        model = fastdeit.accelerate(MODELS[name](num_hidden_layers=6, image_size=96).to(dtype))
    x = torch.zeros(64, 3, 96, 96, device="cuda", dtype=dtype or torch.float32)

    def call():
        with torch.set_grad_enabled(gradients), precision(autocast):
            made = model(x)[0]
        if gradients:
            made.sum().backward()

    def peak():
        model.zero_grad(set_to_none=True)
        reset_peak()
        before = requested_bytes()
        call()
        return requested_bytes("peak") - before

    plan_it(call)
    assert planned_kinds(model) == [[TrainingPlan if gradients else Plan]] * 6
    planned = peak()
    monkeypatch.setattr(planning, "why_not_plannable", lambda _: "a test")
    assert planned / peak() <= most


@pytest.mark.parametrize(
    ("places", "dtype", "refused"),
    [
        (((0, 4), (4, 8)), torch.float32, False),
        (((0, 4), (0, 4)), torch.float32, False),  # one gradient of two parameters
        (((0, 4), (3, 7)), torch.float32, True),
        (((1, 8), (2, 4)), torch.float32, True),
        (((0, 4), (4, 8)), torch.int32, True),
    ],
)
def test_gradients_may_be_parts_of_one_buffer_that_do_not_overlap(places, dtype, refused):
    memory = torch.zeros(8)
    tensors = [memory[places[0][0] : places[0][1]], memory.view(dtype)[places[1][0] : places[1][1]]]
    buffer = Buffer(memory.nbytes)
    views = [View(buffer, 4 * start, t.dtype, t.shape, (1,)) for (start, _), t in zip(places, tensors, strict=True)]
    assert (why_not_gradients(views, tensors) is not None) == refused
    assert why_not_gradients([None, *views[:1]], [None, *tensors[:1]]) is None
    of_input = views[0]._replace(buffer=Buffer(memory.nbytes, input=0))
    assert "an input" in why_not_gradients([of_input], tensors[:1])
