"""explain: what it lists, and that it cannot disagree with what runs."""

import pytest
import timm
import torch
from torch import nn

import fastdeit
from fastdeit.explanation import Report, Row


def tiny(**kwargs):
    return timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, num_classes=3, **kwargs)


def test_it_lists_every_module_that_does_work_once():
    report = fastdeit.explain(fastdeit.accelerate(tiny()))
    blocks = [f"blocks.{i}{part}" for i in range(3) for part in ("", ".norm1", ".attn", ".norm2", ".mlp")]
    assert [row.name for row in report] == ["", "patch_embed.proj", *blocks, "norm", "head"]
    assert len(report) == len(report.rows)
    kinds = {row.kind for row in report}
    assert kinds == {"VisionTransformer", "Conv2d", "Block", "LayerNorm", "Attention", "Mlp", "Linear"}


def test_each_row_says_why_not():
    model = tiny()
    assert {row.reason for row in fastdeit.explain(model) if row.kind == "Block"} == {"not accelerated"}
    assert all(bool(row.reason) is not row.fused for row in fastdeit.explain(model))
    fastdeit.accelerate(model)
    rows = fastdeit.explain(model).as_dict()
    assert rows["blocks.0"] == {"kind": "Block", "fused": False, "reason": "tensors on cpu"}
    assert rows["head"]["reason"] == "no fused class for Linear"


def test_it_says_what_would_run_here_and_now(kernels_stood_in):
    model = fastdeit.accelerate(tiny(attn_drop_rate=0.1)).eval()
    assert fastdeit.explain(model).as_dict()["blocks.1.attn"]["fused"]
    assert fastdeit.explain(model.train()).as_dict()["blocks.1.attn"]["reason"] == "dropout is active"
    handle = model.blocks[1].mlp.register_forward_hook(lambda *_: None)
    assert fastdeit.explain(model).as_dict()["blocks.1"]["fused"]  # it calls its MLP
    handle.remove()
    model.blocks[1].mlp.act.register_forward_hook(lambda *_: None)
    assert fastdeit.explain(model).as_dict()["blocks.1.mlp"]["reason"] == "a hook is registered on its GELU"
    model.blocks[2].forward = lambda x: x
    assert fastdeit.explain(model).as_dict()["blocks.2"]["reason"] == "it has a forward of its own"


def test_it_agrees_with_what_runs(kernels_stood_in):
    model = fastdeit.accelerate(tiny(), exclude=["blocks.1"]).eval()
    model.blocks[2].attn.qkv.register_forward_hook(lambda *_: None)
    rows = fastdeit.explain(model)
    model(torch.randn(1, 3, 32, 32))
    fused = [row.kind for row in rows if row.fused]
    assert fused.count("Attention") == kernels_stood_in["add_layer_norm_attention"] == 1
    assert fused.count("Mlp") == fused.count("Block") == kernels_stood_in["add_layer_norm_mlp"] == 2


def test_the_backend_that_cannot_run_is_a_reason():
    module = fastdeit.accelerate(nn.LayerNorm(4)).double()
    with fastdeit.use_backend("triton"):
        (row,) = fastdeit.explain(module)
    assert not row.fused and "float64" in row.reason


def test_derived_classes_are_named():
    class Mine(timm.layers.Attention):
        pass

    (row,) = fastdeit.explain(fastdeit.accelerate(Mine(8, 2)))
    assert row == ("", "Mine", False, "a class derived from Attention, with a forward of its own")


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_models_without_memory_or_parameters_can_be_explained(device):
    with torch.device(device):
        report = fastdeit.explain(
            fastdeit.accelerate(nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.ReLU()))
        )
    assert [row.name for row in report] == ["0"]
    model = fastdeit.accelerate(tiny().to(device))
    assert fastdeit.explain(model).as_dict()["norm"]["reason"] == f"tensors on {device}"


def test_a_model_without_memory_is_judged_under_autocast():
    with torch.device("meta"):
        model = fastdeit.accelerate(tiny())
    ieee = "float32 matrix products run on the libraries unless TF32 is allowed"
    assert fastdeit.explain(model, on_gpu=True).as_dict()["blocks.0.attn"]["reason"] == ieee
    with torch.autocast("cpu", torch.bfloat16):
        assert fastdeit.explain(model, on_gpu=True).as_dict()["blocks.0.attn"]["fused"]


def test_the_table_joins_modules_that_fare_the_same():
    rows = [Row(f"blocks.{i}.attn", "Attention", i != 1, "" if i != 1 else "a mask") for i in range(5)]
    table = str(Report([Row("", "VisionTransformer", False, "no"), *rows, Row("norm", "LayerNorm", True, "")]))
    assert table.splitlines() == [
        "module             kind               runs   reason",
        "-----------------  -----------------  -----  ------",
        "(the model)        VisionTransformer  stock  no",
        "blocks.0,2-4.attn  Attention          fused",
        "blocks.1.attn      Attention          stock  a mask",
        "norm               LayerNorm          fused",
        "5 of 7 modules run fused",
    ]


def test_only_the_innermost_index_is_joined():
    rows = [Row(f"layers.{i}.blocks.{j}", "Block", True, "") for i in range(2) for j in range(2)]
    assert [line.split()[0] for line in str(Report(rows)).splitlines()[2:4]] == [
        "layers.0.blocks.0-1",
        "layers.1.blocks.0-1",
    ]


def test_an_index_at_the_end_of_a_name_is_joined_too():
    """torchvision's layers are encoder_layer_0, encoder_layer_1, ..., each with ln_1 and ln_2."""
    layers = {f"encoder_layer_{i}": nn.ModuleDict({"ln_1": nn.LayerNorm(8), "ln_2": nn.LayerNorm(8)}) for i in range(3)}
    report = fastdeit.explain(nn.ModuleDict({"layers": nn.ModuleDict(layers), "norm_9": nn.LayerNorm(8)}))
    names = [row[0] for row in report.cells()[1:]]
    assert names == ["layers.encoder_layer_0-2.ln_1", "layers.encoder_layer_0-2.ln_2", "norm_9"]


def test_a_model_of_which_only_norms_matched_is_told_so_once():
    model = fastdeit.accelerate(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4)))
    assert str(fastdeit.explain(model)).count("only LayerNorms were matched") == 1
    assert "only LayerNorms" not in str(fastdeit.explain(fastdeit.accelerate(tiny())))
    assert "only LayerNorms" not in str(fastdeit.explain(nn.Linear(2, 2)))
