"""The MLP in one kernel, forced through the ops: numerics by the contract, what falls back, that gradients never meet it."""

import copy
from collections import Counter

import pytest
import timm
import torch

from fastdeit import accelerate, backends, ops
from fastdeit.aot.catalog import ARCHITECTURES
from fastdeit.kernels.gemm import fused_mlp
from fastdeit.kernels.gemm.fused_mlp import FORMS, Config, Measured, candidates, select_config, use_fused_mlp
from fastdeit.kernels.runtime.architecture import architecture
from fastdeit.testing import (
    assert_as_accurate_as_eager,
    assert_close_to_oracle,
    kernel_device,
    kernel_dtypes,
    poisoned_memory,
)

DEVICE = kernel_device()
DTYPES = kernel_dtypes(products=True)
ENTRY = Measured(range(100, 400), 768, torch.bfloat16, "mlp", Config("tma", 128, 64, 8, 2))
# For the interpreter, small and either way of reading the weights.
CONFIGS = [Config(b, 16, 32, 4, 2) for b in ("tma", "triton")]
if DEVICE.type == "cuda":
    CONFIGS = candidates(architecture(torch.empty(0, device=DEVICE)))

DTYPE = DTYPES[0]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.backend)


@pytest.fixture
def launched(monkeypatch) -> Counter:
    """Counts the launches of each kernel."""
    calls = Counter()
    launch = fused_mlp.launch

    def counted(kernel, *rest):
        calls[kernel.__name__] += 1
        launch(kernel, *rest)

    monkeypatch.setattr(fused_mlp, "launch", counted)
    return calls


def tensors(rows=(2, 19), hidden=64, dtype=DTYPE, bias=True, channels=192):
    """x, w1, b1, w2, b2."""
    w1, w2 = torch.randn(hidden, channels) * channels**-0.5, torch.randn(channels, hidden) * hidden**-0.5
    b1, b2 = (torch.randn(n) if bias else None for n in (hidden, channels))
    return [t if t is None else t.to(DEVICE, dtype) for t in (torch.randn(*rows, channels), w1, b1, w2, b2)]


def forced(*given, function=ops.mlp, config=CONFIGS[0], **options):
    with use_fused_mlp(config), backends.use_backend("triton"), poisoned_memory():
        return function(*given, **options)


def held_to_the_contract(*given, pair=(ops.mlp, ops.mlp_reference), config=CONFIGS[0], **options) -> None:
    """No gradients: with them the kernel would not run."""
    frozen = range(len(given))
    with use_fused_mlp(config):
        assert_as_accurate_as_eager(*pair, *given, frozen=frozen, **options)


@each_config
@each_dtype
@pytest.mark.parametrize(("rows", "hidden"), [((2, 19), 128), ((1,), 64), ((16,), 64)])
def test_as_accurate_as_eager(rows, hidden, dtype, config, launched):
    held_to_the_contract(*tensors(rows, hidden, dtype), config=config)
    assert launched.total() == 1


@each_config
def test_the_hidden_width_of_deit_ti(config, launched):
    held_to_the_contract(*tensors((5,), 768, torch.float16), config=config)
    assert launched.total() == 1


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "silu", "relu"])
def test_other_activations(activation, launched):
    held_to_the_contract(*tensors((5,)), activation=activation)
    assert launched.total() == 1


@each_config
def test_without_biases(config, launched):
    held_to_the_contract(*tensors((5,), bias=False), config=config)
    assert launched.total() == 1


@each_config
def test_rows_and_weights_apart_in_memory(config, launched):
    x, *weights = tensors((9,))
    for t in (x, weights[0], weights[2]):
        t.set_(torch.cat([t, t], dim=1)[:, : t.shape[1]])
    held_to_the_contract(x, *weights, config=config)
    assert launched.total() == 1


