"""`ops.layer_norm` and `ops.add_layer_norm`: numerics by the contract, layouts, both paths, bad input."""

import itertools

import pytest
import torch

from fastdeit import backends, ops, testing
from fastdeit.ops import launchers
from fastdeit.ops.layer_norm_op import MAX_CHANNELS, why_reference
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

DTYPES = kernel_dtypes()
DEVICE = kernel_device()


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def parameters(channels, dtype=torch.float32, count=2):
    return [randn(channels).to(dtype) for _ in range(count)]


def add(function, **fixed):
    """add_layer_norm with gamma as a positional argument, so that its gradient is tested, and the factors per sample fixed."""

    def call(x, branch, weight, bias, gamma=None, drop_path_scale=None):
        scale = drop_path_scale
        if scale is not None and x.dtype == torch.float64:
            scale = scale.double()
        return function(x, branch, weight, bias, 1e-6, gamma=gamma, drop_path_scale=scale, **fixed)

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 192, 384, 1000, 1024, 8192])  # one, powers of two or not, the widest
def test_layer_norm_is_as_accurate_as_eager(channels, dtype):
    x = (3 * randn(3, 3, channels) + 2).to(dtype)
    assert_as_accurate_as_eager(ops.layer_norm, ops.layer_norm_reference, x, *parameters(channels, dtype), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 192, 1000, 8192])
def test_add_layer_norm_is_as_accurate_as_eager(channels, dtype):
    x, branch = (3 * randn(3, 3, channels) + 2).to(dtype), randn(3, 3, channels, dtype=dtype)
    scale = torch.tensor([0.0, 1 / 0.9, 1.0], device=DEVICE)

    def with_scale(function):
        call = add(function)
        return lambda *tensors: call(*tensors, drop_path_scale=scale)

    op, reference = with_scale(ops.add_layer_norm), with_scale(ops.add_layer_norm_reference)
    assert_as_accurate_as_eager(op, reference, x, branch, *parameters(channels, dtype, 3))


@pytest.mark.parametrize("low", DTYPES[1:])
def test_residual_stream_of_autocast(low):
    """An fp32 stream, a low-precision branch, fp32 parameters and a low-precision result: what autocast gives a block."""
    x, branch = 3 * randn(2, 5, 192) + 2, randn(2, 5, 192, dtype=low)
    op, reference = (add(f, out_dtype=low) for f in (ops.add_layer_norm, ops.add_layer_norm_reference))
    with backends.use_backend("triton"):
        x_new, normed = op(x, branch, *parameters(192))
    assert (x_new.dtype, normed.dtype) == (torch.float32, low)
    assert_as_accurate_as_eager(op, reference, x, branch, *parameters(192, count=3))


@pytest.mark.parametrize("weights", list(itertools.product([False, True], repeat=2)))
def test_without_weight_or_bias(weights):
    given = [p if there else None for p, there in zip(parameters(192), weights, strict=True)]
    assert_as_accurate_as_eager(ops.layer_norm, ops.layer_norm_reference, randn(2, 3, 192), *given, 1e-6)


@pytest.mark.parametrize("frozen", [f for n in range(6) for f in itertools.combinations(range(5), n)])
def test_every_subset_of_frozen_inputs(frozen):
    tensors = (randn(2, 2, 192), randn(2, 2, 192), *parameters(192, count=3))
    op, reference = add(ops.add_layer_norm), add(ops.add_layer_norm_reference)
    assert_as_accurate_as_eager(op, reference, *tensors, frozen=frozen)


