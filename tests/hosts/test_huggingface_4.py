"""Layers of transformers 4.57: stand-ins with its layout everywhere, its models where that version is installed.

`make test-transformers-4` installs it beside the environment.
"""

import copy
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import fastdeit

transformers = pytest.importorskip("transformers", reason="needs transformers")

from fastdeit.blocks.adapters import huggingface_layers  # noqa: E402
from fastdeit.nn import hosts as known_hosts  # noqa: E402

INSTALLED = transformers.__version__.startswith("4.57.")
STAND_IN = "stand_in_for_transformers_4"
LAYOUTS = {
    "OldViTLayer": ("OldViT", huggingface_layers.LAYERS["ViTLayer"]),
    "OldDinoLayer": ("OldDino", huggingface_layers.LAYERS["Dinov2Layer"]),
    "OldBeitLayer": ("OldBeit", huggingface_layers.LAYERS["BeitLayer"]),
    "OldCLIPEncoderLayer": ("OldCLIP", huggingface_layers.LAYERS["CLIPEncoderLayer"]),
}
SIZES = dict(hidden_size=32, num_attention_heads=1, intermediate_size=48, image_size=16, patch_size=8)
MODELS = {  # config, model, options
    "ViT": ("ViTConfig", "ViTForImageClassification", {}),
    "DeiT": ("DeiTConfig", "DeiTForImageClassification", {}),
    "DeiT with teacher": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", {}),
    "MAE": ("ViTMAEConfig", "ViTMAEModel", {"mask_ratio": 0.0}),
    "MSN": ("ViTMSNConfig", "ViTMSNModel", {}),
    "I-JEPA": ("IJepaConfig", "IJepaModel", {}),
    "DINOv2": ("Dinov2Config", "Dinov2ForImageClassification", {"mlp_ratio": 2}),
    "DINOv2 with registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"mlp_ratio": 2}),
    "BEiT": ("BeitConfig", "BeitForImageClassification", {"drop_path_rate": 0.0}),
    "BEiT without LayerScale": ("BeitConfig", "BeitForImageClassification", {"layer_scale_init_value": 0.0}),
    "CLIP": ("CLIPVisionConfig", "CLIPVisionModel", {}),
    "SigLIP": ("SiglipVisionConfig", "SiglipVisionModel", {}),
    "MetaCLIP 2": ("MetaClip2VisionConfig", "MetaClip2VisionModel", {}),
    "YOLOS": ("YolosConfig", "YolosModel", {"image_size": [16, 16]}),
    "AST": (
        "ASTConfig",
        "ASTModel",
        {"max_length": 48, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8},
    ),
    "ViViT": ("VivitConfig", "VivitModel", {"num_frames": 2, "tubelet_size": [2, 8, 8]}),
}
STAND_INS = {  # class of layers, what its encoder passes beside the tokens
    "ViT": ("OldViTLayer", ()),
    "DINOv2": ("OldDinoLayer", (None,)),
    "BEiT": ("OldBeitLayer", (None, False, None, False, (16, 16))),
    "BEiT without LayerScale": ("OldBeitLayer", (None, False, None, False, (16, 16))),
    "CLIP": ("OldCLIPEncoderLayer", (None, None, False)),
}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
INPUTS = {"real AST": X.view(1, 48, 32), "real ViViT": torch.stack((X, X.flip(0)), dim=1)}  # sound, video
installed = pytest.mark.skipif(not INSTALLED, reason=f"needs transformers 4.57, this is {transformers.__version__}")
KINDS = [*STAND_INS, *(pytest.param(f"real {name}", marks=installed) for name in MODELS)]
VITS = ["ViT", pytest.param("real ViT", marks=installed)]


@pytest.fixture(scope="module")
def stand_ins():
    """The file of stand-ins, made known as one of transformers' is."""
    file = importlib.util.spec_from_file_location(STAND_IN, Path(__file__).with_name("transformers_4_layers.py"))
    module = importlib.util.module_from_spec(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, STAND_IN, module)
        file.loader.exec_module(module)
        for name, (prefix, layer) in LAYOUTS.items():
            known = huggingface_layers.Layer(STAND_IN, prefix, layer.layouts)
            patch.setitem(huggingface_layers.LAYERS, name, known)
        patch.setitem(known_hosts._HOSTS, STAND_IN, ("fastdeit.nn.huggingface", tuple(LAYOUTS)))
        yield module


