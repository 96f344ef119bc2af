"""Vision models of Hugging Face transformers: ViT in every respect, the other layers in their numbers."""

import copy
import types

import pytest
import torch
from torch import nn

import fastdeit
from fastdeit.blocks.drop_path import DROP_PATHS, register_drop_path

transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5")
from transformers import (  # noqa: E402
    AltCLIPVisionConfig,
    AltCLIPVisionModel,
    ASTConfig,
    ASTModel,
    BeitConfig,
    BeitForImageClassification,
    ChineseCLIPVisionConfig,
    ChineseCLIPVisionModel,
    CLIPSegVisionConfig,
    CLIPSegVisionModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    IJepaConfig,
    IJepaModel,
    MetaClip2VisionConfig,
    MetaClip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Tipsv2VisionConfig,
    Tipsv2VisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTMSNConfig,
    ViTMSNModel,
    VivitConfig,
    VivitModel,
    YolosConfig,
    YolosModel,
)

from fastdeit.nn import hosts as known_hosts  # noqa: E402
from fastdeit.nn import huggingface  # noqa: E402

SIZES = dict(hidden_size=32, num_attention_heads=1, intermediate_size=48, image_size=16, patch_size=8)
MODELS = {
    "ViT": (ViTConfig, ViTForImageClassification),
    "ViT without biases": (lambda **k: ViTConfig(qkv_bias=False, **k), ViTForImageClassification),
    "DeiT": (DeiTConfig, DeiTForImageClassification),
    "DeiT with teacher": (DeiTConfig, DeiTForImageClassificationWithTeacher),
    "MAE": (lambda **k: ViTMAEConfig(mask_ratio=0.0, **k), ViTMAEModel),
    "MSN": (ViTMSNConfig, ViTMSNModel),
    "I-JEPA": (IJepaConfig, IJepaModel),
    "DINOv2": (Dinov2Config, Dinov2ForImageClassification),
    "DINOv2 with registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    "BEiT": (BeitConfig, BeitForImageClassification),
    "CLIP": (CLIPVisionConfig, CLIPVisionModel),
    "SigLIP": (SiglipVisionConfig, SiglipVisionModel),
    "AltCLIP": (AltCLIPVisionConfig, AltCLIPVisionModel),
    "Chinese CLIP": (ChineseCLIPVisionConfig, ChineseCLIPVisionModel),
    "CLIPSeg": (CLIPSegVisionConfig, CLIPSegVisionModel),
    "MetaCLIP 2": (MetaClip2VisionConfig, MetaClip2VisionModel),
    "TIPSv2": (Tipsv2VisionConfig, Tipsv2VisionModel),
    "YOLOS": (lambda **k: YolosConfig(**k | {"image_size": [16, 16]}), YolosModel),
    "AST": (lambda **k: ASTConfig(max_length=48, num_mel_bins=32, frequency_stride=8, time_stride=8, **k), ASTModel),
    "ViViT": (lambda **k: VivitConfig(num_frames=2, tubelet_size=[2, 8, 8], **k), VivitModel),
}
LAYERS = {"BEiT": "layers.1", "DINOv2": "encoder.layer.1"}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


INPUTS = {"AST": X.view(1, 48, 32), "ViViT": torch.stack((X, X.flip(0)), dim=1)}  # sound, video


@pytest.fixture
def make(hosts):
    def make(name="ViT", layers=2, **options):
        torch.manual_seed(0)
        config, model = MODELS[name]
        implementation = options.pop("attn_implementation", "sdpa")
        made = model._from_config(
            config(**SIZES, num_hidden_layers=layers, **options), attn_implementation=implementation
        )
        return hosts.shaken(made)

    return make


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("train", [False, True])
def test_a_step_is_as_accurate_as_transformers(hosts, make, kernels_stood_in, train, implementation):
    accelerated = hosts.assert_as_accurate(make(attn_implementation=implementation).train(train), X)
    assert not hosts.why_not(accelerated) and len(hosts.blocks_of(accelerated)) == 2
    assert kernels_stood_in["add_layer_norm_attention"] == kernels_stood_in["add_layer_norm_mlp"] == 2


