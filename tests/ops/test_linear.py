"""`ops.linear`: numerics by the contract, what it keeps, both paths, bad input."""

import pytest
import torch

from fastdeit import backends, ops, testing
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

DEVICE = kernel_device()
DTYPES = kernel_dtypes()
NAMES = ("x", "weight", "bias", "gamma", "residual")


def tensors(shape=(6, 8), channels=48, out=56, dtype=torch.float32):
    """In the order of NAMES."""
    given = (
        torch.randn(*shape, channels),
        torch.randn(out, channels) * channels**-0.5,
        0.1 * torch.randn(out),
        0.5 + torch.rand(out),
        torch.randn(*shape, out),
    )
    return [t.to(DEVICE, dtype) for t in given]


def scales():
    return torch.tensor([0.0, 1 / 0.9, 1.0, 0.0, 1 / 0.9, 1.0], device=DEVICE)


def taking_all(function, autocast=None, drop_path_scale=None, **options):
    """The function of the tensors of NAMES, in order."""

    def call(x, weight, bias=None, gamma=None, residual=None):
        exact = x.dtype == torch.float64
        scale = drop_path_scale.double() if exact and drop_path_scale is not None else drop_path_scale
        keywords = dict(gamma=gamma, residual=residual, drop_path_scale=scale, **options)
        with torch.autocast(DEVICE.type, dtype=autocast, enabled=autocast is not None and not exact):
            return function(x, weight, bias, **keywords)

    return call


def assert_accurate(given, frozen=(), **options):
    pair = (taking_all(f, **options) for f in (ops.linear, ops.linear_reference))
    assert_as_accurate_as_eager(*pair, *given, frozen=frozen)


form = pytest.mark.parametrize(
    ("dtype", "autocast"),
    [*((dtype, None) for dtype in DTYPES), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)],
)


@form
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("scaled", [False, True])
def test_as_accurate_as_eager(scaled, activation, dtype, autocast):
    given = tensors(dtype=dtype)
    given = given if scaled else given[:3]
    assert_accurate(given, autocast=autocast, activation=activation, drop_path_scale=scales() if scaled else None)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("trained", range(5), ids=NAMES)
def test_one_input_trained(trained, activation):
    frozen = [i for i in range(5) if i != trained]
    assert_accurate(tensors(), frozen, autocast=torch.float16, activation=activation)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("frozen", range(5), ids=NAMES)
def test_one_input_frozen(frozen, activation):
    assert_accurate(tensors(), [frozen], activation=activation)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("absent", NAMES[2:])
def test_without_one_of_them(absent, activation):
    given = [None if name == absent else t for name, t in zip(NAMES, tensors(), strict=True)]
    assert_accurate(given, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channels", "out"), [((), 65, 77), ((50,), 33, 35), ((2, 3, 7), 40, 300)])
def test_sizes_that_fit_no_tile(shape, channels, out, dtype):
    assert_accurate(tensors(shape, channels, out, dtype), activation="gelu")


def test_strided_input():
    given = tensors((4, 6), 16)
    given[0] = torch.randn(4, 6, 32, device=DEVICE)[..., 8:24]
    given[4] = torch.randn(6, 4, 56, device=DEVICE).transpose(0, 1)
    assert_accurate(given)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("count", [3, 5])
def test_the_preactivation_comes_along(count, activation):
    given = [t.requires_grad_() for t in tensors()[:count]]
    with backends.use_backend("triton"):
        out, z = taking_all(ops.linear, activation=activation, save_preactivation=True)(*given)
        (alone,) = (taking_all(ops.linear, activation=activation)(*given),)
    expected = torch.nn.functional.linear(*given[:3])
    assert torch.equal(z, expected) and not z.requires_grad
    assert torch.equal(out, alone) and out.requires_grad


def test_saves_the_input_and_only_for_an_activation_what_it_acts_on(saved_bytes):
    given = [t.requires_grad_() for t in tensors()]
    with backends.use_backend("triton"):
        alone, activated, low = (
            saved_bytes(taking_all(ops.linear, **options), given, given[1:4], casts=False)
            for options in ({}, dict(activation="gelu"), dict(autocast=torch.bfloat16))
        )
    assert (alone, activated, low) == (48 * 48 * 4, 48 * (48 + 56) * 4, 48 * 48 * 2)


def run(function, given):
    given = [t.detach().clone().requires_grad_() for t in given]
    with backends.use_backend("triton"):
        out = function(*given)
        out.float().square().sum().backward()
    return [out, *(t.grad for t in given)]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_all_paths_and_repeats_give_the_same_bits(activation, autocast, monkeypatch):
    function = taking_all(ops.linear, autocast=autocast, activation=activation, drop_path_scale=scales())
    given = tensors()
    eager = run(function, given)
    torch.compiler.reset()
    others = [run(function, given), run(torch.compile(function, fullgraph=True, backend="aot_eager"), given)]
    monkeypatch.setattr(backends, "registered_path", lambda *_: True)
    for other in (*others, run(function, given)):
        assert all(torch.equal(a, b) for a, b in zip(eager, other, strict=True))


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("save", [False, True])
def test_registered_op_passes_opcheck(save, activation):
    x, weight, bias, gamma, residual = (t.requires_grad_() for t in tensors((3,), 8, 16))
    op = torch.ops.fastdeit.linear_forward
    torch.library.opcheck(op, (x, weight, bias, gamma, None, residual, activation, torch.bfloat16, save, True))
    torch.library.opcheck(op, (x, weight, None, None, None, None, activation, torch.float32, save, save))


def test_large_activations_overflow_as_in_the_reference():
    x, weight, bias, *_ = tensors(dtype=torch.float16)
    with backends.use_backend("triton"):
        out = ops.linear(x * 1e4, weight * 10, bias, activation="gelu")
    z = torch.nn.functional.linear(x * 1e4, weight * 10, bias).float()
    expected = (
        z * (1 + torch.erf(z * 0.5**0.5)) / 2
    ).half()  # PyTorch's vectors on some CPUs make NaN of an infinite z
    assert not expected.isfinite().all()
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())


