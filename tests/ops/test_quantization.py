"""`ops.add_layer_norm_quantize`, `ops.rescale` and `ops.quantized_linear`: rounding to the bit, numerics, odd and bad input."""

import math

import pytest
import torch

from fastdeit import backends, ops, testing
from fastdeit.kernels.runtime.architecture import architecture
from fastdeit.ops.quantized_formats import quantize_rows_reference
from fastdeit.testing import assert_close_to_oracle, interpreter_active, kernel_device

DEVICE = kernel_device()
FLOAT8 = torch.float8_e4m3fn
needs_float8 = pytest.mark.skipif(
    not interpreter_active() and architecture(torch.empty(0, device=DEVICE)) < 89,
    reason="conversion to float8 needs capability 8.9",
)
FORMATS = pytest.mark.parametrize(
    "dtype", [pytest.param(FLOAT8, id="float8", marks=needs_float8), pytest.param(torch.int8, id="int8")]
)
BFLOAT16 = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.bfloat16)  # every value there is
FINITE = BFLOAT16[BFLOAT16.isfinite()]


def defined(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The value of a format that is nearest to each of y, float32; of two as near the one with the even last bit."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = codes[codes.float().isfinite() & (codes.float().abs() <= (448 if dtype == FLOAT8 else 127))]
    values, order = codes.double().sort(stable=True)
    odd = (codes.view(torch.uint8)[order] & 1).bool()
    y = y.double().clamp(values[0], values[-1])
    above = torch.searchsorted(values, y).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    up, down = values[above] - y, y - values[below]
    chosen = torch.where((up < down) | ((up == down) & odd[below]), above, below)
    return values[chosen].float()


@FORMATS
@pytest.mark.parametrize("scale", [1.0, 0.0625, 0.037])
def test_a_given_scale_rounds_every_bfloat16_as_the_format_defines(dtype, scale):
    given = torch.tensor([scale], device=DEVICE)
    with backends.use_backend("triton"):
        got = ops.rescale(FINITE[None].to(DEVICE), scale=given, out_dtype=dtype)[0].cpu()
    assert torch.equal(got.float(), defined(FINITE.float() * (1 / given.cpu()), dtype))
    reference = ops.rescale_reference(FINITE[None], scale=given.cpu(), out_dtype=dtype)[0]
    assert torch.equal(got.view(torch.uint8), reference.view(torch.uint8))  # minus zero too


@FORMATS
def test_a_scale_for_each_token_rounds_every_bfloat16_as_the_format_defines(dtype):
    """A token of alternating ones is normalised already, so that a weight is what is rounded."""
    smallest, largest = (
        FINITE.abs() < 1e-30,
        FINITE.abs() > 1e30,
    )  # whose scales are no longer those of float32's normal numbers
    values = FINITE[~(smallest | largest)].sort(stable=True).values
    values = values[: len(values) // 512 * 512].view(-1, 512)[::4]
    x = torch.tensor([1.0, -1.0]).repeat(256)[None]
    for weight in values:
        with backends.use_backend("triton"):
            _, q, scale = ops.add_layer_norm_quantize(x, None, weight.to(DEVICE), None, 0.0, dtype=dtype)
        y = weight.float() * x[0].cpu()
        most = y.abs().max().clamp(min=1e-12)
        bound = torch.tensor(448.0 if dtype == FLOAT8 else 127.0)
        assert torch.equal(scale.cpu(), (most / bound)[None])
        assert torch.equal(q.cpu().float()[0], defined(y * (bound / most), dtype))


@needs_float8
def test_the_interpreter_is_corrected():
    """Triton 3.6 gives 64 for 126.9."""
    with backends.use_backend("triton"):
        got = ops.rescale(torch.tensor([[126.9]], device=DEVICE), scale=torch.ones(1, device=DEVICE), out_dtype=FLOAT8)
    assert got.item() == 128.0


@pytest.mark.parametrize("stream", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", ["nothing", "branch", "everything"])
@FORMATS
def test_add_layer_norm_quantize(dtype, given, stream):
    x, branch = torch.randn(2, 5, 72, device=DEVICE).to(stream), torch.randn(2, 5, 72, device=DEVICE).to(stream)
    gamma, weight, bias = (torch.randn(3, 72, device=DEVICE) + 1).to(stream).unbind()
    parameters = (weight, bias) if given == "everything" else (None, None)
    args = (x, None if given == "nothing" else branch, *parameters)
    options = dict(gamma=gamma if given == "everything" else None, dtype=dtype)
    with backends.use_backend("triton"), testing.poisoned_memory():
        x_new, q, scale = ops.add_layer_norm_quantize(*args, 1e-6, **options)
    plain = ops.add_layer_norm_quantize_reference(*args, 1e-6, **options)
    wide = [t if t is None else t.double() for t in args]
    gamma = options["gamma"] if options["gamma"] is None else options["gamma"].double()
    added = ops.add_layer_norm_quantize_reference(*wide, 1e-6, gamma=gamma, dtype=dtype)[0]
    assert_close_to_oracle("x_new", x_new, added, plain[0])
    # The stream is rounded before it is normalised, so that the oracle begins with that.
    exact = ops.add_layer_norm_quantize_reference(x_new.double(), None, *parameters, 1e-6, dtype=dtype)
    assert_close_to_oracle("scale", scale, exact[2], plain[2])
    assert q.dtype == dtype
    tokens = ops.layer_norm_reference(x_new.double(), *parameters, 1e-6)
    got, eager = (values.float() * scales[..., None] for values, scales in ((q, scale), plain[1:]))
    assert_close_to_oracle("tokens", got, tokens, eager)


@FORMATS
def test_a_token_that_is_not_finite_has_a_nan_for_its_scale(dtype):
    x = torch.randn(4, 64, device=DEVICE)
    x[1, 3], x[2, 5], x[3] = math.nan, math.inf, 0.0
    with backends.use_backend("triton"):
        found = ops.add_layer_norm_quantize(x, None, None, None, dtype=dtype)
    expected = ops.add_layer_norm_quantize_reference(x, None, None, None, dtype=dtype)
    for _, q, scale in (found, expected):
        assert scale.isnan().tolist() == [False, True, True, False]
        assert not q[3].float().any()


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("kind", ["int32", "float16", "bfloat16"])
def test_rescale_to_a_float_dtype(kind, activation):
    z = torch.randint(-3000, 3000, (2, 5, 24), dtype=torch.int32) if kind == "int32" else torch.randn(2, 5, 24) * 100
    z = z.to(DEVICE, getattr(torch, kind))
    row_scale, column_scale = torch.rand(2, 5, device=DEVICE) / 100, torch.rand(24, device=DEVICE)
    bias = torch.randn(24, device=DEVICE).bfloat16()
    options = dict(row_scale=row_scale, column_scale=column_scale, bias=bias, activation=activation)
    with backends.use_backend("triton"), testing.poisoned_memory():
        got = ops.rescale(z, **options, out_dtype=torch.bfloat16)
    plain = ops.rescale_reference(z, **options, out_dtype=torch.bfloat16)
    exact = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    assert_close_to_oracle("y", got, ops.rescale_reference(z, **exact, out_dtype=torch.float64), plain)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("tokens", [True, False])
@FORMATS
def test_quantized_linear(dtype, tokens, rows):
    q, row_scale = quantize_rows_reference(torch.randn(rows, 48), dtype)
    weight, column_scale = quantize_rows_reference(torch.randn(32, 48), dtype)
    bias = torch.randn(32).bfloat16()
    given = [t.to(DEVICE) for t in (q, row_scale, weight, column_scale, bias)]
    given[1] = given[1] if tokens else None
    with backends.use_backend("triton"):
        got = ops.quantized_linear(*given, activation="gelu")
    plain = ops.quantized_linear_reference(*given, activation="gelu")
    exact = ops.quantized_linear_reference(*given, activation="gelu", out_dtype=torch.float64)
    assert_close_to_oracle("y", got, exact, plain)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of a CPU, where _scaled_mm takes one scale a tensor")
def test_float8_products_are_those_of_scaled_mm():
    q, row_scale = quantize_rows_reference(torch.randn(5, 48), FLOAT8)
    weight, column_scale = quantize_rows_reference(torch.randn(32, 48), FLOAT8)
    one = torch.ones(())
    product = torch._scaled_mm(q, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    got = ops.quantized_linear(q, row_scale, weight, column_scale, out_dtype=torch.float32)
    expected = product * row_scale[:, None] * column_scale
    assert (got - expected).norm() <= 1e-6 * expected.norm()


@FORMATS
def test_an_eight_bit_result_feeds_the_next_layer(dtype):
    q, row_scale = quantize_rows_reference(torch.randn(2, 5, 32), dtype)
    weight, column_scale = quantize_rows_reference(torch.randn(16, 32), dtype)
    scale = torch.tensor([0.2])
    got = ops.quantized_linear(q, row_scale, weight, column_scale, activation="gelu", scale=scale, out_dtype=dtype)
    exact = ops.quantized_linear_reference(
        q, row_scale, weight, column_scale, activation="gelu", out_dtype=torch.float64
    )
    assert got.dtype == dtype and got.shape == (2, 5, 16)
    steps = torch.full_like(exact, 0.2) if dtype == torch.int8 else exact.abs() / 8 + 0.2 / 512
    assert ((got.double() * 0.2 - exact).abs() <= 0.501 * steps).all()


@FORMATS
def test_empty_and_strided_input(dtype):
    x = torch.randn(4, 6, 32, device=DEVICE).bfloat16()[:, ::2]
    with backends.use_backend("triton"):
        for given in (x, x[:0]):
            _, q, _ = ops.add_layer_norm_quantize(given, given, None, None, dtype=dtype)
            _, *expected = ops.add_layer_norm_quantize_reference(given, given, None, None, dtype=dtype)
            assert torch.equal(q.view(torch.uint8), expected[0].view(torch.uint8)) and q.shape == given.shape
            one = torch.ones(1, device=DEVICE)
            assert ops.rescale(given, scale=one, out_dtype=dtype).shape == given.shape


@FORMATS
def test_the_registered_ops_pass_opcheck(dtype):
    x = torch.randn(3, 32, device=DEVICE).bfloat16()
    with backends.use_backend("triton"):
        for branch in (None, x.clone()):
            given = (x, branch, None, None, None, 1e-6, dtype)
            torch.library.opcheck(
                torch.ops.fastdeit.add_layer_norm_quantize, given, test_utils=("test_schema", "test_faketensor")
            )
        given = (x, None, None, None, "gelu", torch.ones(1, device=DEVICE), dtype)
        torch.library.opcheck(torch.ops.fastdeit.rescale, given, test_utils=("test_schema", "test_faketensor"))


X, Q, W = torch.ones(2, 32), torch.ones(2, 32, dtype=torch.int8), torch.ones(16, 32, dtype=torch.int8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.add_layer_norm_quantize(X, None, None, None, dtype=torch.uint8),
            TypeError,
            "dtype: expected one of",
        ),
        (
            lambda: ops.add_layer_norm_quantize(X, X[:1], None, None, dtype=torch.int8),
            ValueError,
            "branch: expected the shape",
        ),
        (
            lambda: ops.add_layer_norm_quantize(X.int(), None, None, None, dtype=torch.int8),
            TypeError,
            "x: expected a float",
        ),
        (
            lambda: ops.rescale(X, out_dtype=torch.int8),
            ValueError,
            r"scale: expected a scale for torch\.int8, got None",
        ),
        (
            lambda: ops.rescale(X, scale=torch.ones(1), out_dtype=torch.float16),
            ValueError,
            "expected None for torch.float16",
        ),
        (
            lambda: ops.rescale(X, scale=torch.ones(2), out_dtype=torch.int8),
            ValueError,
            r"scale: expected shape \(1,\)",
        ),
        (lambda: ops.rescale(X, row_scale=torch.ones(3), out_dtype=torch.float16), ValueError, r"row_scale: .* \(2,\)"),
        (
            lambda: ops.rescale(X, column_scale=torch.ones(32).half(), out_dtype=torch.float16),
            TypeError,
            "column_scale: .*float32",
        ),
        (
            lambda: ops.rescale(X, activation="tanh", out_dtype=torch.float16),
            ValueError,
            "activation: expected None or one",
        ),
        (
            lambda: ops.rescale(X.bool(), out_dtype=torch.float16),
            TypeError,
            r"z: expected a floating-point or int32 .*bool",
        ),
        (lambda: ops.rescale(X, out_dtype=torch.int32), TypeError, r"out_dtype: expected one of .*, got torch\.int32"),
        (
            lambda: ops.quantized_linear(X, None, W, torch.ones(16)),
            TypeError,
            r"q: expected one of .*, got torch\.float32",
        ),
        (
            lambda: ops.quantized_linear(Q, None, W.float(), torch.ones(16)),
            TypeError,
            r"weight: expected torch\.int8 as q",
        ),
        (
            lambda: ops.quantized_linear(Q, None, W[:, :16], torch.ones(16)),
            ValueError,
            r"weight: expected shape \(rows, 32\)",
        ),
        (lambda: ops.quantized_linear(Q, None, W[:8], torch.ones(8)), ValueError, "weight: expected multiples of 16"),
        (
            lambda: ops.quantized_linear(Q, None, W, None),
            TypeError,
            "column_scale: expected a float32 tensor, got NoneType",
        ),
        (
            lambda: ops.quantized_linear(Q, torch.ones(3), W, torch.ones(16)),
            ValueError,
            r"row_scale: expected shape \(2,\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_gpu_without_float8(monkeypatch):
    """On capability 8.0 the reference runs, and the backend "triton" says why it cannot."""
    from fastdeit.ops import quantized_formats

    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(quantized_formats, "architecture", lambda x: 80)
    assert "compute capability 8.0 has no conversion to float8" in quantized_formats.why_no_format(OnGpu(), FLOAT8)
    assert quantized_formats.why_no_format(OnGpu(), torch.int8) is None
