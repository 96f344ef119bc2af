"""What a fused forward would skip makes it step aside: the fused path is forced on the CPU, ops running their references."""

import functools
import warnings

import pytest
import timm
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import DropPath, LayerScale
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn
from torch.nn.modules import module as torch_module

import fastdeit
from fastdeit import backends
from fastdeit.nn import Attention, Block

CHILDREN = (
    "norm1",
    "attn",
    "attn.qkv",
    "attn.q_norm",
    "attn.attn_drop",
    "attn.norm",
    "attn.proj",
    "attn.proj_drop",
    "ls1",
    "drop_path1",
    "norm2",
    "mlp",
    "mlp.fc1",
    "mlp.act",
    "mlp.drop1",
    "mlp.fc2",
    "mlp.drop2",
    "ls2",
    "drop_path2",
)


def block(cls=Block, **kwargs):
    torch.manual_seed(0)
    return cls(32, 2, qkv_bias=True, init_values=0.1, drop_path=0.1, **kwargs).eval()


def tokens(**kwargs):
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), **kwargs)


def register(kind, module, calls):
    """Registers a hook of the given kind on module, or on all modules for None, that counts its calls."""

    def hook(*_):
        calls.append(kind)

    owner = torch_module if module is None else module
    name = {True: "register_module_", False: "register_"}[module is None]
    return {
        "forward pre": lambda: getattr(owner, name + "forward_pre_hook")(hook),
        "forward pre with kwargs": lambda: module.register_forward_pre_hook(hook, with_kwargs=True),
        "forward": lambda: getattr(owner, name + "forward_hook")(hook),
        "forward with kwargs": lambda: module.register_forward_hook(hook, with_kwargs=True),
        "forward always": lambda: module.register_forward_hook(hook, always_call=True),
        "backward pre": lambda: getattr(owner, name + "full_backward_pre_hook")(hook),
        "backward": lambda: getattr(owner, name + "full_backward_hook")(hook),
        "backward, not full": lambda: getattr(owner, name + "backward_hook")(hook),
    }[kind]()


HOOKS = ("forward pre", "forward pre with kwargs", "forward", "forward with kwargs", "forward always")
HOOKS += ("backward pre", "backward", "backward, not full")
GLOBAL_HOOKS = ("forward pre", "forward", "backward pre", "backward")


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_any_child_fires_once_per_pass(kernels_stood_in, kind):
    module = block()
    for name in CHILDREN:
        calls = []
        handle = register(kind, module.get_submodule(name), calls)
        module.attn.fused_attn = name != "attn.attn_drop"  # timm calls it only then
        module(tokens(requires_grad=True)).sum().backward()
        handle.remove()
        assert calls == [kind], f"{kind} hook on {name}"
    kernels_stood_in.clear()
    module(tokens())
    assert kernels_stood_in == {"add_layer_norm_attention": 1, "add_layer_norm_mlp": 1}  # hooks gone: fused again


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_a_hook_on_all_modules_fires_as_often_as_under_timm(kernels_stood_in, kind):
    counts = []
    for cls in (Block, TimmBlock):
        calls = []
        module = block(cls)
        handle = register(kind, None, calls)
        try:
            module(tokens(requires_grad=True)).sum().backward()
        finally:
            handle.remove()
        counts.append(len(calls))
    assert counts[0] == counts[1] > len(CHILDREN)


@pytest.mark.parametrize("child", ["attn", "norm2", "ls1", "attn.attn_drop", "mlp.act"])
def test_what_a_hook_returns_is_used(kernels_stood_in, child):
    results = []
    for cls in (Block, TimmBlock):
        module = block(cls)
        module.attn.fused_attn = False
        module.get_submodule(child).register_forward_hook(lambda m, args, out: 2 * out)
        results.append(module(tokens()))
    torch.testing.assert_close(*results)