def test_transposed_tokens(launched):
    x, *weights = tensors((3, 5))
    held_to_the_contract(x.transpose(0, 1), *weights)
    assert launched.total() == 1


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_under_autocast(low, launched):
    given = tensors((5,), dtype=torch.float32)
    with torch.autocast(DEVICE.type, dtype=low):
        y = forced(*given)
        eager = ops.mlp_reference(*given)
    assert launched.total() == 1
    assert_close_to_oracle("y", y, ops.mlp_reference(*(t.double() for t in given)), eager)


@each_config
def test_large_activations_overflow_as_in_the_reference(config, launched):
    x, w1, *rest = tensors((5,), dtype=torch.float16)
    given = (x, w1 * 3e4, *rest)
    y, expected = forced(*given, config=config), ops.mlp_reference(*given)
    assert launched.total() == 1 and not expected.isfinite().all()
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


def test_repeats_give_the_same_bits(launched):
    given = tensors((3, 23))
    assert torch.equal(forced(*given), forced(*given))
    assert launched.total() == 2


def test_gradients_never_meet_it(launched):
    given = [t.requires_grad_() for t in tensors((5,))]
    forced(*given).sum().backward()
    assert not launched
    with torch.no_grad():
        forced(*given)
    with torch.inference_mode():
        forced(*given)
    assert launched.total() == 2


def test_the_registered_op_gives_the_same_bits(launched, monkeypatch):
    given = tensors((5,))
    eager = forced(*given)
    monkeypatch.setattr(backends, "registered_path", lambda *_: True)
    assert torch.equal(forced(*given), eager)
    forced(*(t.requires_grad_() for t in given)).sum().backward()
    assert launched.total() == 2


def test_compiled_inference_runs_it(launched):
    given = tensors((5,))
    torch.compiler.reset()
    compiled = torch.compile(ops.mlp, fullgraph=True, backend="aot_eager")
    with use_fused_mlp(CONFIGS[0]), backends.use_backend("triton"), torch.no_grad():
        assert torch.equal(compiled(*given), ops.mlp(*given))
    assert launched.total() == 2


@pytest.mark.parametrize("bias", [True, False])
def test_registered_op_passes_opcheck(bias):
    given = [t if t is None else t.requires_grad_() for t in tensors((3,), 8, bias=bias, channels=16)]
    torch.library.opcheck(torch.ops.fastdeit.mlp_forward, (*given, "gelu", DTYPE, False))


def test_a_program_exported_without_gradients_can_be_trained():
    def gradients(function):
        given = [t.detach().clone().requires_grad_() for t in fixed]
        with backends.use_backend("triton"):
            function(*given).square().sum().backward()
        return [t.grad for t in given]

    fixed = tensors((3,), 8, channels=16)
    inference = gradients(lambda *given: torch.ops.fastdeit.mlp_forward(*given, "gelu", DTYPE, False)[0])
    assert all(torch.equal(a, b) for a, b in zip(inference, gradients(ops.mlp), strict=True))


@pytest.mark.parametrize(
    "given",
    [
        dict(channels=128),
        dict(hidden=48),  # no multiple of a block
        dict(rows=(0,)),
    ],
)
def test_what_it_cannot_compute_falls_back(given, launched):
    held_to_the_contract(*tensors(**dict(rows=(5,)) | given))
    assert not launched


@pytest.mark.parametrize("which", ["w1", "w2"])
@pytest.mark.parametrize("change", ["transposed", "misaligned"])
def test_weights_that_a_descriptor_cannot_read_fall_back(change, which, launched):
    given = tensors((5,))
    index = 1 if which == "w1" else 3
    weight = given[index]
    if change == "transposed":
        given[index] = weight.t().contiguous().t()
    else:
        given[index] = torch.zeros(weight.numel() + 1, device=DEVICE, dtype=DTYPE)[1:].view(weight.shape).copy_(weight)
    y, exact, eager = forced(*given), ops.mlp_reference(*(t.double() for t in given)), ops.mlp_reference(*given)
    assert not launched
    assert_close_to_oracle("y", y, exact, eager, max(t.abs().max().item() for t in given))


