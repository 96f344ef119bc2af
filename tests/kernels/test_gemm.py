"""Our GEMM kernels, forced through the ops: numerics by the contract, what falls back, repeats."""

from collections import Counter

import pytest
import torch

from fastdeit import backends, ops
from fastdeit.kernels import linear as kernels_linear
from fastdeit.kernels.gemm import vector
from fastdeit.kernels.gemm_config import Tile, use_gemm
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes, poisoned_memory

DEVICE = kernel_device()
DTYPES = [dtype for dtype in kernel_dtypes() if DEVICE.type == "cpu" or dtype != torch.float32]
TILE = Tile(32, 64, 32)  # small, for the interpreter; a persistent program then owns several
OURS = ("triton", "tma")

each_backend = pytest.mark.parametrize("backend", OURS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def launched(monkeypatch) -> Counter:
    """Counts the products that kernels of ours make."""
    calls = Counter()

    def counted(name):
        kernel = getattr(kernels_linear, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return kernel(*args, **kwargs)

        return call

    for name in ("gemm_forward", "gemm_backward"):
        monkeypatch.setattr(kernels_linear, name, counted(name))
    return calls


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def linear_tensors(rows=(6, 9), channels=48, out=72, dtype=torch.float32):
    """x, weight, bias, gamma, residual."""
    weight = randn(out, channels, dtype=dtype) * channels**-0.5
    return randn(*rows, channels, dtype=dtype), weight, *(randn(*s, out, dtype=dtype) for s in ((), (), rows))


def mlp_tensors(rows=(2, 19), channels=24, hidden=64, dtype=torch.float32, bias=True):
    w1, w2 = randn(hidden, channels) * channels**-0.5, randn(channels, hidden) * hidden**-0.5
    biases = [randn(n, dtype=dtype) if bias else None for n in (hidden, channels)]
    return randn(*rows, channels, dtype=dtype), w1.to(dtype), biases[0], w2.to(dtype), biases[1]


def with_everything(function, activation=None):
    scale = torch.tensor([0.0, 1 / 0.9, 1.0, 0.0, 1 / 0.9, 1.0], device=DEVICE)

    def call(x, weight, bias, gamma, residual):
        factors = scale.double() if x.dtype == torch.float64 else scale
        keywords = dict(gamma=gamma, residual=residual, drop_path_scale=factors, activation=activation)
        return function(x, weight, bias, **keywords)

    return call


@each_backend
@each_dtype
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_the_whole_epilogue(activation, dtype, backend, launched):
    with use_gemm(backend, TILE):
        pair = (with_everything(f, activation) for f in (ops.linear, ops.linear_reference))
        assert_as_accurate_as_eager(*pair, *linear_tensors(dtype=dtype))
    assert launched["gemm_forward"] == 1


@each_backend
@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "silu", "relu"])
def test_other_activations(activation, backend, launched):
    with use_gemm(backend, TILE):
        assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, *mlp_tensors((5,)), activation=activation)
    assert launched == dict(gemm_forward=1, gemm_backward=1)


@each_backend
@each_dtype
@pytest.mark.parametrize(
    ("rows", "channels", "hidden"),
    [((2, 19), 24, 96), ((1,), 24, 64), ((65,), 16, 40), ((33,), 40, 136), ((7,), 192, 512)],
)
def test_rows_and_widths_that_fit_no_tile(rows, channels, hidden, dtype, backend, launched):
    with use_gemm(backend, TILE):
        given = mlp_tensors(rows, channels, hidden, dtype)
        assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, *given)
    assert launched == dict(gemm_forward=1, gemm_backward=1)


@each_dtype
@pytest.mark.parametrize(("rows", "channels", "hidden"), [((35,), 33, 67), ((3,), 5, 7)])
def test_odd_widths_over_pointers(rows, channels, hidden, dtype, launched):
    with use_gemm("triton", TILE):
        given = mlp_tensors(rows, channels, hidden, dtype)
        assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, *given)
    assert launched == dict(gemm_forward=1, gemm_backward=1)