def test_the_fused_children_of_a_block_that_steps_aside_stay_fused(kernels_stood_in):
    module = block()
    module.ls1.register_forward_hook(lambda *_: None)
    assert module.why_not_fused(tokens()) == "a hook is registered on its LayerScale"
    module(tokens())
    assert kernels_stood_in == {"layer_norm": 2, "attention": 1, "mlp": 1}


def said(module) -> str | None:
    """Why it steps aside, or what of it is called."""
    reason = module.why_not_fused(tokens())
    return module.note() if reason is None and hasattr(module, "note") else reason


@pytest.fixture
def recorder() -> type[torch.Tensor]:
    """A class of tensors that notes in `seen` which functions are called with them."""

    class Recorder(torch.Tensor):
        seen = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    return Recorder


class LoraLinear(nn.Linear):
    """The shape of low-rank adapters: a subclass that adds its own product."""

    def __init__(self, base, rank=2):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down, self.up = nn.Linear(base.in_features, rank), nn.Linear(rank, base.out_features)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_low_rank_adapter_still_acts(kernels_stood_in, name):
    module, expected = block(), block(TimmBlock)
    parent, child = name.split(".")
    lora = LoraLinear(expected.get_submodule(name))
    for m in (module, expected):
        setattr(m.get_submodule(parent), child, lora)
    torch.testing.assert_close(module(tokens()), expected(tokens()))
    called = "its projections are called: " if parent == "attn" else ""
    assert said(module.get_submodule(parent)) == f"{called}a projection is a LoraLinear"
    assert kernels_stood_in["attention"] == (parent == "attn")  # the kernel runs between them


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj"])
def test_an_adapters_gradients_are_timms(kernels_stood_in, name):
    parent, child = name.split(".")
    gradients = []
    for cls in (Block, TimmBlock):
        module = block(cls).requires_grad_(False)
        torch.manual_seed(5)
        lora = LoraLinear(module.get_submodule(name)).requires_grad_(False)
        for part in (lora.down, lora.up):
            part.requires_grad_()
        setattr(module.get_submodule(parent), child, lora)
        x = tokens(requires_grad=True)
        module(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in lora.parameters() if p.requires_grad)])
        assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
    assert len(gradients[0]) == 5 and kernels_stood_in["attention"] == 1
    torch.testing.assert_close(*gradients)


def test_what_a_called_projection_gives_of_another_class_is_pytorchs(kernels_stood_in, recorder):
    class Tagging(nn.Linear):
        def forward(self, x):
            return super().forward(x).as_subclass(recorder)

    module, expected = block(), block(TimmBlock)
    for m in (module, expected):
        m.attn.qkv.__class__ = Tagging
    torch.testing.assert_close(module(tokens()).as_subclass(torch.Tensor), expected(tokens()).as_subclass(torch.Tensor))
    assert nn.functional.scaled_dot_product_attention in recorder.seen and not kernels_stood_in["attention"]


