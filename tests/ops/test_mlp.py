"""`ops.mlp`: numerics by the contract, what it keeps, both paths, bad input."""

import itertools

import pytest
import torch

from fastdeit import backends, ops, testing
from fastdeit.ops.mlp_op import ACTIVATIONS
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

DEVICE = kernel_device()
DTYPES = kernel_dtypes()


def tensors(shape=(2, 7), channels=24, hidden=40, out=24, dtype=torch.float32, bias=True):
    x = torch.randn(*shape, channels)
    w1, w2 = torch.randn(hidden, channels) * channels**-0.5, torch.randn(out, hidden) * hidden**-0.5
    biases = [torch.randn(n) if bias else None for n in (hidden, out)]
    given = (x, w1, biases[0], w2, biases[1])
    return [t if t is None else t.to(DEVICE, dtype) for t in given]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_accurate_as_eager(activation, dtype):
    assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, *tensors(dtype=dtype), activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "channels", "hidden", "out"),
    [
        ((), 16, 64, 16),
        ((1, 1), 16, 64, 16),
        ((5,), 3, 7, 5),  # nothing is a multiple of anything
        ((33, 4), 32, 300, 8),
        ((2, 3, 5), 8, 257, 8),
        ((197,), 16, 64, 16),
    ],
)
def test_sizes_that_fit_no_tile(shape, channels, hidden, out, dtype):
    assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, *tensors(shape, channels, hidden, out, dtype))


@pytest.mark.parametrize("frozen", [f for n in range(6) for f in itertools.combinations(range(5), n)])
def test_every_subset_of_frozen_inputs(frozen):
    assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, *tensors((3,), 8, 16, 8), frozen=frozen)


def test_without_biases():
    assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, *tensors(bias=False))


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strided_input(layout):
    x, *weights = tensors((4, 6), 16)
    x = x.transpose(0, 1) if layout == "transposed" else torch.randn(4, 6, 32, device=DEVICE)[..., 8:24]
    weights[0] = weights[0].t().contiguous().t()
    assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, x, *weights)


def scalar_gelu(x):
    """What PyTorch computes of single elements, and on a GPU. Its vectors on some CPUs make NaN of infinity."""
    wide = x.float()
    return (wide * (1 + torch.erf(wide * 0.5**0.5)) / 2).to(x.dtype)


def test_large_activations_overflow_as_in_the_reference():
    x, *weights = tensors(dtype=torch.float16)
    weights[0] *= 3e4
    with backends.use_backend("triton"):
        y = ops.mlp(x, *weights)
    hidden = torch.nn.functional.linear(x, *weights[:2])
    expected = torch.nn.functional.linear(scalar_gelu(hidden), *weights[2:])
    assert not expected.isfinite().all()
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_under_autocast_dtypes_are_pytorchs(low):
    given = [t.requires_grad_() for t in tensors()]
    with backends.use_backend("triton"), torch.autocast(DEVICE.type, dtype=low):
        y = ops.mlp(*given)
        assert y.dtype == ops.mlp_reference(*given).dtype == low
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in given)


def test_weight_gradients_under_autocast_are_rounded_once():
    """Through fp32 to the fp32 weight: closer to the truth than PyTorch's, which pass through the low precision."""
    given = [t.requires_grad_() for t in tensors((64, 4))]
    errors = []
    exact = [t.detach().double().requires_grad_() for t in given]
    ops.mlp_reference(*exact).square().sum().backward()
    for op in (ops.mlp, ops.mlp_reference):
        for t in given:
            t.grad = None
        with (
            backends.use_backend("triton" if op is ops.mlp else "reference"),
            torch.autocast(DEVICE.type, torch.bfloat16),
        ):
            y = op(*given)
        y.float().square().sum().backward()
        errors.append([(t.grad.double() - e.grad).square().mean().item() for t, e in zip(given, exact, strict=True)])
    assert all(ours <= 1.1 * eagers for ours, eagers in zip(*errors, strict=True))


def test_saves_the_input_and_the_preactivation_alone(saved_bytes):
    given = [t.requires_grad_() for t in tensors((4, 50), 32, 128, 32)]
    rows = 4 * 50
    with backends.use_backend("triton"):
        assert saved_bytes(ops.mlp, given, given[1:], casts=False) == rows * (32 + 128) * 4
    assert saved_bytes(ops.mlp_reference, given, given[1:], casts=False) == rows * (32 + 2 * 128) * 4