@pytest.fixture
def make(hosts, stand_ins):
    def make(kind="ViT", layers=2, **options):
        torch.manual_seed(0)
        name, implementation = kind.removeprefix("real "), options.pop("attn_implementation", "sdpa")
        config, model, more = MODELS[name]
        options = {**SIZES, "num_hidden_layers": layers, **more, **options}
        if kind != name:
            config = getattr(transformers, config)(**options)
            made = getattr(transformers, model)._from_config(config, attn_implementation=implementation)
            if name == "MAE":  # it shuffles the patches
                made.embeddings.random_masking = types.MethodType(
                    lambda self, x, noise=None: (x, None, None), made.embeddings
                )
            return hosts.shaken(made)
        layer, passed = STAND_INS[name]
        off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0)
        usual = dict(hidden_act="gelu", layer_scale_init_value=0.1, _attn_implementation=implementation)
        config = types.SimpleNamespace(**{**off, **usual, **options})
        return hosts.shaken(stand_ins.Model(getattr(stand_ins, layer), config, *passed))

    return make


def first_layer(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if type(module).__name__.endswith("Layer"))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_as_accurate(hosts, make, kernels_stood_in, kind):
    accelerated = hosts.assert_as_accurate(make(kind, layers=1), INPUTS.get(kind, X))
    assert not hosts.why_not(accelerated) and len(hosts.blocks_of(accelerated)) == 1
    assert kernels_stood_in["add_layer_norm_attention"] == kernels_stood_in["add_layer_norm_mlp"] == 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "kind", ["ViT", "BEiT", *(pytest.param(f"real {n}", marks=installed) for n in ("ViT", "BEiT"))]
)
def test_either_attention_is_fused_in_training_too(hosts, make, kernels_stood_in, kind, implementation):
    accelerated = hosts.assert_as_accurate(make(kind, attn_implementation=implementation).train(), X)
    assert not hosts.why_not(accelerated) and kernels_stood_in["add_layer_norm_attention"] == 2


def test_kernels_are_as_accurate_as_its_forward(hosts, make):
    hosts.assert_kernels_as_accurate(make("real ViT" if INSTALLED else "ViT", layers=1), X[:1])


@pytest.mark.parametrize("kind", [*VITS, "BEiT", "CLIP"])
def test_state_calls_and_copies_stay_its_own(hosts, make, kind):
    hosts.assert_state_is_kept(make(kind), X)


PARTS = ["attention", "attention.attention", "attention.output", "intermediate", "output"]


@pytest.mark.parametrize(
    "part", [*PARTS, "attention.attention.key", "intermediate.intermediate_act_fn", "output.dense"]
)
@pytest.mark.parametrize("kind", VITS)
def test_hooks_are_called(hosts, make, kernels_stood_in, kind, part):
    stock = make(kind, layers=1)
    model, calls = fastdeit.accelerate(copy.deepcopy(stock)), []
    module = first_layer(model).get_submodule(part)
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(hosts.output(model, X), hosts.output(stock, X))
    assert calls == [1] and hosts.why_not(model) == {f"a hook is registered on its {type(module).__name__}"}
    handle.remove()
    assert not hosts.why_not(model)


@pytest.mark.parametrize("part", ["", *PARTS])
@pytest.mark.parametrize("kind", VITS)
def test_a_replaced_forward_of_a_class_is_noticed(hosts, make, kernels_stood_in, monkeypatch, kind, part):
    model = fastdeit.accelerate(make(kind, layers=1))
    assert not hosts.why_not(model)
    cls = type(first_layer(model).get_submodule(part))
    cls = getattr(cls, "source", cls)
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args, **kwargs: own(self, *args, **kwargs))
    assert len(hosts.why_not(model)) == 1


def _derive(module: nn.Module) -> None:
    module.__class__ = type("Mine", (type(module),), {})


CHANGES = {
    "dropout is active": lambda layer: setattr(layer.attention.attention, "dropout_prob", 0.1),
    "its logits are scaled by 1.0": lambda layer: setattr(layer.attention.attention, "scaling", 1.0),
    "its attention is causal": lambda layer: setattr(layer.attention.attention, "is_causal", True),
    "the activation is Tanh()": lambda layer: setattr(layer.intermediate, "intermediate_act_fn", nn.Tanh()),
    "keeps its parts elsewhere: 'query'": lambda layer: delattr(layer.attention.attention, "query"),
    **{f"a Mine is called: {part}": lambda layer, part=part: _derive(layer.get_submodule(part)) for part in PARTS},
}