class ScaledTensor(torch.Tensor):
    """A weight that means twice its values, as a quantized one means its values times a scale."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = torch.utils._pytree.tree_map_only(
                cls, lambda t: 2 * t.as_subclass(torch.Tensor), (args, kwargs or {})
            )
            return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("weight", ["weight", "bias"])
def test_a_tensor_subclass_as_weight_still_acts(kernels_stood_in, name, weight):
    module, expected = block(), block(TimmBlock)
    for m in (module, expected):
        owner = m.get_submodule(name)
        subclass = torch.Tensor._make_subclass(ScaledTensor, getattr(owner, weight).detach() + 0.1)
        owner._parameters[weight] = subclass
    torch.testing.assert_close(module(tokens()), expected(tokens()))
    asked = module.get_submodule(name if "norm" in name else name.split(".")[0])
    assert said(asked).removeprefix("its projections are called: ") == "a weight is a ScaledTensor"


def test_a_tensor_subclass_as_input_sees_timms_operations(kernels_stood_in, recorder):
    block()(tokens().as_subclass(recorder))
    assert nn.functional.layer_norm in recorder.seen and nn.functional.scaled_dot_product_attention in recorder.seen
    assert not kernels_stood_in


@pytest.mark.parametrize("name", ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("weight", ["weight", "bias"])
def test_a_weight_that_became_a_buffer_or_an_attribute_still_acts(kernels_stood_in, name, weight):
    for put in (nn.Module.register_buffer, setattr):
        module, expected = block(), block(TimmBlock)
        for m in (module, expected):
            owner = m.get_submodule(name)
            tensor = getattr(owner, weight).detach() + 0.1
            delattr(owner, weight)
            put(owner, weight, tensor)
        torch.testing.assert_close(module(tokens()), expected(tokens()))
        asked = module.get_submodule(name if "norm" in name else name.split(".")[0])
        assert (
            said(asked).removeprefix("its projections are called: ") == "a weight is not among its module's parameters"
        )


def test_a_parametrized_weight_still_acts(kernels_stood_in):
    module, expected = block(), block(TimmBlock)
    for m in (module, expected):
        torch.nn.utils.parametrizations.weight_norm(m.attn.qkv)
        m.attn.qkv.parametrizations.weight.original0.data.mul_(3)
    torch.testing.assert_close(module(tokens()), expected(tokens()))


@pytest.mark.parametrize("name", ["attn", "attn.qkv", "norm1", "ls1", "mlp", "mlp.act"])
def test_a_childs_own_forward_is_called(kernels_stood_in, name):
    module, expected = block(), block(TimmBlock)
    for m in (module, expected):
        child = m.get_submodule(name)
        child.forward = lambda *args, _plain=child.forward, **kwargs: 3 * _plain(*args, **kwargs)
    torch.testing.assert_close(module(tokens()), expected(tokens()))


def test_a_modules_own_forward_wins(kernels_stood_in):
    module = block()
    module.forward = lambda x: x + 1
    assert torch.equal(module(tokens()), tokens() + 1)
    assert not kernels_stood_in


CALLS = {TimmAttention: 1, TimmBlock: 1, nn.Linear: 4, nn.GELU: 1, nn.Dropout: 3, LayerScale: 2, DropPath: 2}


@pytest.mark.parametrize("cls", CALLS)
def test_a_forward_replaced_for_a_whole_class_is_called(kernels_stood_in, monkeypatch, cls):
    plain, calls = cls.forward, []

    def forward(self, *args, **kwargs):
        calls.append(type(self))
        return plain(self, *args, **kwargs)

    module = block()
    monkeypatch.setattr(cls, "forward", forward)
    module(tokens())
    assert len(calls) == CALLS[cls]


@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_compiled_on_its_own_is_not_bypassed(kernels_stood_in, name):
    module, calls = block(), []
    module.attn.fused_attn = name != "attn.attn_drop"
    child = module.get_submodule(name)
    child.compile()
    child._compiled_call_impl = lambda *args, **kwargs: calls.append(name) or child._call_impl(*args, **kwargs)
    module(tokens())
    assert calls == [name]


@pytest.mark.one_graph
def test_a_compiled_block_runs_fused_inside(kernels_stood_in):
    module = block()
    expected = module(tokens())
    kernels_stood_in.clear()
    module.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(module(tokens()), expected)
    assert kernels_stood_in["add_layer_norm_attention"]


TRANSFORMS = {
    "grad": lambda m: torch.func.grad(lambda x: m(x).square().sum())(tokens()),
    "jacrev": lambda m: torch.func.jacrev(lambda x: m(x).square().sum())(tokens()),
    "jvp": lambda m: torch.func.jvp(m, (tokens(),), (torch.ones(2, 5, 32),))[1],
    "vmap": lambda m: torch.func.vmap(m)(tokens()[:, None]),
    "functional_call": lambda m: torch.func.functional_call(m, dict(m.named_parameters()), (tokens(),)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_give_timms_result(kernels_stood_in, transform):
    results = []
    for cls in (Block, TimmBlock):
        module = block(cls)
        module.attn.fused_attn = transform != "jvp"  # PyTorch's fused attention has no forward mode
        kernels_stood_in.clear()
        results.append(TRANSFORMS[transform](module))
        assert bool(kernels_stood_in) is (transform == "functional_call" and cls is Block)
    torch.testing.assert_close(*results)


def test_forward_mode_differentiation_gives_timms_result(kernels_stood_in):
    module = block()
    module.attn.fused_attn = False  # PyTorch's has no forward mode
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tokens(), torch.ones(2, 5, 32))
        assert module.why_not_fused(dual) == "inside forward-mode differentiation"
        assert torch.autograd.forward_ad.unpack_dual(module(dual)).tangent is not None


def test_a_trace_records_timms_operations(kernels_stood_in):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of PyTorch than 2.8 deprecate it
        traced = torch.jit.trace(block(), tokens(), check_trace=False)
    assert "scaled_dot_product_attention" in str(traced.inlined_graph)
    assert not kernels_stood_in


def test_the_reasons_are_found_in_time(in_module_calls, monkeypatch):
    """Before every fused call, less than three quarters of what calling the 20 modules of a block would cost."""

    @functools.lru_cache
    def capability(index):  # what is looked up for a CUDA tensor
        return None

    monkeypatch.setattr(backends, "_why_not_interpreted", lambda x: capability(x.get_device()))
    module = Block(64, 2, qkv_bias=True, init_values=0.1, drop_path=0.1).eval()
    x = torch.randn(2, 5, 64)
    for part in (module, module.attn, module.mlp, module.norm1):
        assert part.why_not_fused(x) is None
        assert in_module_calls(functools.partial(part.why_not_fused, x)) <= 15, type(part).__name__


def test_on_the_cpu_every_drop_in_says_why_it_runs_timms_code():
    module = block()
    assert module.why_not_fused(tokens()) == "tensors on cpu"
    with backends.use_backend("reference"):
        assert module.norm1.why_not_fused(tokens()) == "the backend is set to reference"


@pytest.mark.skipif(
    torch.__version__.startswith("2.8."), reason="torch.fx of PyTorch 2.8 does not trace timm's attention"
)
def test_feature_extraction_has_timms_node_names(kernels_stood_in):
    from timm.models import create_feature_extractor, get_graph_node_names

    x = torch.randn(1, 3, 32, 32)
    for norm_layer in (None, nn.LayerNorm):  # torch.fx keeps PyTorch's own modules whole
        model = timm.create_model(
            "deit_tiny_patch16_224", img_size=32, depth=2, num_classes=3, norm_layer=norm_layer
        ).eval()
        names = get_graph_node_names(model)
        nodes = [name for name in names[1] if "blocks.1" in name]
        expected = create_feature_extractor(model, nodes)(x)
        fastdeit.accelerate(model)
        assert get_graph_node_names(model) == names
        got = create_feature_extractor(model, nodes)(x)
        assert got.keys() == expected.keys()
        for name in nodes:
            torch.testing.assert_close(got[name], expected[name])
    assert not kernels_stood_in or set(kernels_stood_in) == {"layer_norm"}


def test_a_drop_in_is_what_it_was_after_a_trace(kernels_stood_in):
    from fastdeit.nn import TorchLayerNorm

    norm = TorchLayerNorm(8)
    graph = torch.fx.symbolic_trace(nn.Sequential(norm))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    assert type(norm) is TorchLayerNorm


def test_attention_maps_can_be_read(kernels_stood_in):
    module = Attention(32, 2).eval()
    module.fused_attn = False
    maps = []
    module.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))
    module(tokens())
    assert maps[0].shape == (2, 2, 5, 5)