LAYOUTS = {
    "first tokens": lambda: randn(3, 7, 192)[:, :2],
    "every second token": lambda: randn(3, 8, 192)[:, ::2],
    "every second channel": lambda: randn(3, 4, 384)[..., ::2],
    "part of a packed row": lambda: randn(3, 4, 3 * 192)[..., 192:384],
    "odd row length": lambda: randn(3, 4, 201)[..., :192],
    "transposed": lambda: randn(4, 3, 192).transpose(0, 1),
    "channels first": lambda: randn(2, 192, 5).transpose(1, 2),
    "expanded": lambda: randn(1, 1, 192).expand(3, 4, 192),
    "one dimension": lambda: randn(192),
    "two dimensions": lambda: randn(9, 400)[:, :192],
    "four dimensions": lambda: randn(2, 3, 4, 192).permute(1, 0, 2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    x = LAYOUTS[layout]()
    weight, bias = parameters(192)
    with backends.use_backend("triton"), testing.poisoned_memory():
        y = ops.layer_norm(x, weight, bias)
        _, z = ops.add_layer_norm(x.new_zeros(x.shape), x, weight, bias)
    expected = ops.layer_norm_reference(x.double(), weight.double(), bias.double())
    eager = ops.layer_norm_reference(x, weight, bias)
    testing.assert_close_to_oracle("y", y, expected, eager, 10.0)
    testing.assert_close_to_oracle("added", z, expected, eager, 10.0)


def test_offsets_pass_two_to_the_31():
    """Rows 2^30 elements apart in memory that is reserved but, but for the rows themselves, never touched."""
    stride = 2**30 + 16
    x = torch.empty(2 * stride + 8, dtype=torch.float16, device=DEVICE).as_strided((3, 1, 8), (stride, 8, 1))
    x.copy_(randn(3, 1, 8))
    dense = x.contiguous()

    def run(x):
        x = x.detach().requires_grad_()
        with backends.use_backend("triton"):
            x_new, y = ops.add_layer_norm(x, x, None, None)
        y.backward(torch.arange(24.0, device=DEVICE).reshape(3, 1, 8).half())
        return x_new, y, x.grad

    assert all(torch.equal(a, b) for a, b in zip(run(x), run(dense), strict=True))


@pytest.mark.parametrize("shape", [(0, 197, 192), (4, 0, 192), (0, 192)])
def test_empty_input_gives_empty_output_and_zero_gradients(shape):
    x, weight, bias = randn(*shape).requires_grad_(), *(p.requires_grad_() for p in parameters(192))
    with backends.use_backend("triton"), testing.poisoned_memory():
        y = ops.layer_norm(x, weight, bias)
        y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape
    assert not weight.grad.any() and not bias.grad.any()


def test_repeated_runs_give_the_same_bits():
    def run():
        torch.manual_seed(1)
        tensors = [randn(3, 40, 192), randn(3, 40, 192), *parameters(192, count=3)]
        tensors = [t.requires_grad_() for t in tensors]
        with backends.use_backend("triton"):
            out = add(ops.add_layer_norm)(*tensors)
            torch.autograd.backward(out, [torch.ones_like(o) / 3 for o in out])
        return [*out, *(t.grad for t in tensors)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_row_of_equal_values_normalises_to_the_bias():
    weight, bias = parameters(192)
    with backends.use_backend("triton"):
        y = ops.layer_norm(torch.full((2, 192), 7.25, device=DEVICE), weight, bias)
    assert torch.equal(y, bias.expand(2, 192))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_spread_over_their_row_alone(value):
    x = randn(3, 192)
    x[1, 5] = value
    weight, bias = parameters(192)
    with backends.use_backend("triton"):
        y = ops.layer_norm(x, weight, bias)
    assert torch.equal(y.isnan(), ops.layer_norm_reference(x, weight, bias).isnan())
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()


def test_a_large_mean_does_not_cost_the_variance():
    """The sum of squares minus the squared mean would lose every digit here."""
    x = randn(4, 768) + 1e4
    assert_as_accurate_as_eager(ops.layer_norm, ops.layer_norm_reference, x, *parameters(768), 1e-6)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_may_go_unused(used):
    tensors = [randn(2, 3, 192), randn(2, 3, 192), *parameters(192)]
    op, reference = (lambda *t, f=f: add(f)(*t)[used] for f in (ops.add_layer_norm, ops.add_layer_norm_reference))
    assert_as_accurate_as_eager(op, reference, *tensors)


def test_inputs_are_not_written_to():
    tensors = [randn(2, 3, 192), randn(2, 3, 192), *parameters(192, count=3)]
    before = [t.clone() for t in tensors]
    with backends.use_backend("triton"):
        add(ops.add_layer_norm)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_nothing_is_kept_without_gradients(monkeypatch):
    kept, launcher = [], launchers.layer_norm_forward
    monkeypatch.setattr(
        launchers, "layer_norm_forward", lambda *a, **k: kept.append(k["keep_statistics"]) or launcher(*a, **k)
    )
    x, weight = randn(2, 192).requires_grad_(), randn(192)
    for mode in (torch.no_grad, torch.inference_mode):
        with backends.use_backend("triton"), mode():
            assert ops.layer_norm(x, weight, None).grad_fn is None
    assert kept == [False, False]


def test_a_second_derivative_is_refused_clearly():
    x = randn(2, 192).requires_grad_()
    with backends.use_backend("triton"):
        (gradient,) = torch.autograd.grad(ops.layer_norm(x, None, None).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_registered_and_eager_paths_give_the_same_bits(monkeypatch):
    tensors = [randn(2, 3, 192), randn(2, 3, 192), *parameters(192, count=3)]

    def run():
        inputs = [t.clone().requires_grad_() for t in tensors]
        with backends.use_backend("triton"):
            x_new, y = add(ops.add_layer_norm)(*inputs)
            z = ops.layer_norm(y, inputs[2], inputs[3])
        (x_new.sum() + z.square().sum()).backward()
        return [x_new, y, z, *(t.grad for t in inputs)]

    eager = run()
    monkeypatch.setattr(backends, "registered_path", lambda *_: True)
    assert all(torch.equal(a, b) for a, b in zip(eager, run(), strict=True))


def test_compiles_to_one_graph_forward_and_backward():
    tensors = [randn(2, 3, 192), randn(2, 3, 192), *parameters(192, count=3)]
    torch.compiler.reset()

    def step(*inputs):
        return add(ops.add_layer_norm)(*inputs)[1]

    def run(function):
        inputs = [t.clone().requires_grad_() for t in tensors]
        y = function(*inputs)
        y.square().sum().backward()
        return [y, *(t.grad for t in inputs)]

    with backends.use_backend("triton"):
        eager = run(step)
        compiled = run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_registered_ops_pass_opcheck(needs_gradient):
    x, branch, weight, bias, gamma = (
        t.requires_grad_(needs_gradient) for t in (randn(2, 3, 8), randn(2, 3, 8), *parameters(8, count=3))
    )
    scale = torch.tensor([0.0, 2.0], device=DEVICE)
    given = (x, weight, bias, 1e-6, torch.float32, needs_gradient)
    torch.library.opcheck(torch.ops.fastdeit.layer_norm_forward, given)
    given = (x, branch, weight, bias, gamma, scale, 1e-6, torch.float32, needs_gradient)
    torch.library.opcheck(torch.ops.fastdeit.add_layer_norm_forward, given)


def test_reference_gradients():
    tensors = [torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(2)]
    tensors += [torch.randn(5, dtype=torch.float64) for _ in range(3)]
    tensors = [t.requires_grad_() for t in tensors]
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, b, w, c, g: ops.add_layer_norm(x, b, w, c, 1e-3, gamma=g, drop_path_scale=scale), tensors
    )


def test_torch_func_takes_the_reference():
    x = randn(4, 192)
    with backends.use_backend("triton"):
        jacobian = torch.func.grad(lambda t: ops.layer_norm(t, None, None).square().sum())(x)
    expected = torch.func.grad(lambda t: ops.layer_norm_reference(t, None, None).square().sum())(x)
    assert torch.equal(jacobian, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            lambda: (torch.randn(2, 192), torch.ones(191), None),
            ValueError,
            r"weight: expected shape \(192,\).*got \(191,\)",
        ),
        (lambda: (torch.randn(2, 192), None, torch.ones(1, 192)), ValueError, r"bias: expected shape \(192,\)"),
        (lambda: (torch.arange(192), None, None), TypeError, r"x: expected a floating-point tensor, got torch.int64"),
        (lambda: (torch.randn(2, 4), torch.arange(4), None), TypeError, r"weight: expected a floating-point tensor"),
        (lambda: (torch.tensor(1.0), None, None), ValueError, r"x: expected shape \(\.\.\., C\)"),
        (lambda: (torch.randn(2, 4), torch.ones(4, device="meta"), None), ValueError, r"weight: expected device cpu"),
        (
            lambda: (torch.randn(2, 4), None, None, float("nan")),
            ValueError,
            r"eps: expected a finite value >= 0, got nan",
        ),
        (lambda: (torch.randn(2, 4), None, None, -1.0), ValueError, r"eps: expected a finite value >= 0, got -1.0"),
        (lambda: ([1.0], None, None), TypeError, r"x: expected a floating-point tensor, got list"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.layer_norm(*arguments())


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (
            dict(branch=torch.randn(2, 3, 5)),
            ValueError,
            r"branch: expected the shape of x \(2, 3, 4\), got \(2, 3, 5\)",
        ),
        (dict(branch=torch.ones(2, 3, 4, dtype=torch.long)), TypeError, r"branch: expected a floating-point tensor"),
        (dict(gamma=torch.ones(3)), ValueError, r"gamma: expected shape \(4,\)"),
        (dict(drop_path_scale=torch.ones(3)), ValueError, r"drop_path_scale: expected one factor per sample"),
        (
            dict(drop_path_scale=torch.ones(2).half()),
            TypeError,
            r"drop_path_scale: expected float32, got torch.float16",
        ),
        (dict(drop_path_scale=torch.ones(2, requires_grad=True)), ValueError, r"drop_path_scale: .*without gradient"),
        (dict(out_dtype=torch.int32), TypeError, r"out_dtype: expected a floating-point dtype"),
    ],
)
def test_bad_residual_input_is_named(keywords, error, message):
    keywords = dict(branch=torch.randn(2, 3, 4)) | keywords
    with pytest.raises(error, match=message):
        ops.add_layer_norm(torch.randn(2, 3, 4), keywords.pop("branch"), None, None, **keywords)


def test_more_channels_than_the_kernel_holds_run_the_reference():
    x = randn(1, MAX_CHANNELS + 1)
    assert "channels are more than" in why_reference(x)
    assert torch.equal(ops.layer_norm(x, None, None), ops.layer_norm_reference(x, None, None))
    with backends.use_backend("triton"), pytest.raises(RuntimeError, match="channels are more than"):
        ops.layer_norm(x, None, None)
