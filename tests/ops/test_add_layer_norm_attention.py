"""`ops.add_layer_norm_attention`: numerics by the contract in both forms, what it keeps, both paths, bad input."""

import pytest
import torch

from fastdeit import backends, ops, testing
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

DEVICE = kernel_device()
NAMES = ("x", "branch", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "gamma")
DTYPES = kernel_dtypes(products=True)
FORMS = [*((dtype, None) for dtype in DTYPES), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
form = pytest.mark.parametrize(("dtype", "autocast"), FORMS)


def tensors(shape=(3, 9), heads=2, head_dim=32, dtype=None, autocast=None):
    """In the order of NAMES. C is not H * D, as in models with pruned heads."""
    dtype = dtype or (DTYPES[0] if autocast is None else torch.float32)
    channels, width = 40, heads * head_dim
    given = (
        2 * torch.randn(*shape, channels) + 1,
        torch.randn(*shape, channels).to(autocast or dtype),
        1 + 0.3 * torch.randn(channels),
        0.2 * torch.randn(channels),
        torch.randn(3 * width, channels) * channels**-0.5,
        0.1 * torch.randn(3 * width),
        torch.randn(channels, width) * width**-0.5,
        0.1 * torch.randn(channels),
        0.5 + torch.rand(channels),
    )
    return [t.to(DEVICE, t.dtype if i == 1 else dtype) for i, t in enumerate(given)]


def scales(samples=3):
    return torch.tensor([0.0, 1 / 0.9, 1.0], device=DEVICE)[:samples]


def taking_all(function, autocast=None, drop_path_scale=None, heads=2):
    def call(x, branch, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma):
        exact = x.dtype == torch.float64
        scale = drop_path_scale.double() if exact and drop_path_scale is not None else drop_path_scale
        weights = (norm_weight, norm_bias, 1e-6, qkv_weight, qkv_bias, proj_weight, proj_bias, heads)
        with torch.autocast(DEVICE.type, dtype=autocast, enabled=autocast is not None and not exact):
            out = function(x, branch, *weights, gamma=gamma, drop_path_scale=scale)
        return out if branch is not None else out[1]

    return call


def assert_accurate(given, frozen=(), **options):
    pair = (taking_all(f, **options) for f in (ops.add_layer_norm_attention, ops.add_layer_norm_attention_reference))
    assert_as_accurate_as_eager(*pair, *given, frozen=frozen)


@form
def test_addition_layer_scale_and_drop_path(dtype, autocast):
    assert_accurate(tensors(dtype=dtype, autocast=autocast), autocast=autocast, drop_path_scale=scales())


@form
def test_without_anything_to_add(dtype, autocast):
    x, _, *rest = tensors(dtype=dtype)
    assert_accurate([x, None, *rest], autocast=autocast)


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 64), (17, 3, 48), (65, 1, 32)])
def test_sizes_that_fit_no_tile(tokens, heads, head_dim):
    assert_accurate(
        tensors((2, tokens), heads, head_dim, autocast=torch.bfloat16), autocast=torch.bfloat16, heads=heads
    )


@pytest.mark.parametrize("trained", range(9), ids=NAMES)
def test_one_input_trained(trained):
    given = tensors((2, 5), autocast=torch.bfloat16)
    assert_accurate(given, [i for i in range(9) if i != trained], autocast=torch.bfloat16)


@pytest.mark.parametrize("trained", [1, 2, 3, 4])
def test_one_input_trained_in_one_dtype(trained):
    assert_accurate(tensors((2, 5)), [i for i in range(9) if i != trained])


@pytest.mark.parametrize("frozen", range(9), ids=NAMES)
def test_one_input_frozen(frozen):
    given = tensors(autocast=torch.bfloat16)
    assert_accurate(given, [frozen], autocast=torch.bfloat16, drop_path_scale=scales())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "absent", [("norm_weight",), ("norm_bias",), ("qkv_bias", "proj_bias"), ("gamma",), (*NAMES[2:4], "qkv_bias")]
)
def test_without_some_parameters(absent, autocast):
    named = zip(NAMES, tensors(autocast=autocast), strict=True)
    assert_accurate([None if name in absent else t for name, t in named], autocast=autocast)


# ---- what is saved


def test_saves_x_hat_qkv_the_output_and_statistics_under_autocast(saved_bytes):
    given = [t.requires_grad_() for t in tensors((4, 31), autocast=torch.bfloat16)]
    with backends.use_backend("triton"):
        kept = saved_bytes(taking_all(ops.add_layer_norm_attention, autocast=torch.bfloat16), given, given[2:])
    assert kept == 4 * 31 * (2 * 40 + 2 * 3 * 64 + 2 * 64 + 4 * 2 + 4)