# ---- with the addition and LayerNorm in front


def branch_tensors(rows=(2, 19), dtype=DTYPE, **options):
    """x, branch, norm_weight, norm_bias, eps, w1, b1, w2, b2."""
    x, *weights = tensors(rows, dtype=dtype, **options)
    branch, norm_weight, norm_bias = (torch.randn(s).to(DEVICE, dtype) for s in (x.shape, x.shape[-1], x.shape[-1]))
    return [x, branch, norm_weight, norm_bias, 1e-6, *weights]


IN_FRONT = ops.add_layer_norm_mlp, ops.add_layer_norm_mlp_reference


@each_config
@each_dtype
@pytest.mark.parametrize("rows", [(2, 19), (1,), (16,)])
def test_in_front_as_accurate_as_eager(rows, dtype, config, launched):
    gamma = torch.randn(192, device=DEVICE, dtype=dtype)
    held_to_the_contract(*branch_tensors(rows, dtype), pair=IN_FRONT, gamma=gamma, config=config)
    assert launched.total() == 1


@pytest.mark.parametrize("absent", [(1,), (2,), (3,), (1, 2, 3, 6, 8)])
def test_in_front_what_may_be_absent(absent, launched):
    given = [None if i in absent else t for i, t in enumerate(branch_tensors((5,), torch.float16))]
    held_to_the_contract(*given, pair=IN_FRONT)
    assert launched.total() == 1


def test_in_front_rows_far_from_zero(launched):
    x, *rest = branch_tensors((5,))
    held_to_the_contract(x + 50.0, *rest, pair=IN_FRONT)
    assert launched.total() == 1


def test_in_front_strided_streams(launched):
    x, branch, *rest = branch_tensors((3, 7))
    held_to_the_contract(x[:, :2], branch.transpose(0, 1).contiguous().transpose(0, 1)[:, :2], *rest, pair=IN_FRONT)
    assert launched.total() == 1


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_in_front_under_autocast(low, launched):
    given = branch_tensors((5,), torch.float32)
    given[1] = given[1].to(low)
    exact = ops.add_layer_norm_mlp_reference(*(t.double() if torch.is_tensor(t) else t for t in given))
    with torch.autocast(DEVICE.type, dtype=low):
        got = forced(*given, function=ops.add_layer_norm_mlp)
        eager = ops.add_layer_norm_mlp_reference(*given)
    assert launched.total() == 1
    for name, *three in zip(("x_new", "out"), got, exact, eager, strict=True):
        assert_close_to_oracle(name, *three)


def test_in_front_large_activations_overflow_before_gamma(launched):
    """As PyTorch's product does: a small gamma does not bring them back."""
    given = branch_tensors((5,), torch.float16)
    given[7] *= 3e4
    gamma = torch.full((192,), 1e-4, device=DEVICE, dtype=torch.float16)
    (_, out), (_, expected) = forced(*given, function=IN_FRONT[0], gamma=gamma), IN_FRONT[1](*given, gamma=gamma)
    assert launched.total() == 1 and not expected.isfinite().all()
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())


def test_a_block_of_deit_ti_runs_it(launched):
    timms = timm.models.vision_transformer.Block(192, 3, qkv_bias=True, init_values=0.1).eval().to(DEVICE, DTYPE)
    block = accelerate(copy.deepcopy(timms))
    x = torch.randn(2, 5, 192).to(DEVICE, DTYPE)
    with torch.no_grad():
        y, exact, eager = forced(x, function=block), copy.deepcopy(timms).double()(x.double()), timms(x)
    assert launched.total() == 1
    assert_close_to_oracle("y", y, exact, eager, x.abs().max().item())


def test_stochastic_depth_without_gradients_falls_back(launched):
    scale = torch.tensor([0.0, 1 / 0.9], device=DEVICE)
    forced(*branch_tensors((2, 3)), function=IN_FRONT[0], drop_path_scale=scale)
    assert not launched