@each_backend
@pytest.mark.parametrize("frozen", [(), (0, 1, 2), (3,), (2,), (0, 3, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_subsets_of_frozen_inputs(bias, frozen, backend):
    with use_gemm(backend, TILE):
        given = mlp_tensors((9,), bias=bias)
        assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, *given, frozen=frozen)


@each_backend
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_a_whole_branch_under_autocast(autocast, backend, launched):
    def under(function):
        def call(x, norm_weight, norm_bias, gamma, *weights):
            exact = x.dtype == torch.float64
            with torch.autocast(DEVICE.type, dtype=autocast, enabled=not exact):
                return function(x, norm_weight, norm_bias, 1e-6, *weights, gamma=gamma, residual=x)

        return call

    x, *weights = mlp_tensors((2, 11))
    norm = [1 + 0.1 * randn(24), 0.1 * randn(24), randn(24)]
    with use_gemm(backend, TILE):
        pair = (under(f) for f in (ops.layer_norm_mlp, ops.layer_norm_mlp_reference))
        assert_as_accurate_as_eager(*pair, x, *norm, *weights)
    assert launched == dict(gemm_forward=1)  # the second layer with the branch's end


@each_backend
def test_large_activations_overflow_as_in_the_reference(backend, launched):
    x, w1, *rest = mlp_tensors((5,), dtype=torch.float16)
    given = (x, w1 * 3e4, *rest)
    with use_gemm(backend, TILE), backends.use_backend("triton"):
        out = ops.mlp(*given)
    expected = ops.mlp_reference(*given)
    assert launched["gemm_forward"] == 1 and not expected.isfinite().all()
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())


@each_backend
def test_repeats_give_the_same_bits(backend):
    def run():
        given = [t.clone().requires_grad_() for t in fixed]
        with use_gemm(backend, TILE), backends.use_backend("triton"), poisoned_memory():
            out = ops.mlp(*given)
        out.sum().backward()
        return [out, *(t.grad for t in given)]

    fixed = mlp_tensors((3, 23))
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def sliced(x):
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 8, dtype=x.dtype, device=x.device)
    return wide[..., : x.shape[-1]].copy_(x)


def shifted(x):
    """One element after an aligned address."""
    buffer = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    return buffer[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize(
    ("backend", "change", "runs"),
    [
        ("triton", sliced, 1),
        ("tma", sliced, 1),
        ("tma", lambda x: x.t().contiguous().t(), 0),
        ("triton", lambda x: x.t().contiguous().t(), 0),
        ("cublas", lambda x: x, 0),
    ],
)
def test_what_a_kernel_cannot_read_falls_back(backend, change, runs, launched):
    x, w1, b1, w2, b2 = mlp_tensors((9,))
    with use_gemm(backend, TILE):
        assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, change(x), w1, b1, w2, b2, frozen=range(5))
    assert launched["gemm_forward"] == runs


def test_a_misaligned_input_falls_back(launched):
    x, w1, b1, *_ = mlp_tensors((9,))
    with use_gemm("tma", TILE):
        out, _ = kernels_linear.linear_forward(shifted(x), w1, b1, activation="gelu")
    assert not launched
    assert torch.equal(out, kernels_linear.linear_forward(x, w1, b1, activation="gelu")[0])


def test_results_that_a_descriptor_cannot_express_fall_back(launched):
    with use_gemm("tma", TILE):
        assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, *mlp_tensors((9,), 16, 35))
    assert not launched


def test_without_gradients_the_pre_activation_is_not_written(monkeypatch):
    needed = []
    forward = kernels_linear.gemm_forward
    monkeypatch.setattr(kernels_linear, "gemm_forward", lambda *a, **k: needed.append(k["needs_z"]) or forward(*a, **k))
    given = mlp_tensors((5,))
    with use_gemm("triton", TILE), backends.use_backend("triton"):
        ops.mlp(*given)
        ops.mlp(*(t.requires_grad_() for t in given))
    assert needed == [False, True]


def test_loads_are_as_wide_as_every_stride_allows():
    assert [vector(*w) for w in ((768, 192), (768, 24), (35, 64), (8,))] == [16, 8, 1, 8]