def test_saves_x_and_both_statistics_in_one_dtype(saved_bytes):
    given = [t.requires_grad_() for t in tensors((4, 31))]
    with backends.use_backend("triton"):
        kept = saved_bytes(taking_all(ops.add_layer_norm_attention), given, given[2:])
    assert kept == 4 * 31 * (DTYPES[0].itemsize * (40 + 3 * 64 + 64) + 4 * (2 + 2))


def test_nothing_is_saved_without_gradients(saved_bytes):
    given = tensors()
    with backends.use_backend("triton"):
        assert saved_bytes(taking_all(ops.add_layer_norm_attention), given, given[2:]) == 0
        with torch.no_grad():
            out = taking_all(ops.add_layer_norm_attention)(*(t.requires_grad_() for t in given))
    assert [t.grad_fn for t in out] == [None, None]


# ---- paths


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("added", [False, True])
def test_registered_compiled_and_eager_paths_give_the_same_bits(run, added, autocast, monkeypatch):
    function = taking_all(ops.add_layer_norm_attention, autocast=autocast, drop_path_scale=scales(2) if added else None)
    as_tuple = lambda *given: out if isinstance(out := function(*given), tuple) else (out,)  # noqa: E731
    given = tensors((2, 3), autocast=autocast)
    given[1] = given[1] if added else None
    eager = run(as_tuple, given)
    assert equal(eager, run(as_tuple, given))
    torch.compiler.reset()
    assert equal(eager, run(torch.compile(as_tuple, fullgraph=True, backend="aot_eager"), given))
    monkeypatch.setattr(backends, "registered_path", lambda *_: True)
    assert equal(eager, run(as_tuple, given))


@pytest.mark.parametrize("products", [DTYPES[0], torch.bfloat16])
def test_registered_op_passes_opcheck(products):
    x, branch, *parameters = (t.requires_grad_() for t in tensors((2, 3), 1, dtype=torch.float32))
    op, options = torch.ops.fastdeit.add_layer_norm_attention_forward, (1e-6, 1, products)
    rest = (*parameters, *(None,) * 3, *options, None, None, True)
    torch.library.opcheck(op, (x, branch, *rest))
    torch.library.opcheck(op, (x, None, *rest))
    slots = torch.tensor([1, 0]), torch.tensor([0, 1])
    torch.library.opcheck(op, (x, branch[:1], *parameters, None, *slots, *options, 1, 1, True))


@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_that_nobody_uses(unused):
    given = [t.requires_grad_() for t in tensors((2, 3))]
    with backends.use_backend("triton"):
        taking_all(ops.add_layer_norm_attention)(*given)[1 - unused].sum().backward()
    assert given[0].grad.abs().sum() > 0


def test_backward_inside_autocast(run):
    """Some call backward there: gradients must not change."""
    given = tensors((2, 3), autocast=torch.bfloat16)
    function = taking_all(ops.add_layer_norm_attention, autocast=torch.bfloat16)
    outside = run(function, given)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = run(function, given)
    assert equal(outside, inside)


def test_empty_batch():
    given = [t.requires_grad_() for t in tensors((0, 7), autocast=torch.bfloat16)]
    with backends.use_backend("triton"), testing.poisoned_memory():
        out = taking_all(ops.add_layer_norm_attention, autocast=torch.bfloat16)(*given)
        sum(t.float().sum() for t in out).backward()
    assert not any(t.grad.any() for t in given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.ones(9, 40), branch=None), ValueError, r"x: expected rank 3, \(B, N, C\), got shape \(9, 40\)"),
        (dict(num_heads=0), ValueError, "num_heads: expected at least 1, got 0"),
        (dict(num_heads=2.0), TypeError, "num_heads: expected an int, got float"),
        (dict(num_heads=5), ValueError, r"qkv_weight: expected shape \(3 \* 5 \* D, 40\), got \(192, 40\)"),
        (
            dict(proj_bias=torch.ones(40).half()),
            TypeError,
            "proj_bias: expected torch.float32 as x has.*got torch.float16",
        ),
        (dict(qkv_bias=torch.ones(40)), ValueError, r"qkv_bias: expected shape \(192,\), got \(40,\)"),
        (dict(proj_weight=torch.ones(40, 40)), ValueError, r"proj_weight: expected shape \(rows, 64\), got \(40, 40\)"),
        (dict(proj_weight=torch.ones(40, 64, device="meta")), ValueError, "proj_weight: expected device cpu.*meta"),
        (dict(gamma=torch.ones(39)), ValueError, r"gamma: expected shape \(40,\), got \(39,\)"),
        (
            dict(branch=torch.ones(3, 9, 40).int()),
            TypeError,
            "branch: expected a floating-point tensor, got torch.int32",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = (
        dict(zip(NAMES, (t.cpu() for t in tensors(dtype=torch.float32)), strict=True))
        | dict(eps=1e-6, num_heads=2)
        | change
    )
    with pytest.raises(error, match=message):
        ops.add_layer_norm_attention(**given)
