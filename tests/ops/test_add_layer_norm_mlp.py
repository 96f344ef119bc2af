"""`ops.add_layer_norm_mlp`: numerics by the contract in both forms, what it keeps, both paths, bad input."""

import pytest
import torch

from fastdeit import backends, ops, testing
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

DEVICE = kernel_device()
NAMES = ("x", "branch", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2", "gamma")
FORMS = [*((dtype, None) for dtype in kernel_dtypes()), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
form = pytest.mark.parametrize(("dtype", "autocast"), FORMS)


def tensors(shape=(6, 8), channels=48, hidden=96, dtype=torch.float32, autocast=None):
    """In the order of NAMES. Large enough that the worst of few numbers does not decide a comparison of errors."""
    given = (
        2 * torch.randn(*shape, channels) + 1,
        torch.randn(*shape, channels).to(autocast or dtype),
        1 + 0.3 * torch.randn(channels),
        0.2 * torch.randn(channels),
        torch.randn(hidden, channels) * channels**-0.5,
        0.1 * torch.randn(hidden),
        torch.randn(channels, hidden) * hidden**-0.5,
        0.1 * torch.randn(channels),
        0.5 + torch.rand(channels),
    )
    return [t.to(DEVICE, t.dtype if i == 1 else dtype) for i, t in enumerate(given)]


def scales(samples=6):
    return torch.tensor([0.0, 1 / 0.9, 1.0] * 2, device=DEVICE)[:samples]


def taking_all(function, autocast=None, drop_path_scale=None, **options):
    def call(x, branch, norm_weight, norm_bias, w1, b1, w2, b2, gamma):
        exact = x.dtype == torch.float64
        scale = drop_path_scale.double() if exact and drop_path_scale is not None else drop_path_scale
        with torch.autocast(DEVICE.type, dtype=autocast, enabled=autocast is not None and not exact):
            affine = (norm_weight, norm_bias, 1e-6, w1, b1, w2, b2)
            out = function(x, branch, *affine, gamma=gamma, drop_path_scale=scale, **options)
        return out if branch is not None else out[1]

    return call


def assert_accurate(given, frozen=(), recompute=None, **options):
    op = taking_all(ops.add_layer_norm_mlp, recompute=recompute, **options)
    assert_as_accurate_as_eager(op, taking_all(ops.add_layer_norm_mlp_reference, **options), *given, frozen=frozen)


@form
@pytest.mark.parametrize("recompute", [None, "preactivation"])
def test_addition_layer_scale_and_drop_path(recompute, dtype, autocast):
    assert_accurate(
        tensors(dtype=dtype, autocast=autocast), recompute=recompute, autocast=autocast, drop_path_scale=scales()
    )


@form
def test_without_anything_to_add(dtype, autocast):
    x, _, *rest = tensors(dtype=dtype)
    assert_accurate([x, None, *rest], autocast=autocast)


@form
@pytest.mark.parametrize(("shape", "channels", "hidden"), [((50,), 33, 77), ((2, 3, 7), 40, 257)])
def test_sizes_that_fit_no_tile(shape, channels, hidden, dtype, autocast):
    assert_accurate(tensors(shape, channels, hidden, dtype, autocast), autocast=autocast)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("trained", range(9), ids=NAMES)
def test_one_input_trained(trained, autocast):
    assert_accurate(tensors(autocast=autocast), [i for i in range(9) if i != trained], autocast=autocast)


@pytest.mark.parametrize("frozen", range(9), ids=NAMES)
def test_one_input_frozen(frozen):
    assert_accurate(tensors(autocast=torch.bfloat16), [frozen], autocast=torch.bfloat16, drop_path_scale=scales())


@pytest.mark.parametrize(("autocast", "recompute"), [(None, None), (torch.bfloat16, "preactivation")])
@pytest.mark.parametrize("absent", [("norm_weight",), ("norm_bias",), ("b1", "b2"), ("gamma",), (*NAMES[2:4], "b1")])
def test_without_some_parameters(absent, autocast, recompute):
    named = zip(NAMES, tensors(autocast=autocast), strict=True)
    assert_accurate([None if name in absent else t for name, t in named], recompute=recompute, autocast=autocast)


def test_parameters_that_are_no_fp32_masters_are_not_folded():
    x, branch, *parameters = tensors(autocast=torch.float16)
    given = [x, branch, *(p.half() for p in parameters)]

    def eager(*tensors):  # PyTorch's CPU LayerNorm takes no fp32 input with fp16 parameters
        return taking_all(ops.add_layer_norm_mlp_reference, autocast=torch.float16)(*tensors)

    assert_as_accurate_as_eager(taking_all(ops.add_layer_norm_mlp, autocast=torch.float16), eager, *given)


# ---- what is saved


@pytest.mark.parametrize("recompute", [None, "preactivation"])
def test_saves_x_hat_rstd_and_unless_lean_the_preactivation_under_autocast(saved_bytes, recompute):
    given = [t.requires_grad_() for t in tensors((2, 25), 192, 768, autocast=torch.bfloat16)]
    with backends.use_backend("triton"):
        kept = saved_bytes(
            taking_all(ops.add_layer_norm_mlp, autocast=torch.bfloat16, recompute=recompute), given, given[2:]
        )
    assert kept == 50 * (2 * 192 + 4 + (0 if recompute else 2 * 768))


@pytest.mark.parametrize("recompute", [None, "preactivation"])
def test_saves_x_the_statistics_and_unless_lean_the_preactivation_in_one_dtype(saved_bytes, recompute):
    given = [t.requires_grad_() for t in tensors((4, 50), 32, 128)]
    with backends.use_backend("triton"):
        kept = saved_bytes(taking_all(ops.add_layer_norm_mlp, recompute=recompute), given, given[2:])
    assert kept == 200 * 4 * (32 + 2 + (0 if recompute else 128))


def test_nothing_is_saved_without_gradients(saved_bytes):
    given = tensors()
    with backends.use_backend("triton"):
        assert saved_bytes(taking_all(ops.add_layer_norm_mlp), given, given[2:]) == 0
        with torch.no_grad():
            out = taking_all(ops.add_layer_norm_mlp)(*(t.requires_grad_() for t in given))
    assert [t.grad_fn for t in out] == [None, None]


# ---- paths


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_lean_form_gives_the_same_bits(run, autocast):
    given = tensors((20, 3), autocast=autocast)
    results = [
        run(taking_all(ops.add_layer_norm_mlp, autocast=autocast, recompute=recompute), given)
        for recompute in (None, "preactivation")
    ]
    assert equal(*results)


@pytest.mark.parametrize("recompute", [None, "preactivation"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("added", [False, True])
def test_registered_compiled_and_eager_paths_give_the_same_bits(run, added, autocast, recompute, monkeypatch):
    options = dict(autocast=autocast, recompute=recompute, drop_path_scale=scales(2) if added else None)
    function = taking_all(ops.add_layer_norm_mlp, **options)
    as_tuple = lambda *given: out if isinstance(out := function(*given), tuple) else (out,)  # noqa: E731
    given = tensors((2, 3), autocast=autocast)
    given[1] = given[1] if added else None
    eager = run(as_tuple, given)
    torch.compiler.reset()
    assert equal(eager, run(torch.compile(as_tuple, fullgraph=True, backend="aot_eager"), given))
    monkeypatch.setattr(backends, "registered_path", lambda *_: True)
    assert equal(eager, run(as_tuple, given))


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_registered_op_passes_opcheck(products):
    x, branch, *parameters = (t.requires_grad_() for t in tensors((3,), 8, 16))
    op, options = torch.ops.fastdeit.add_layer_norm_mlp_forward, (1e-6, "gelu", products)
    whole = (*parameters, *(None,) * 3, *options)
    torch.library.opcheck(op, (x, branch, *whole, None, None, None, True))
    torch.library.opcheck(op, (x, None, *whole, "preactivation", None, None, True))
    slots = torch.tensor([2, 0, 1]), torch.tensor([1, 0, 2])
    torch.library.opcheck(op, (x, branch[:2], *parameters, None, *slots, *options, None, 2, 1, True))


@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_that_nobody_uses(unused):
    given = [t.requires_grad_() for t in tensors((2, 3))]
    with backends.use_backend("triton"):
        taking_all(ops.add_layer_norm_mlp)(*given)[1 - unused].sum().backward()
    assert given[0].grad.abs().sum() > 0


def test_an_unscaled_branch_of_xs_dtype_gets_xs_gradient():
    given = [t.requires_grad_() for t in tensors((2, 3))]
    with backends.use_backend("triton"):
        out = taking_all(ops.add_layer_norm_mlp)(*given)
        dx, dbranch = torch.autograd.grad(sum(o.square().sum() for o in out), given[:2])
    assert torch.equal(dx, dbranch)


def test_empty_batch():
    given = [t.requires_grad_() for t in tensors((0, 7), autocast=torch.bfloat16)]
    with backends.use_backend("triton"), testing.poisoned_memory():
        out = taking_all(ops.add_layer_norm_mlp, autocast=torch.bfloat16)(*given)
        sum(t.float().sum() for t in out).backward()
    assert not any(t.grad.any() for t in given)


def test_a_second_derivative_is_refused_clearly():
    x, *rest = tensors((2, 2), 8, 16)
    with backends.use_backend("triton"):
        out = taking_all(ops.add_layer_norm_mlp)(x.requires_grad_(), *rest)[1]
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(activation="swish"), ValueError, "activation: expected one of gelu.*got 'swish'"),
        (dict(eps=-1.0), ValueError, "eps: expected a finite value >= 0, got -1.0"),
        (dict(branch=torch.ones(6, 4, 48)), ValueError, r"branch: expected the shape of x \(6, 8, 48\).*\(6, 4, 48\)"),
        (dict(w1=torch.ones(96, 47)), ValueError, r"w1: expected shape \(rows, 48\), got \(96, 47\)"),
        (dict(w2=torch.ones(48, 96).half()), TypeError, "w2: expected torch.float32 as x has.*got torch.float16"),
        (dict(gamma=torch.ones(47)), ValueError, r"gamma: expected shape \(48,\), got \(47,\)"),
        (dict(gamma=2.0), TypeError, "gamma: expected a floating-point tensor or None, got float"),
        (dict(drop_path_scale=torch.ones(2)), ValueError, r"drop_path_scale: expected one factor per sample.*\(2,\)"),
        (
            dict(branch=None, drop_path_scale=torch.ones(6)),
            ValueError,
            "drop_path_scale: expected None without a branch",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = dict(zip(NAMES, (t.cpu() for t in tensors()), strict=True)) | dict(eps=1e-6) | change
    with pytest.raises(error, match=message):
        ops.add_layer_norm_mlp(**given)