@pytest.mark.parametrize("reason", CHANGES)
@pytest.mark.parametrize("kind", VITS)
def test_what_is_not_standard_is_left_alone(hosts, make, kernels_stood_in, kind, reason):
    model = fastdeit.accelerate(make(kind, layers=1)).train()
    assert not hosts.why_not(model)
    CHANGES[reason](first_layer(model))
    (found,) = hosts.why_not(model)
    assert found.endswith(reason.partition(": attention")[0].partition(": intermediate")[0].partition(": output")[0])


BEITS = ["BEiT", pytest.param("real BEiT", marks=installed)]
CHANGES_OF_BEIT = {
    "its attention adds a relative position bias": lambda layer: setattr(
        layer.attention.attention, "has_relative_position_bias", True
    ),
    "its branches are scaled by 0.5": lambda layer: delattr(layer, "lambda_2") or setattr(layer, "lambda_2", 0.5),
    "its drop path is a {}BeitDropPath": lambda layer: setattr(layer.drop_path, "drop_prob", 0.5),
    "dropout is active": lambda layer: setattr(layer.attention.attention.dropout, "p", 0.5),
    "dropout is active ": lambda layer: setattr(layer.attention.attention.config, "attention_probs_dropout_prob", 0.5),
}


@pytest.mark.parametrize("reason", CHANGES_OF_BEIT)
@pytest.mark.parametrize("kind", BEITS)
def test_a_layer_of_beit_that_is_not_standard_is_left_alone(hosts, make, kernels_stood_in, kind, reason):
    model = fastdeit.accelerate(make(kind, layers=1, drop_path_rate=0.2))
    layer = first_layer(model).train()
    layer.drop_path = type(layer.drop_path)(0.0) if type(layer.drop_path) is not nn.Identity else drop_path_of(layer)
    assert not hosts.why_not(model)
    CHANGES_OF_BEIT[reason](layer)
    assert hosts.why_not(model) == {reason.strip().format("" if kind != "BEiT" else "Old")}


def drop_path_of(layer: nn.Module) -> nn.Module:
    """transformers gives the first layer none, whatever the rate."""
    return sys.modules[type(layer).source.__module__].BeitDropPath(0.0)


@pytest.mark.parametrize("kind", [*VITS, *BEITS, "CLIP", pytest.param("real CLIP", marks=installed)])
def test_masks_run_its_code(hosts, make, kernels_stood_in, kind):
    layer = first_layer(fastdeit.accelerate(make(kind, layers=1)))
    stock, tokens = fastdeit.restore(copy.deepcopy(layer)), torch.randn(2, 4, 32)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., 1] = float("-inf") if "CLIP" in kind else 0.5
    options = (mask, None) if "CLIP" in kind else (mask,)
    got, expected = layer(tokens, *options), stock(tokens, *options)
    for ours, theirs in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert kernels_stood_in["add_layer_norm_attention"] == 0


@pytest.mark.parametrize("kind", ["BEiT", "CLIP"])
def test_attentions_come_from_its_code(hosts, make, kernels_stood_in, kind):
    layer = first_layer(fastdeit.accelerate(make(kind, layers=1, attn_implementation="eager")))
    options = {"output_attentions": True} | (
        {} if kind == "BEiT" else dict.fromkeys(("attention_mask", "causal_attention_mask"))
    )
    _, weights = layer(torch.randn(2, 4, 32), **options)
    assert weights.shape == (2, 1, 4, 4) and kernels_stood_in["add_layer_norm_attention"] == 0


@pytest.mark.parametrize("first", [False, True])
@installed
def test_collected_outputs_are_transformers_and_layers_run_fused_again(hosts, make, kernels_stood_in, first):
    """transformers leaves a forward on the modules that it collected from, which is their class's own. `first`: before the swap."""
    stock = make("real ViT", attn_implementation="eager")
    model = copy.deepcopy(stock)
    options = dict(output_hidden_states=True, output_attentions=True)
    if first:
        model(X, **options)
    fastdeit.accelerate(model)
    got, expected = model(X, **options), stock(X, **options)
    torch.testing.assert_close(got.hidden_states, expected.hidden_states)
    torch.testing.assert_close(got.attentions, expected.attentions)
    kernels_stood_in.clear()
    hosts.output(model, X)
    assert kernels_stood_in["add_layer_norm_attention"] == 2 and not hosts.why_not(model)
    torch.testing.assert_close(hosts.output(fastdeit.restore(model), X), hosts.output(stock, X), rtol=0, atol=0)
    assert not hosts.blocks_of(model)


