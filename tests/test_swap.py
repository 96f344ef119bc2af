"""accelerate, restore: which classes they swap, and what they refuse."""

import copy
import functools
import warnings

import pytest
import timm
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn
from torch.nn.utils import parametrizations

import fastdeit
from fastdeit.nn import FUSED_CLASSES, Attention, Block, LayerNorm, Mlp, TorchLayerNorm
from fastdeit.testing import kernel_device


def tiny(**kwargs):
    return timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, num_classes=3, **kwargs)


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


class AttentionOfMyOwn(TimmAttention):
    pass


def test_every_module_of_a_known_class_gets_its_twin_and_nothing_else_changes():
    model = tiny()
    before = classes(model)
    assert fastdeit.accelerate(model) is model
    assert classes(model) == {name: FUSED_CLASSES.get(cls, cls) for name, cls in before.items()}
    assert {type(m) for m in model.blocks.modules()} >= {Block, Attention, Mlp, LayerNorm}


def test_accelerating_twice_is_accelerating_once():
    model = fastdeit.accelerate(tiny())
    once = classes(model)
    assert classes(fastdeit.accelerate(model)) == once


def test_restore_gives_timm_its_classes_again():
    model = tiny(norm_layer=nn.LayerNorm)
    before = classes(model)
    assert fastdeit.restore(model) is model
    assert classes(model) == before
    fastdeit.accelerate(model)
    assert type(model.norm) is TorchLayerNorm
    assert classes(fastdeit.restore(model)) == before


def test_a_module_by_itself_can_be_swapped():
    norm = fastdeit.accelerate(nn.LayerNorm(8))
    assert type(norm) is TorchLayerNorm
    assert type(fastdeit.restore(norm)) is nn.LayerNorm


def test_drop_ins_made_directly_have_timms_signature_and_state():
    for fused, args in ((Attention, (32, 2)), (Mlp, (32, 64)), (LayerNorm, (32,)), (Block, (32, 2))):
        (timms,) = (source for source, twin in FUSED_CLASSES.items() if twin is fused)
        made, expected = fused(*args), timms(*args)
        assert made.state_dict().keys() == expected.state_dict().keys()
        assert vars(made).keys() == vars(expected).keys()


@pytest.mark.parametrize("exclude", [["blocks.1"], ("blocks.1", "blocks.1.*"), "blocks.1", ["*.1"]])
def test_excluded_modules_and_what_is_inside_them_stay_timms(exclude):
    model = fastdeit.accelerate(tiny(), exclude=exclude)
    assert type(model.blocks[0]) is Block
    assert not set(map(type, model.blocks[1].modules())) & set(FUSED_CLASSES.values())


def test_an_excluded_name_is_no_prefix_of_others_and_the_empty_one_is_the_model():
    norms = nn.Sequential(*(nn.LayerNorm(4) for _ in range(11)))
    fastdeit.accelerate(norms, exclude="1")
    assert [name for name, norm in norms.named_children() if type(norm) is nn.LayerNorm] == ["1"]
    fastdeit.accelerate(norms, exclude="")
    assert {type(norm) for norm in norms} == {nn.LayerNorm}


def test_excluding_from_an_accelerated_model_restores_those_modules():
    model = fastdeit.accelerate(fastdeit.accelerate(tiny()), exclude=["blocks.*.attn"])
    assert type(model.blocks[0].attn) is TimmAttention
    assert type(model.blocks[0]) is Block


@pytest.mark.parametrize("excluded", ["patch_embed*", "patch_embed", "patch_embed.proj"])
def test_an_excluded_embedding_is_timms(kernels_stood_in, excluded):
    model = fastdeit.accelerate(tiny(), exclude=excluded)
    assert fastdeit.explain(model).as_dict()["patch_embed.proj"]["reason"] == "excluded"
    model(torch.randn(1, 3, 32, 32))
    assert not kernels_stood_in["patch_embedding"]
    assert kernels_stood_in["add_layer_norm_mlp"] == 2  # the blocks are not excluded
    fastdeit.accelerate(model)(torch.randn(1, 3, 32, 32))
    assert kernels_stood_in["patch_embedding"] == 1


@pytest.mark.parametrize(
    "excluded, around, op",
    [
        ("blocks.1.attn.qkv", "blocks.1.attn", "add_layer_norm_attention"),
        ("blocks.1.mlp.act", "blocks.1.mlp", "add_layer_norm_mlp"),
        ("blocks.1.ls1", "blocks.1", "add_layer_norm_mlp"),
    ],
)
def test_nothing_computes_in_the_place_of_an_excluded_part(kernels_stood_in, excluded, around, op):
    model = fastdeit.accelerate(tiny(init_values=0.1), exclude=excluded).eval()
    rows = fastdeit.explain(model).as_dict()
    assert rows[around]["reason"] == f"its {type(model.get_submodule(excluded)).__name__} is excluded"
    model(torch.randn(1, 3, 32, 32))
    assert kernels_stood_in[op] == 1  # in the other block