@pytest.mark.parametrize("name", [name for name in MODELS if name != "ViT"])
def test_other_models_layers_are_as_accurate(hosts, make, kernels_stood_in, name):
    model = make(name, layers=1)
    if name == "MAE":  # it shuffles the patches
        model.embeddings.random_masking = types.MethodType(
            lambda self, x, noise=None: (x, None, None), model.embeddings
        )
    accelerated = hosts.assert_as_accurate(model, INPUTS.get(name, X))
    assert not hosts.why_not(accelerated) and len(hosts.blocks_of(accelerated)) == 1
    assert kernels_stood_in["add_layer_norm_attention"] == kernels_stood_in["add_layer_norm_mlp"] == 1


@pytest.mark.parametrize("name", ["ViT", "DINOv2"])
def test_kernels_are_as_accurate_as_transformers_forward(hosts, make, name):
    hosts.assert_kernels_as_accurate(make(name, layers=1), X[:1])


def test_state_calls_and_copies_stay_transformers(hosts, make):
    hosts.assert_state_is_kept(make(), X)


def test_save_pretrained_and_from_pretrained(hosts, make, kernels_stood_in, tmp_path):
    model = fastdeit.accelerate(make())
    model.save_pretrained(tmp_path)
    stock = ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert type(stock.vit.layers[0]).__module__.startswith("transformers.")
    torch.testing.assert_close(hosts.output(model, X), hosts.output(stock, X))
    again = fastdeit.accelerate(stock)
    assert torch.equal(hosts.output(again, X), hosts.output(model, X)) and not hosts.why_not(again)


@pytest.mark.parametrize("part", ["attention.k_proj", "attention.o_proj", "mlp", "mlp.activation_fn"])
def test_hooks_are_called(hosts, make, kernels_stood_in, part):
    hosts.assert_hooks_are_called(make(), f"vit.layers.1.{part}", X)


def test_attentions_and_hidden_states_are_transformers_and_layers_run_fused_again(hosts, make, kernels_stood_in):
    stock = make(attn_implementation="eager")
    model = fastdeit.accelerate(copy.deepcopy(stock))
    for options in ({"output_hidden_states": True}, {"output_attentions": True}):
        kernels_stood_in.clear()
        got, expected = model(X, **options), stock(X, **options)
        for name in ("hidden_states", "attentions"):
            assert (name in got) == (name in expected)
            if name in got:
                torch.testing.assert_close(got[name], expected[name])
        assert kernels_stood_in["add_layer_norm_attention"] == (0 if "output_attentions" in options else 2)
    assert not hosts.why_not(model)
    kernels_stood_in.clear()
    hosts.output(model, X)
    assert kernels_stood_in["add_layer_norm_attention"] == 2
    model.vit.layers[0].attention.register_forward_hook(lambda *_: None)
    assert hosts.why_not(model) == {"a hook is registered on its ViTAttention"}


def test_a_mask_runs_transformers_code(hosts, make, kernels_stood_in):
    stock = make()
    model = fastdeit.accelerate(copy.deepcopy(stock))
    mask = torch.ones(2, 5)
    mask[:, 3] = 0
    assert torch.equal(model(X, attention_mask=mask).logits, stock(X, attention_mask=mask).logits)
    assert kernels_stood_in["add_layer_norm_attention"] == 0


def test_a_causal_text_model_runs_transformers_code(hosts, kernels_stood_in):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_attention_heads=1, intermediate_size=48, num_hidden_layers=2, vocab_size=9)
    stock = hosts.shaken(CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=0, eos_token_id=8)))
    model, words = fastdeit.accelerate(copy.deepcopy(stock)), torch.tensor([[0, 3, 5, 8]])
    torch.testing.assert_close(model(words).last_hidden_state, stock(words).last_hidden_state)
    assert kernels_stood_in["add_layer_norm_attention"] == 0 and len(hosts.blocks_of(model)) == 2


def test_what_trainer_adds_to_the_call_keeps_it_fused(hosts, make, kernels_stood_in):
    model = fastdeit.accelerate(make())
    model(X, labels=torch.tensor([0, 1]), num_items_in_batch=torch.tensor(2), return_dict=True).loss.backward()
    assert kernels_stood_in["add_layer_norm_attention"] == 2