def test_in_front_gradients_never_meet_it(launched):
    x, *rest = branch_tensors((5,))
    _, out = forced(x, *rest[:-1], rest[-1].requires_grad_(), function=IN_FRONT[0])
    out.sum().backward()
    assert not launched


@pytest.mark.parametrize("added", [True, False])
def test_in_front_the_registered_op_gives_the_same_bits(added, launched, monkeypatch):
    given = branch_tensors((5,))
    given[1] = given[1] if added else None
    eager = forced(*given, function=IN_FRONT[0])
    monkeypatch.setattr(backends, "registered_path", lambda *_: True)
    assert all(torch.equal(a, b) for a, b in zip(forced(*given, function=IN_FRONT[0]), eager, strict=True))
    assert launched.total() == 2


def inference_call(given):
    """The registered op's arguments."""
    x, branch, norm_weight, norm_bias, eps, *weights = given
    nothing = (None,) * 4  # LayerScale, drop path, and its slots
    return x, branch, norm_weight, norm_bias, *weights, *nothing, eps, "gelu", DTYPE, None, None, None, False


@pytest.mark.parametrize("added", [True, False])
def test_in_front_registered_op_passes_opcheck(added):
    given = [t.requires_grad_() if torch.is_tensor(t) else t for t in branch_tensors((3,), hidden=8, channels=16)]
    given[1] = given[1] if added else None
    torch.library.opcheck(torch.ops.fastdeit.add_layer_norm_mlp_forward, inference_call(given))


@pytest.mark.parametrize("added", [True, False])
def test_in_front_a_program_exported_without_gradients_can_be_trained(added):
    def gradients(function):
        given = [t.detach().clone().requires_grad_() if torch.is_tensor(t) else t for t in fixed]
        given[1] = given[1] if added else None
        with backends.use_backend("triton"):
            out, x_new = function(given)
            (out.square().sum() + (x_new.square().sum() if added else 0)).backward()
        return [t.grad for t in given if torch.is_tensor(t)]

    fixed = branch_tensors((3,), hidden=8, channels=16)
    inference = gradients(lambda given: torch.ops.fastdeit.add_layer_norm_mlp_forward(*inference_call(given))[:2])
    training = gradients(lambda given: IN_FRONT[0](*given)[::-1])
    assert all(torch.equal(a, b) for a, b in zip(inference, training, strict=True))


# ---- which configuration


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(fused_mlp, "FUSED_MLPS", {90: (ENTRY,)})
    fused_mlp._select.cache_clear()
    yield
    fused_mlp._select.cache_clear()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_measured_is_the_librarys(form, arch):
    assert select_config(50432, 768, torch.bfloat16, form, arch) is None


@pytest.mark.parametrize(
    ("change", "ours"),
    [
        ({}, True),
        (dict(M=399), True),
        (dict(M=400), False),
        (dict(hidden=512), False),
        (dict(dtype=torch.float16), False),
        (dict(form="add_layer_norm_mlp"), False),
        (dict(arch=80), False),
    ],
)
def test_an_entry_speaks_for_its_own_shapes_alone(change, ours, measured):
    call = dict(M=100, hidden=768, dtype=torch.bfloat16, form="mlp", arch=90) | change
    assert select_config(**call) == (ENTRY.config if ours else None)


def test_the_table_s_form_is_python():
    names = dict(Measured=Measured, Config=Config, torch=torch, range=range)
    assert eval(repr({90: (ENTRY,)}), names) == {90: (ENTRY,)}


def test_it_is_forced_within_the_statement_alone():
    call = (8, 768, torch.bfloat16, "mlp", 80)
    with use_fused_mlp(ENTRY.config):
        assert select_config(*call) == ENTRY.config
    assert select_config(*call) is None


def test_it_can_be_kept_from_running(measured):
    call = (100, 768, torch.bfloat16, "mlp", 90)
    with use_fused_mlp(None):
        assert select_config(*call) is None
    assert select_config(*call) == ENTRY.config