def test_what_is_excluded_stays_so_in_a_copy_and_leaves_nothing_behind():
    model = tiny()
    before = [set(vars(module)) for module in model.modules()]
    fastdeit.accelerate(model, exclude=["patch_embed", "blocks.0"])
    assert fastdeit.explain(copy.deepcopy(model)).as_dict() == fastdeit.explain(model).as_dict()
    assert fastdeit.explain(model).as_dict()["blocks.0.attn"]["reason"] == "excluded"
    assert [set(vars(module)) for module in fastdeit.restore(model).modules()] == before


def test_an_exclude_pattern_without_a_match_is_named():
    model = tiny()
    before = classes(model)
    with pytest.raises(ValueError, match=r"exclude: no module of the model matches 'block\.0'"):
        fastdeit.accelerate(model, exclude=["blocks.0", "block.0"])
    assert classes(model) == before


@pytest.mark.parametrize("exclude", [3, [nn.LayerNorm], None, ["blocks.0", 1]])
def test_an_exclusion_that_is_no_text_is_refused(exclude):
    with pytest.raises(TypeError, match="exclude: expected names of modules or patterns of them, got"):
        fastdeit.accelerate(tiny(), exclude=exclude)


@pytest.mark.parametrize("function", [fastdeit.accelerate, fastdeit.restore, fastdeit.explain])
@pytest.mark.parametrize("given", [None, {}, nn.LayerNorm, torch.zeros(2)])
def test_what_is_no_module_is_refused(function, given):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got"):
        function(given)


def test_a_scripted_model_is_refused():
    with pytest.raises(TypeError, match="scripted"):
        fastdeit.accelerate(torch.jit.script(nn.LayerNorm(4)))


def test_classes_that_someone_wrote_are_left_alone():
    class Local(TimmBlock):
        pass

    model = nn.Sequential(AttentionOfMyOwn(32, 2), Local(32, 2), LayerNorm2d(32))
    fastdeit.accelerate(model)
    assert [type(m) for m in model] == [AttentionOfMyOwn, Local, LayerNorm2d]
    assert type(model[1].attn) is Attention  # the standard children of a custom block are still swapped


@pytest.mark.parametrize("accelerated_first", [True, False])
@pytest.mark.parametrize("function", [fastdeit.accelerate, fastdeit.restore])
def test_a_parametrized_module_is_refused_before_anything_is_swapped(function, accelerated_first):
    model = tiny()
    if accelerated_first:
        fastdeit.accelerate(model)
    parametrizations.weight_norm(model.blocks[1].norm1, dim=None)
    before = classes(model)
    with pytest.raises(
        RuntimeError, match=r"blocks\.1\.norm1 is a ParametrizedLayerNorm, derived from LayerNorm at run"
    ):
        function(model)
    assert classes(model) == before


@pytest.fixture
def one_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_blocks_run_as_before_and_are_refused(one_process_group):
    from torch.distributed.fsdp import fully_shard

    for model in (tiny().eval(), fastdeit.accelerate(tiny().eval())):
        x = torch.randn(1, 3, 32, 32)
        expected = model(x)
        fully_shard(model.blocks[1], mesh=one_process_group)
        assert torch.equal(model(x), expected)
        weights = list(model.parameters())
        fastdeit.explain(model)
        assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
        before = classes(model)
        for function in (fastdeit.accelerate, fastdeit.restore):
            with pytest.raises(
                RuntimeError, match=r"blocks\.1 is a FSDPBlock, derived from Block at run time \(fully_shard"
            ):
                function(model)
        assert classes(model) == before


def test_a_swap_after_compiling_is_seen_both_ways(kernels_stood_in):
    model = tiny().eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for _ in range(2):
            fastdeit.restore(model)
            kernels_stood_in.clear()
            compiled(x)
            assert not kernels_stood_in
            fastdeit.accelerate(model)
            compiled(x)
            assert kernels_stood_in["add_layer_norm_attention"] > 0  # counted while Dynamo traces