def test_the_attention_implementation_is_read_at_each_call(hosts, make, kernels_stood_in):
    model = fastdeit.accelerate(make())
    assert not hosts.why_not(model)
    model.config._attn_implementation = "flex_attention"
    (reason,) = hosts.why_not(model)
    assert "'flex_attention'" in reason
    model.config._attn_implementation = "eager"
    assert not hosts.why_not(model)


def test_an_attention_function_of_the_users_is_called(hosts, make, kernels_stood_in, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, own, calls = fastdeit.accelerate(make()), ALL_ATTENTION_FUNCTIONS["sdpa"], []
    monkeypatch.setitem(
        type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "sdpa", lambda *a, **k: calls.append(1) or own(*a, **k)
    )
    hosts.output(model, X)
    assert calls == [1, 1] and hosts.why_not(model)


def test_gradient_checkpointing_is_transformers_around_the_fused_layer(hosts, make, kernels_stood_in):
    model = make().train()
    plain = hosts.step(fastdeit.accelerate(copy.deepcopy(model)), X)
    kernels_stood_in.clear()
    model.gradient_checkpointing_enable()
    checkpointed = fastdeit.accelerate(model)
    torch.testing.assert_close(hosts.step(checkpointed, X), plain, rtol=0, atol=0)
    assert kernels_stood_in["add_layer_norm_attention"] == 4  # forward twice


def test_dropout_after_the_branches_draws_transformers_masks(hosts, make, kernels_stood_in):
    accelerated = hosts.assert_as_accurate(make(hidden_dropout_prob=0.3).train(), X)
    assert not hosts.why_not(accelerated)


def test_training_and_checkpoints_agree(hosts, make, kernels_stood_in):
    hosts.assert_training_agrees(make(), X)


@pytest.mark.one_graph
def test_it_compiles_to_one_graph(hosts, make, kernels_stood_in):
    hosts.assert_compiles_whole(make(layers=1), X, backend="eager")


@pytest.mark.parametrize("train", [False, True])
def test_it_compiles(hosts, make, kernels_stood_in, train):
    """With any version of PyTorch, in however many graphs: an exception from Dynamo would end the program."""
    torch.compiler.reset()
    model = fastdeit.accelerate(make(layers=1)).train(train)
    compiled = hosts.step(model, X, torch.compile(model, backend="eager"))
    torch.testing.assert_close(compiled, hosts.step(fastdeit.restore(copy.deepcopy(model)), X))
    torch.compiler.reset()


@pytest.mark.one_graph
def test_a_layer_compiled_without_its_model(hosts, make, kernels_stood_in):
    """Whether transformers collects outputs is read from a context, which Dynamo cannot trace."""
    torch.compiler.reset()
    model, tokens = fastdeit.accelerate(make(layers=1, attn_implementation="eager")), torch.randn(2, 5, 32)
    layer = model.vit.layers[0]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), layer(tokens))
    model(X, output_attentions=True)  # leaves its hooks, which Dynamo does not guard
    torch.compiler.reset()
    kernels_stood_in.clear()
    broken = torch.compile(layer, backend="eager")
    torch.testing.assert_close(broken(tokens), fastdeit.restore(copy.deepcopy(layer))(tokens))
    assert not kernels_stood_in["add_layer_norm_attention"]
    torch.compiler.reset()


def test_autocast_is_as_accurate(hosts, make, kernels_stood_in):
    def under_autocast(model):
        def forward(x):
            with torch.autocast("cpu", torch.bfloat16):
                return hosts.output(model, x).float()

        return forward

    stock = make(layers=1)
    accelerated = fastdeit.accelerate(copy.deepcopy(stock))
    got, eager = (hosts.step(m, X, under_autocast(m)) for m in (accelerated, stock))
    exact = hosts.step(copy.deepcopy(stock).double(), X.double())
    for names in (("output",), tuple(eager.keys() - {"output"})):
        fastdeit.testing.assert_model_close_to_oracle(*({n: r[n] for n in names} for r in (got, exact, eager)))
    assert kernels_stood_in["add_layer_norm_attention"] == 1