def test_empty_batch():
    given = [t.requires_grad_() for t in tensors((0, 7))]
    with backends.use_backend("triton"), testing.poisoned_memory():
        out = taking_all(ops.linear, activation="gelu")(*given)
        out.sum().backward()
    assert out.shape == (0, 7, 56)
    assert not any(t.grad.any() for t in given)


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["sum", "squares"])
def test_a_second_derivative_is_refused_clearly(loss):
    x, *rest = tensors((2, 2), 8, 16)
    x.requires_grad_()
    with backends.use_backend("triton"):
        (gradient,) = torch.autograd.grad(loss(taking_all(ops.linear)(x, *rest)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_reference_gradients(activation):
    given = [t.cpu().double().requires_grad_() for t in tensors((3,), 4, 6)]
    assert torch.autograd.gradcheck(taking_all(ops.linear, activation=activation), given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(activation="swish"), ValueError, "activation: expected None or one of gelu.*got 'swish'"),
        (dict(weight=torch.ones(56, 47)), ValueError, r"weight: expected shape \(rows, 48\), got \(56, 47\)"),
        (dict(weight=None), TypeError, "weight: expected a floating-point tensor, got NoneType"),
        (
            dict(weight=torch.ones(56, 48).half()),
            TypeError,
            "weight: expected torch.float32 as x has.*got torch.float16",
        ),
        (dict(bias=torch.ones(55)), ValueError, r"bias: expected shape \(56,\), got \(55,\)"),
        (dict(gamma=torch.ones(1)), ValueError, r"gamma: expected shape \(56,\), got \(1,\)"),
        (dict(residual=torch.ones(6, 8, 48)), ValueError, r"residual: expected shape \(6, 8, 56\), got \(6, 8, 48\)"),
        (dict(residual=torch.ones(6, 8, 56, device="meta")), ValueError, "residual: expected device cpu.*got meta"),
        (dict(drop_path_scale=torch.ones(2)), ValueError, r"drop_path_scale: expected one factor per sample.*\(2,\)"),
        (dict(drop_path_scale=torch.ones(6).half()), TypeError, "drop_path_scale: expected float32, got torch.float16"),
        (
            dict(x=torch.ones(2, 48, dtype=torch.long)),
            TypeError,
            "x: expected a floating-point tensor, got torch.int64",
        ),
        (dict(x=torch.tensor(1.0)), ValueError, r"x: expected shape \(\.\.\., C\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = dict(zip(NAMES, (t.cpu() for t in tensors()), strict=True)) | change
    with pytest.raises(error, match=message):
        ops.linear(**given)