def test_compiled_code_is_dropped_where_a_class_changes_and_kept_where_none_does(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    model = tiny()
    for function in (fastdeit.accelerate, fastdeit.restore):
        resets.clear()
        function(model)
        assert len(resets) == 1
        function(model)
        assert len(resets) == 1


@pytest.mark.parametrize("change", [dict(exclude="blocks.*.attn.qkv"), dict(memory="lean")])
def test_options_that_change_no_class_are_seen_after_compiling(kernels_stood_in, change):
    model = fastdeit.accelerate(tiny().eval())
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        compiled(x)
        fastdeit.accelerate(model, **change)
        kernels_stood_in.clear()
        compiled(x)
    assert kernels_stood_in["add_layer_norm_mlp"] > 0  # counted while Dynamo traces
    assert (kernels_stood_in["add_layer_norm_attention"] > 0) == ("memory" in change)


def test_scripting_names_restore():
    model = fastdeit.accelerate(tiny())
    with pytest.raises(RuntimeError, match=r"fastdeit\.restore\(model\)"):
        torch.jit.script(model)
    torch.jit.script(fastdeit.restore(model))


def test_memory_is_the_blocks_and_restore_leaves_nothing_of_it():
    model = fastdeit.accelerate(tiny(), memory="lean", exclude="blocks.1")
    assert [block.__dict__.get("memory") for block in model.blocks] == ["lean", None]
    assert copy.deepcopy(model).blocks[0].memory == "lean"
    fastdeit.accelerate(model)
    assert not any("memory" in block.__dict__ for block in model.blocks)
    fastdeit.restore(fastdeit.accelerate(model, memory="lean"))
    assert not any("memory" in block.__dict__ for block in model.blocks)
    fastdeit.accelerate(fastdeit.accelerate(model, memory="lean"), exclude="blocks.1")
    assert not any("memory" in block.__dict__ for block in model.blocks)


def test_another_memory_is_refused_before_any_swap():
    model = tiny()
    before = classes(model)
    with pytest.raises(ValueError, match="memory: expected one of usual, lean, got 'least'"):
        fastdeit.accelerate(model, memory="least")
    assert classes(model) == before


def test_a_lean_model_gives_the_usual_ones_bits():
    results = []
    for memory in ("usual", "lean"):
        torch.manual_seed(0)
        device = kernel_device()
        model = fastdeit.accelerate(tiny(embed_dim=64, num_heads=2), memory=memory).to(device)
        with fastdeit.use_backend("triton"), torch.autocast(device.type, torch.bfloat16):
            model(torch.randn(1, 3, 32, 32, device=device)).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def wrapped(module):
    """What Hugging Face Accelerate's `prepare` and `add_hook_to_module` leave: a forward that calls the one it found."""
    kept = module.forward

    def new_forward(module, *args, **kwargs):
        return kept(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), kept)


@pytest.mark.parametrize("name", ["", "blocks.0", "blocks.0.attn", "blocks.0.mlp", "norm", "blocks.0.norm1"])
def test_a_bound_forward_that_was_kept_works_after_restore(kernels_stood_in, name):
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    fastdeit.accelerate(model)
    wrapped(model.get_submodule(name))
    torch.testing.assert_close(model(x), expected)
    assert kernels_stood_in
    fastdeit.restore(model)
    kernels_stood_in.clear()
    assert torch.equal(model(x), expected) and not kernels_stood_in


@pytest.mark.parametrize("name", ["blocks.0", "blocks.0.attn", "blocks.0.attn.qkv", "norm"])
def test_the_classs_own_forward_on_an_instance_is_no_other(kernels_stood_in, name):
    """transformers 4 leaves one on each module that it collected an output from. A swap takes it away: it is the former class's."""
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    x, module = torch.randn(1, 3, 32, 32), model.get_submodule(name)
    expected = model(x)
    for swap in (fastdeit.accelerate, fastdeit.restore):
        module.forward = module.forward
        swap(model)
        kernels_stood_in.clear()
        torch.testing.assert_close(model(x), expected)
        assert kernels_stood_in["add_layer_norm_attention"] == (swap is fastdeit.accelerate)
    fastdeit.accelerate(model)
    module.forward = module.forward
    assert all(row.fused for row in fastdeit.explain(model) if row.name.startswith("blocks"))


def test_a_wrapper_around_the_models_forward_leaves_the_residual_carried_through(kernels_stood_in):
    model = fastdeit.accelerate(timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, num_classes=3)).eval()
    wrapped(model)
    assert fastdeit.explain(model).rows[0].fused is True
    model(torch.randn(1, 3, 32, 32))
    assert kernels_stood_in["add_layer_norm_attention"] == 2  # the last block runs for the prefix alone
    for other in (lambda x: x, copy.deepcopy(model).forward):
        model.forward = other
        assert fastdeit.explain(model).rows[0].reason == "it has a forward of its own"


def test_a_model_of_which_only_norms_are_fused_gets_a_warning():
    def model():
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))

    with pytest.warns(UserWarning, match=r"of this Sequential, only LayerNorms are fused.*docs/hosts\.md"):
        fastdeit.accelerate(model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdeit.accelerate(nn.LayerNorm(8))
        fastdeit.accelerate(nn.Linear(8, 8))
        fastdeit.accelerate(timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1))
        fastdeit.accelerate(model(), exclude=["0"])