CHANGES = {
    "dropout is active": lambda layer: setattr(layer.attention, "attention_dropout", 0.1),
    "its logits are scaled by 1.0": lambda layer: setattr(layer.attention, "scaling", 1.0),
    "its attention is causal": lambda layer: setattr(layer.attention, "is_causal", True),
    "the activation is Tanh()": lambda layer: setattr(layer.mlp, "activation_fn", nn.Tanh()),
    "a Identity is called": lambda layer: setattr(layer, "mlp", nn.Identity()),
    "this version of transformers keeps its parts elsewhere: 'o_proj'": lambda layer: delattr(
        layer.attention, "o_proj"
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_is_not_standard_is_left_alone(hosts, make, kernels_stood_in, reason):
    model = fastdeit.accelerate(make(layers=1)).train()
    assert not hosts.why_not(model)
    CHANGES[reason](model.vit.layers[0])
    assert hosts.why_not(model) == {reason}


@pytest.mark.parametrize("kind", ["stand-in", "PEFT", "torchao"])
def test_adapters_and_quantized_weights_leave_layers_fused(hosts, make, kernels_stood_in, kind):
    """The kernel runs between calls of the projections, and so does all around."""
    model = hosts.assert_adapters_act(make(), kind, X, "q_proj", "v_proj")
    assert kernels_stood_in["attention_qkv"] == 2 and kernels_stood_in["add_layer_norm_mlp"] == 2
    (note,) = hosts.notes(model)
    assert note.startswith("its projections are called: a ")


def test_adapters_of_an_mlp_leave_its_attention_fused(hosts, make, kernels_stood_in):
    hosts.assert_adapters_act(make(), "stand-in", X, "fc1", "o_proj")
    assert kernels_stood_in["attention_qkv"] == 2 and kernels_stood_in["add_layer_norm_mlp"] == 0


def test_a_projection_that_gives_another_dtype_is_pytorchs_to_judge(hosts, make, kernels_stood_in):
    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x).half()

    model = fastdeit.accelerate(make(layers=1))
    model.vit.layers[0].attention.k_proj.__class__ = Halved
    with pytest.raises(RuntimeError, match="same dtype"):
        hosts.output(model, X)
    assert kernels_stood_in["attention_qkv"] == 0


@pytest.mark.parametrize("part", ["", ".attention", ".mlp", ".mlp.activation_fn"])
def test_a_replaced_forward_of_transformers_classes_is_noticed(hosts, make, kernels_stood_in, monkeypatch, part):
    model = fastdeit.accelerate(make(layers=1))
    assert not hosts.why_not(model)
    kind = type(model.get_submodule("vit.layers.0" + part))
    kind = getattr(kind, "source", kind)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: own(self, *args, **kwargs))
    assert len(hosts.why_not(model)) == 1


CHANGES_OF_BEIT = {
    "its attention adds a relative position bias": lambda layer: setattr(
        layer, "relative_position_bias", nn.Identity()
    ),
    "its branches are scaled by 0.5": lambda layer: delattr(layer, "lambda_2") or setattr(layer, "lambda_2", 0.5),
    "its drop path is a Other": lambda layer: setattr(
        layer.drop_path, "__class__", type("Other", (type(layer.drop_path),), {})
    ),
}


@pytest.mark.parametrize("reason", CHANGES_OF_BEIT)
def test_a_layer_of_beit_that_is_not_standard_is_left_alone(hosts, make, kernels_stood_in, reason):
    model = fastdeit.accelerate(make("BEiT", drop_path_rate=0.2))
    assert not hosts.why_not(model)  # stochastic depth does nothing in evaluation
    layer = model.beit.layers[1].train()
    layer.drop_path.drop_prob = 0.0
    assert not hosts.why_not(model)
    CHANGES_OF_BEIT[reason](layer)
    assert hosts.why_not(model) == {reason}