@pytest.mark.parametrize("kind", VITS)
def test_gradient_checkpointing_is_its_own_around_the_fused_layer(hosts, make, kernels_stood_in, kind):
    model = make(kind).train()
    plain = hosts.step(fastdeit.accelerate(copy.deepcopy(model)), X)
    kernels_stood_in.clear()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(hosts.step(fastdeit.accelerate(model), X), plain, rtol=0, atol=0)
    assert kernels_stood_in["add_layer_norm_attention"] == 4  # forward twice


@pytest.mark.parametrize("kind", [*VITS, *BEITS])
def test_dropout_after_the_branches_draws_its_masks(hosts, make, kernels_stood_in, kind):
    accelerated = hosts.assert_as_accurate(make(kind, hidden_dropout_prob=0.3).train(), X)
    assert not hosts.why_not(accelerated)


@pytest.mark.parametrize("kind", [*VITS, "CLIP"])
def test_training_and_checkpoints_agree(hosts, make, kernels_stood_in, kind):
    hosts.assert_training_agrees(make(kind), X)


@pytest.mark.one_graph
@pytest.mark.parametrize("kind", [*VITS, "BEiT"])
def test_it_compiles_to_one_graph(hosts, make, kernels_stood_in, kind):
    hosts.assert_compiles_whole(make(kind, layers=1), X, backend="eager")


@pytest.mark.parametrize("adapter", ["stand-in", "PEFT", "torchao"])
@pytest.mark.parametrize("kind", VITS)
def test_adapters_and_quantized_weights_leave_layers_fused(hosts, make, kernels_stood_in, kind, adapter):
    if adapter == "PEFT" and INSTALLED:
        pytest.skip("PEFT 0.21 needs transformers 5")
    model = hosts.assert_adapters_act(make(kind), adapter, X, "query", "value")
    assert kernels_stood_in["attention_qkv"] == 2 and kernels_stood_in["add_layer_norm_mlp"] == 2
    (note,) = hosts.notes(model)
    assert note.startswith("its projections are called: a ")


@installed
def test_save_pretrained_and_from_pretrained(hosts, make, kernels_stood_in, tmp_path):
    model = fastdeit.accelerate(make("real ViT"))
    model.save_pretrained(tmp_path)
    stock = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert type(first_layer(stock)).__module__.startswith("transformers.")
    torch.testing.assert_close(hosts.output(model, X), hosts.output(stock, X))


@installed
def test_pruned_heads_stay_fused(hosts, make, kernels_stood_in):
    stock = make("real ViT", num_attention_heads=2)
    stock.vit._prune_heads({0: [1]})
    accelerated = hosts.assert_as_accurate(stock, X)
    assert not hosts.why_not(accelerated) and kernels_stood_in["add_layer_norm_attention"] == 2


@pytest.mark.parametrize("missing", ["the class of a part", "an argument"])
def test_a_version_with_another_layout_has_a_reason(stand_ins, monkeypatch, missing):
    """An argument more is how versions before 4.57 differ, whose layers return a tuple."""
    monkeypatch.setattr(known_hosts, "_unusable", {})
    name = "stand_in_for_another_version"
    file = types.ModuleType(name)
    for key, value in vars(stand_ins).items():
        setattr(file, key, value)
    forward = stand_ins.OldViTLayer.forward
    if missing == "an argument":
        forward = lambda self, hidden_states, head_mask=None, output_attentions=False: (hidden_states,)  # noqa: E731
    else:
        del file.OldViTOutput
    layer = type("OldViTLayer", (nn.Module,), {"__module__": name, "forward": forward})
    file.OldViTLayer = layer
    monkeypatch.setitem(sys.modules, name, file)
    known = huggingface_layers.Layer(name, "OldViT", huggingface_layers.LAYERS["ViTLayer"].layouts)
    monkeypatch.setitem(huggingface_layers.LAYERS, "OldViTLayer", known)
    monkeypatch.setitem(known_hosts._HOSTS, name, ("fastdeit.nn.huggingface", ("OldViTLayer",)))
    monkeypatch.delattr("fastdeit.nn.huggingface.OldViTLayer", raising=False)
    row = fastdeit.explain(nn.Sequential(layer())).as_dict()["0"]
    arguments = "hidden_states, head_mask" + (", output_attentions" if missing == "an argument" else "")
    assert not row["fused"] and row["reason"] == (
        f"no fused class for OldViTLayer: this version of {name} is not known "
        f"(OldViTLayer has other parts, or takes other arguments: {arguments})"
    )
