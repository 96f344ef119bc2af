"""`ops.layer_norm_mlp`: numerics by the contract in both forms, what it keeps, both paths, bad input."""

import pytest
import torch

from fastdeit import backends, ops, testing
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

DEVICE = kernel_device()
DTYPES = kernel_dtypes()
NAMES = ("x", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2", "gamma", "residual")
X, GAMMA, RESIDUAL = 0, 7, 8


def tensors(shape=(6, 8), channels=48, hidden=96, out=48, dtype=torch.float32):
    """In the order of NAMES. Large enough that the worst of few numbers does not decide a comparison of errors."""
    given = (
        2 * torch.randn(*shape, channels) + 1,
        1 + 0.3 * torch.randn(channels),
        0.2 * torch.randn(channels),
        torch.randn(hidden, channels) * channels**-0.5,
        0.1 * torch.randn(hidden),
        torch.randn(out, hidden) * hidden**-0.5,
        0.1 * torch.randn(out),
        0.5 + torch.rand(out),
        torch.randn(*shape, out),
    )
    return [t.to(DEVICE, dtype) for t in given]


def taking_all(function, autocast=None, **options):
    """The function of the tensors of NAMES, in order; `residual="x"` hands it x itself."""

    def call(x, norm_weight, norm_bias, w1, b1, w2, b2, gamma=None, residual=None):
        scale = options.get("drop_path_scale")
        keywords = {k: v for k, v in options.items() if k != "residual"}
        if scale is not None:
            keywords["drop_path_scale"] = scale.double() if x.dtype == torch.float64 else scale
        residual = x if options.get("residual") == "x" else residual
        with torch.autocast(DEVICE.type, dtype=autocast, enabled=autocast is not None and x.dtype != torch.float64):
            affine = (norm_weight, norm_bias, 1e-6, w1, b1, w2, b2)
            return function(x, *affine, gamma=gamma, residual=residual, **keywords)

    return call


def assert_accurate(given, frozen=(), **options):
    pair = (taking_all(f, **options) for f in (ops.layer_norm_mlp, ops.layer_norm_mlp_reference))
    assert_as_accurate_as_eager(*pair, *given, frozen=frozen)


def scales():
    return torch.tensor([0.0, 1 / 0.9, 1.0, 0.0, 1 / 0.9, 1.0], device=DEVICE)


FORMS = [*((dtype, None) for dtype in DTYPES), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
form = pytest.mark.parametrize(("dtype", "autocast"), FORMS)


@form
@pytest.mark.parametrize(
    "there", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
def test_scale_and_residual_alone_and_together(there, dtype, autocast):
    gamma, scale, residual = there
    given = tensors(dtype=dtype)
    given = [t if there else None for t, there in zip(given, (*[True] * 7, gamma, residual), strict=True)]
    assert_accurate(given, autocast=autocast, drop_path_scale=scales() if scale else None)


@form
def test_x_as_its_own_residual(dtype, autocast):
    assert_accurate(tensors(dtype=dtype)[:8], autocast=autocast, residual="x", drop_path_scale=scales())


@form
@pytest.mark.parametrize(
    ("shape", "channels", "hidden", "out"),
    [((), 64, 256, 64), ((50,), 33, 77, 35), ((2, 3, 7), 40, 257, 300)],
)
def test_sizes_that_fit_no_tile(shape, channels, hidden, out, dtype, autocast):
    assert_accurate(tensors(shape, channels, hidden, out, dtype), autocast=autocast)


@pytest.mark.parametrize("autocast", [None, torch.float16])
@pytest.mark.parametrize("trained", range(9), ids=NAMES)
def test_one_input_trained(trained, autocast):
    frozen = [i for i in range(9) if i != trained]
    assert_accurate(tensors(), frozen, autocast=autocast)


@pytest.mark.parametrize("frozen", range(9), ids=NAMES)
def test_one_input_frozen(frozen):
    assert_accurate(tensors(), [frozen], autocast=torch.float16)


@pytest.mark.parametrize("autocast", [None, torch.float16])
@pytest.mark.parametrize("absent", [("norm_weight",), ("norm_bias",), ("b1",), ("b2",), (*NAMES[1:3], "b1", "b2")])
def test_without_some_parameters(absent, autocast):
    given = [None if name in absent else t for name, t in zip(NAMES, tensors(), strict=True)]
    assert_accurate(given, autocast=autocast)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_rows_far_from_zero(autocast):
    """Mean 20 times the deviation: the statistics must be those of the stream itself, not of its rounded copy."""
    x, *rest = tensors((6, 8), 64, 32, 64)
    assert_accurate([x + 20, *rest], autocast=autocast)


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "silu"])
def test_other_activations(activation):
    assert_accurate(tensors(), autocast=torch.float16, activation=activation)


def test_relu():
    """In fp32: its derivative jumps at 0, so that which side a low-precision pre-activation falls on is no question of error."""
    assert_accurate(tensors(), activation="relu")


@pytest.mark.parametrize("autocast", [None, torch.float16])
def test_strided_input(autocast):
    given = tensors((4, 6), 16, 96, 48)
    given[X] = torch.randn(4, 6, 32, device=DEVICE)[..., 8:24]
    given[RESIDUAL] = torch.randn(6, 4, 48, device=DEVICE).transpose(0, 1)
    given[3] = given[3].t().contiguous().t()
    assert_accurate(given, autocast=autocast)


def test_parameters_that_are_no_fp32_masters_are_not_folded():
    """Weights already in fp16 lose nothing by a cast: folding would round them a second time."""
    x, *parameters, residual = tensors()
    given = [x, *(p.half() for p in parameters), residual]

    def eager(*tensors):  # PyTorch's CPU LayerNorm takes no fp32 input with fp16 parameters
        return taking_all(ops.layer_norm_mlp_reference, autocast=torch.float16)(*tensors)

    op = taking_all(ops.layer_norm_mlp, autocast=torch.float16)
    assert_as_accurate_as_eager(op, eager, *given)


# ---- what is saved


@pytest.mark.parametrize("recompute", [None, "preactivation"])
@pytest.mark.parametrize("ratio", [4, 8 / 3])
def test_saves_little_under_autocast(saved_bytes, ratio, recompute):
    """At most 0.46 of what PyTorch saves: 10 bytes a token and channel of 22 at a ratio of 4, 2 recomputed, and rstd."""
    rows, channels, hidden = 2 * 25, 192, int(192 * ratio)
    given = [t.requires_grad_() for t in tensors((2, 25), channels, hidden, channels)[:7]]
    with backends.use_backend("triton"):
        fused = taking_all(ops.layer_norm_mlp, autocast=torch.bfloat16, residual="x", recompute=recompute)
        ours = saved_bytes(fused, given, given[1:])
    eager = taking_all(ops.layer_norm_mlp_reference, autocast=torch.bfloat16, residual="x")
    eagers = saved_bytes(eager, given, given[1:])
    assert ours == rows * (2 * channels + (0 if recompute else 2 * hidden) + 4)
    assert ours <= (0.46 if ratio == 4 else 0.48) * eagers


def test_saves_the_input_statistics_and_the_preactivation_alone_in_one_dtype(saved_bytes):
    given = [t.requires_grad_() for t in tensors((4, 50), 32, 128, 32)[:7]]
    rows = 4 * 50
    with backends.use_backend("triton"):
        kept = saved_bytes(taking_all(ops.layer_norm_mlp), given, given[1:])
    assert kept == rows * (32 + 128 + 2) * 4


def test_nothing_is_saved_without_gradients(saved_bytes):
    given = tensors()
    with backends.use_backend("triton"):
        assert saved_bytes(taking_all(ops.layer_norm_mlp), given, given[1:]) == 0
        given = [t.requires_grad_() for t in given]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert taking_all(ops.layer_norm_mlp)(*given).grad_fn is None


# ---- paths


def run(function, given):
    given = [t.detach().clone().requires_grad_() for t in given]
    with backends.use_backend("triton"):
        out = function(*given)
        out.float().square().sum().backward()
    return [out, *(t.grad for t in given)]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_repeated_runs_give_the_same_bits(autocast):
    function, given = taking_all(ops.layer_norm_mlp, autocast=autocast), tensors((20, 3))
    assert equal(run(function, given), run(function, given))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_lean_form_gives_the_same_bits(autocast):
    given = tensors((2, 3))
    results = [
        run(taking_all(ops.layer_norm_mlp, autocast=autocast, recompute=recompute), given)
        for recompute in (None, "preactivation")
    ]
    assert equal(*results)


@pytest.mark.parametrize(("autocast", "residual"), [(None, None), (torch.bfloat16, "x")])
def test_registered_compiled_and_eager_paths_give_the_same_bits(autocast, residual, monkeypatch):
    samples = torch.tensor([0.0, 1 / 0.9], device=DEVICE)
    function = taking_all(ops.layer_norm_mlp, autocast=autocast, residual=residual, drop_path_scale=samples)
    given = tensors((2, 3))[: 8 if residual else 9]
    eager = run(function, given)
    torch.compiler.reset()
    assert equal(eager, run(torch.compile(function, fullgraph=True, backend="aot_eager"), given))
    monkeypatch.setattr(backends, "registered_path", lambda *_: True)
    assert equal(eager, run(function, given))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_backward_inside_autocast(autocast):
    """Some call backward there: gradients must not change."""
    given = tensors()
    function = taking_all(ops.layer_norm_mlp, autocast=autocast)
    outside = run(function, given)
    inside = [t.detach().clone().requires_grad_() for t in given]
    with backends.use_backend("triton"):
        out = function(*inside)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out.float().square().sum().backward()
    assert equal(outside[1:], [t.grad for t in inside])


def test_empty_batch():
    given = [t.requires_grad_() for t in tensors((0, 7))]
    with backends.use_backend("triton"), testing.poisoned_memory():
        out = taking_all(ops.layer_norm_mlp, autocast=torch.bfloat16)(*given)
        out.sum().backward()
    assert out.shape == (0, 7, 48)
    assert not any(t.grad.any() for t in given)


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["sum", "squares"])
def test_a_second_derivative_is_refused_clearly(loss):
    x, *rest = tensors((2, 2), 8, 16, 8)
    x.requires_grad_()
    with backends.use_backend("triton"):
        (gradient,) = torch.autograd.grad(loss(taking_all(ops.layer_norm_mlp)(x, *rest)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_reference_runs_where_the_kernels_cannot():
    given = [t.cpu().double().requires_grad_() for t in tensors((3,), 4, 6, 4)]
    assert torch.autograd.gradcheck(taking_all(ops.layer_norm_mlp), given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(activation="swish"), ValueError, "activation: expected one of gelu.*got 'swish'"),
        (dict(eps=-1.0), ValueError, "eps: expected a finite value >= 0, got -1.0"),
        (dict(norm_weight=torch.ones(47)), ValueError, r"weight: expected shape \(48,\).*got \(47,\)"),
        (dict(w1=torch.ones(96, 47)), ValueError, r"w1: expected shape \(rows, 48\), got \(96, 47\)"),
        (dict(w2=torch.ones(48, 96).half()), TypeError, "w2: expected torch.float32 as x has.*got torch.float16"),
        (dict(gamma=torch.ones(47)), ValueError, r"gamma: expected shape \(48,\), got \(47,\)"),
        (dict(gamma=2.0), TypeError, "gamma: expected a floating-point tensor or None, got float"),
        (dict(residual=torch.ones(6, 4, 48)), ValueError, r"residual: expected shape \(6, 8, 48\), got \(6, 4, 48\)"),
        (dict(residual=torch.ones(6, 8, 48, device="meta")), ValueError, "residual: expected device cpu.*got meta"),
        (dict(drop_path_scale=torch.ones(2)), ValueError, r"drop_path_scale: expected one factor per sample.*\(2,\)"),
        (dict(drop_path_scale=torch.ones(6).half()), TypeError, "drop_path_scale: expected float32, got torch.float16"),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = dict(zip(NAMES, (t.cpu() for t in tensors()), strict=True)) | dict(eps=1e-6) | change
    with pytest.raises(error, match=message):
        ops.layer_norm_mlp(**given)