@pytest.mark.parametrize("kind", ["BEiT", "DINOv2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stochastic_depth_draws_transformers_masks(hosts, make, kernels_stood_in, kind, dtype):
    stock = make(kind, drop_path_rate=0.4).to(dtype).train()
    accelerated, results, x = fastdeit.accelerate(copy.deepcopy(stock)), [], torch.randn(64, 5, 32, dtype=dtype)
    assert not hosts.why_not(accelerated)
    for model in (accelerated, stock):
        torch.manual_seed(3)
        results.append((model.base_model.get_submodule(LAYERS[kind])(x) - x, torch.get_rng_state()))
    (got, state), (expected, expected_state) = results
    assert torch.equal(state, expected_state) and kernels_stood_in["add_layer_norm_attention"] == 1
    dropped = (expected == 0).flatten(1).all(1)  # both branches
    assert 0 < dropped.sum() < 64 and torch.equal((got == 0).flatten(1).all(1), dropped)
    if dtype is torch.float32:
        torch.testing.assert_close(got, expected)


def test_stochastic_depth_that_draws_otherwise_is_its_own():
    class Drops(nn.Module):
        def __init__(self, drop_prob):
            super().__init__()
            self.drop_prob = drop_prob

        def forward(self, x):
            return x / (1 - self.drop_prob) * (torch.rand(len(x), 1, 1) >= self.drop_prob)

    register_drop_path(Drops)
    assert Drops not in DROP_PATHS and len(DROP_PATHS) > 1


def test_beit_with_its_relative_position_bias_is_transformers(hosts, make, kernels_stood_in):
    stock = make("BEiT", use_relative_position_bias=True, layers=1)
    model = fastdeit.accelerate(copy.deepcopy(stock))
    assert torch.equal(hosts.output(model, X), hosts.output(stock, X)) and not kernels_stood_in["attention"]


def test_a_wrapped_timm_model_is_fused(hosts, kernels_stood_in):
    sizes = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=1)
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=5, model_args=sizes)
    stock = hosts.shaken(TimmWrapperForImageClassification(config))
    model = fastdeit.accelerate(copy.deepcopy(stock))
    torch.testing.assert_close(hosts.step(model, X), hosts.step(stock, X))
    assert kernels_stood_in["add_layer_norm_attention"] == kernels_stood_in["patch_embedding"] == 1


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_with_accumulation(make, kernels_stood_in, tmp_path, bf16):
    """Losses and gradient norms of updates from two batches each, in bfloat16 within its rounding."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    data = [{"pixel_values": image, "labels": n % 2} for n, image in enumerate(X.repeat(4, 1, 1, 1))]
    logs = []
    for accelerated in (False, True):
        model = make(layers=1)
        options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, logging_steps=1)
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, bf16=bf16, report_to="none", save_strategy="no", disable_tqdm=True, **options
        )
        model = fastdeit.accelerate(model) if accelerated else model
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        logs.append([(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row])
    assert len(logs[0]) == 3 and kernels_stood_in["add_layer_norm_attention"] == 6
    for stock, ours in zip(*logs, strict=True):
        assert ours == pytest.approx(stock, rel=0.02 if bf16 else 1e-4)


def test_a_bias_that_is_missing_counts_as_zero(hosts, make, kernels_stood_in):
    model = make(layers=1)
    model.vit.layers[0].attention.k_proj.bias = None
    accelerated = hosts.assert_as_accurate(model, X)
    assert not hosts.why_not(accelerated)


def test_a_version_without_the_class_has_a_reason(make, monkeypatch):
    name = "transformers.models.vit.modeling_vit"
    monkeypatch.setitem(known_hosts._HOSTS, name, ("fastdeit.nn.huggingface", ("ViTBlock", "ViTLayer")))
    monkeypatch.setattr(known_hosts, "_unusable", {})
    monkeypatch.setattr(
        known_hosts,
        "FUSED_CLASSES",
        {source: twin for source, twin in known_hosts.FUSED_CLASSES.items() if source.__module__ != name},
    )
    rows = fastdeit.explain(make()).as_dict()
    for name, kind in (("vit.embeddings", "ViTEmbeddings"), ("vit.layers.0", "ViTLayer")):
        assert rows[name]["reason"].startswith(f"no fused class for {kind}: this version of transformers")


def test_a_class_that_is_not_known_is_no_attribute():
    with pytest.raises(AttributeError, match="BertLayer"):
        huggingface.BertLayer  # noqa: B018