def test_nothing_is_kept_without_gradients(saved_bytes):
    given = tensors()
    with backends.use_backend("triton"):
        assert saved_bytes(ops.mlp, given, given[1:], casts=False) == 0
        given = [t.requires_grad_() for t in given]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert ops.mlp(*given).grad_fn is None


def test_empty_batch():
    given = [t.requires_grad_() for t in tensors((0, 7))]
    with backends.use_backend("triton"), testing.poisoned_memory():
        y = ops.mlp(*given)
        y.sum().backward()
    assert y.shape == (0, 7, 24)
    assert not any(t.grad.any() for t in given)


def run(function, given):
    given = [t.detach().clone().requires_grad_() for t in given]
    with backends.use_backend("triton"):
        y = function(*given)
        y.square().sum().backward()
    return [y, *(t.grad for t in given)]


def test_repeated_runs_give_the_same_bits():
    given = tensors((40, 3))
    assert all(torch.equal(a, b) for a, b in zip(run(ops.mlp, given), run(ops.mlp, given), strict=True))


def test_registered_and_eager_paths_give_the_same_bits(monkeypatch):
    given = tensors()
    eager = run(ops.mlp, given)
    monkeypatch.setattr(backends, "registered_path", lambda *_: True)
    assert all(torch.equal(a, b) for a, b in zip(eager, run(ops.mlp, given), strict=True))


def test_compiles_to_one_graph_forward_and_backward():
    given = tensors()
    torch.compiler.reset()
    compiled = torch.compile(ops.mlp, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(run(ops.mlp, given), run(compiled, given), strict=True))


@pytest.mark.parametrize(("bias", "keeps"), [(False, True), (True, True), (True, False)])
def test_registered_op_passes_opcheck(bias, keeps):
    given = [t if t is None else t.requires_grad_(keeps) for t in tensors((3,), 8, 16, 8, bias=bias)]
    torch.library.opcheck(torch.ops.fastdeit.mlp_forward, (*given, "gelu", torch.float32, keeps))


def test_a_second_derivative_is_refused_clearly():
    x, *weights = tensors()
    x.requires_grad_()
    with backends.use_backend("triton"):
        (gradient,) = torch.autograd.grad(ops.mlp(x, *weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_reference_gradients():
    given = [t.double().cpu().requires_grad_() for t in tensors((3,), 4, 6, 4)]
    for activation in ("gelu", "gelu_tanh", "quick_gelu", "silu"):
        assert torch.autograd.gradcheck(lambda *t, a=activation: ops.mlp(*t, activation=a), given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(activation="swish"), ValueError, r"activation: expected one of gelu, gelu_tanh.*got 'swish'"),
        (dict(w1=torch.ones(40, 23)), ValueError, r"w1: expected shape \(rows, 24\), got \(40, 23\)"),
        (dict(w2=torch.ones(24, 41)), ValueError, r"w2: expected shape \(rows, 40\), got \(24, 41\)"),
        (dict(w2=None), TypeError, "w2: expected a floating-point tensor, got NoneType"),
        (
            dict(w1=torch.ones(40, 24).half()),
            TypeError,
            "w1: expected torch.float32 as x has, or autocast, got torch.float16",
        ),
        (
            dict(b2=torch.ones(24).double()),
            TypeError,
            "b2: expected torch.float32 as x has, or autocast, got torch.float64",
        ),
        (dict(b1=torch.ones(39)), ValueError, r"b1: expected shape \(40,\), got \(39,\)"),
        (dict(b2=torch.ones(1)), ValueError, r"b2: expected shape \(24,\), got \(1,\)"),
        (
            dict(x=torch.ones(2, 24, dtype=torch.long)),
            TypeError,
            r"x: expected a floating-point tensor, got torch.int64",
        ),
        (dict(w1=torch.ones(40, 24, device="meta")), ValueError, r"w1: expected device cpu as x has, got meta"),
        (dict(x=torch.tensor(1.0)), ValueError, r"x: expected shape \(\.\.\., C\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = dict(zip(("x", "w1", "b1", "w2", "b2"), (t.cpu() for t in tensors()), strict=True)) | change
    with pytest.raises(error, match=message):
        ops.mlp(**given)
