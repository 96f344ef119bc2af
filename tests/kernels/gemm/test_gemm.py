"""Our GEMM kernels, forced through the ops: numerics by the contract, what falls back, repeats."""

from collections import Counter

import pytest
import torch

from fastdeit import backends, ops
from fastdeit.kernels.gemm import config as gemm_config
from fastdeit.kernels.gemm import linear as kernels_linear
from fastdeit.kernels.gemm.config import Gemm, Measured, Tile, use_gemm
from fastdeit.kernels.gemm.forward import vector
from fastdeit.kernels.runtime.architecture import architecture
from fastdeit.ops import mlp_op
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes, poisoned_memory

DEVICE = kernel_device()
DTYPES = kernel_dtypes(products=True)
TILE = Tile(32, 64, 32)  # small, for the interpreter; a persistent program then owns several
OURS = ("triton", "tma")

each_backend = pytest.mark.parametrize("backend", OURS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def launched(monkeypatch) -> Counter:
    """Counts the products that kernels of ours make, and the pointwise kernels that go with a library's."""
    calls = Counter()

    def counted(name):
        kernel = getattr(kernels_linear, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return kernel(*args, **kwargs)

        return call

    for name in ("gemm_forward", "gemm_backward", "activation_forward", "activation_backward", "scale_add_forward"):
        monkeypatch.setattr(kernels_linear, name, counted(name))
    return calls


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def linear_tensors(rows=(6, 9), channels=48, out=72, dtype=DTYPES[0]):
    """x, weight, bias, gamma, residual."""
    weight = randn(out, channels, dtype=dtype) * channels**-0.5
    return randn(*rows, channels, dtype=dtype), weight, *(randn(*s, out, dtype=dtype) for s in ((), (), rows))


def mlp_tensors(rows=(2, 19), channels=24, hidden=64, dtype=DTYPES[0], bias=True):
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


def branch_tensors(rows=(2, 11), dtype=torch.float32):
    """x, w1, b1, w2, b2, norm_weight, norm_bias, gamma."""
    rest = 1 + 0.1 * randn(24), 0.1 * randn(24), 0.5 + randn(24).abs()
    return *mlp_tensors(rows, dtype=dtype), *(t.to(dtype) for t in rest)


def branch(function, autocast, **options):
    """A branch op, or its reference, of `branch_tensors`."""

    def call(x, w1, b1, w2, b2, norm_weight, norm_bias, gamma):
        with torch.autocast(DEVICE.type, dtype=autocast, enabled=autocast is not None and x.dtype != torch.float64):
            given = (x, norm_weight, norm_bias, 1e-6, w1, b1, w2, b2)
            if function in (ops.layer_norm_mlp, ops.layer_norm_mlp_reference):
                return function(*given, gamma=gamma, residual=x)
            return function(x, x, *given[1:], gamma=gamma, **options)

    return call


branches = pytest.mark.parametrize(
    ("op", "reference", "products"),
    [
        (ops.add_layer_norm_mlp, ops.add_layer_norm_mlp_reference, dict(gemm_forward=1, gemm_backward=1)),
        (
            ops.layer_norm_mlp,
            ops.layer_norm_mlp_reference,
            dict(gemm_forward=1, gemm_backward=1),
        ),
    ],
    ids=["add_layer_norm_mlp", "layer_norm_mlp"],
)


@each_backend
@branches
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [*((dtype, None) for dtype in DTYPES), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)],
)
def test_a_whole_branch(dtype, autocast, op, reference, products, backend, launched):
    with use_gemm(backend, TILE):
        pair = (branch(f, autocast) for f in (op, reference))
        assert_as_accurate_as_eager(*pair, *branch_tensors(dtype=dtype))
    assert launched == products


@each_backend
def test_a_lean_branch(backend, launched):
    with use_gemm(backend, TILE):
        op = branch(ops.add_layer_norm_mlp, torch.float16, recompute="preactivation")
        reference = branch(ops.add_layer_norm_mlp_reference, torch.float16)
        assert_as_accurate_as_eager(op, reference, *branch_tensors())
    assert launched == dict(gemm_forward=1, gemm_backward=1)


@branches
@pytest.mark.parametrize("trained", [(0,), (2,), (3,), (5, 6)], ids=["x", "b1", "w2", "norm"])
def test_a_branch_with_little_to_train(trained, op, reference, products):
    with use_gemm("triton", TILE):
        pair = (branch(f, torch.float16) for f in (op, reference))
        assert_as_accurate_as_eager(*pair, *branch_tensors(), frozen=[i for i in range(8) if i not in trained])


@pytest.mark.parametrize(
    ("epilogue", "N", "K", "grad", "expected"),
    [
        ("activation", 64, 24, False, dict(gemm_forward=1)),
        ("activation", 64, 24, True, dict(activation_forward=1, activation_backward=1)),
        ("activation_z", 64, 24, True, dict(gemm_forward=1, activation_backward=1)),
        ("derivative", 64, 24, True, dict(activation_forward=1, gemm_backward=1)),
        ("residual", 24, 64, True, dict(activation_forward=1, activation_backward=1)),
    ],
)
def test_the_table_s_entry_replaces_its_own_product_of_a_branch(epilogue, N, K, grad, expected, launched, monkeypatch):
    entry = Measured(range(22, 23), N, K, torch.float16, epilogue, Gemm("triton", TILE))
    monkeypatch.setattr(gemm_config, "GEMMS", {architecture(torch.empty(0, device=DEVICE)): (entry,)})
    gemm_config._select.cache_clear()
    given = [t.requires_grad_(grad) for t in branch_tensors()]
    with backends.use_backend("triton"):
        x_new, out = branch(ops.add_layer_norm_mlp, torch.float16)(*given)
    if grad:
        (x_new.sum() + out.float().sum()).backward()
    gemm_config._select.cache_clear()
    assert launched == expected


@pytest.mark.parametrize(("activation", "ours"), [("gelu", True), ("gelu_tanh", False), ("relu", False)])
def test_the_table_speaks_for_the_activation_that_it_was_tuned_with(activation, ours, launched, monkeypatch):
    entry = Measured(range(9, 10), 64, 24, DTYPES[0], "activation", Gemm("triton", TILE))
    monkeypatch.setattr(gemm_config, "GEMMS", {architecture(torch.empty(0, device=DEVICE)): (entry,)})
    gemm_config._select.cache_clear()
    with backends.use_backend("triton"):
        ops.mlp(*mlp_tensors((9,)), activation=activation)
    gemm_config._select.cache_clear()
    assert launched == (dict(gemm_forward=1) if ours else dict(activation_forward=1))


@pytest.mark.parametrize("op", [ops.add_layer_norm_mlp, ops.layer_norm_mlp], ids=lambda op: op.__name__)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_branch_without_gradients_writes_no_pre_activation(compiled, op, pre_activations):
    function = branch(op, torch.float16)
    torch.compiler.reset()
    function = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    given = branch_tensors((5,))
    with use_gemm("triton", TILE), backends.use_backend("triton"):
        plain = function(*given)
        with torch.no_grad():
            function(*(t.requires_grad_() for t in given))
        differentiated = function(*given)
    assert [written for written in pre_activations if written is not None] == [False, False, True]
    pairs = zip(plain, differentiated, strict=True) if isinstance(plain, tuple) else [(plain, differentiated)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def scalar_gelu(monkeypatch):
    """The reference's GELU as of single elements, and on a GPU: PyTorch's vectors on some CPUs make NaN of infinity."""

    def gelu(x):
        wide = x.float()
        return (wide * (1 + torch.erf(wide * 0.5**0.5)) / 2).to(x.dtype)

    monkeypatch.setitem(mlp_op.ACTIVATIONS, "gelu", gelu)


@each_backend
def test_large_activations_overflow_as_in_the_reference(backend, launched, scalar_gelu):
    x, w1, *rest = mlp_tensors((5,), dtype=torch.float16)
    given = (x, w1 * 3e4, *rest)
    with use_gemm(backend, TILE), backends.use_backend("triton"):
        out = ops.mlp(*given)
    expected = ops.mlp_reference(*given)
    assert launched["gemm_forward"] == 1 and not expected.isfinite().all()
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())


@pytest.mark.parametrize("backend", ["cublas", *OURS])
@branches
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float16, None), (torch.float32, torch.float16)])
def test_a_branch_overflows_as_the_reference_does(
    dtype, autocast, op, reference, products, backend, launched, scalar_gelu
):
    """Gradients may be finite where PyTorch's pass through fp16 on their way to fp32, but not the other way round."""
    x, w1, *rest = branch_tensors((15,), dtype)

    def run(function):
        given = [t.detach().clone().requires_grad_() for t in (x, w1 * 3e4, *rest)]
        outputs = branch(function, autocast)(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
        return outputs, [t.grad for t in given]

    with use_gemm(backend, TILE), backends.use_backend("triton"):
        outputs, gradients = run(op)
    expected, eagers = run(reference)
    assert not expected[-1].isfinite().all()
    for out, eager in zip(outputs, expected, strict=True):
        assert torch.equal(out.isnan(), eager.isnan()) and torch.equal(out.isinf(), eager.isinf())
    assert all((ours.isfinite() >= eager.isfinite()).all() for ours, eager in zip(gradients, eagers, strict=True))
    assert launched["gemm_forward"] == (0 if backend == "cublas" else products["gemm_forward"])


@branches
def test_a_branch_without_biases(op, reference, products, launched):
    x, w1, _, w2, _, norm_weight, _, gamma = branch_tensors()
    given = x, w1, None, w2, None, norm_weight, None, gamma
    with use_gemm("triton", TILE):
        assert_as_accurate_as_eager(*(branch(f, torch.bfloat16) for f in (op, reference)), *given)
    assert launched == products


@each_backend
@pytest.mark.parametrize("of_a_branch", [False, True])
def test_repeats_give_the_same_bits(of_a_branch, backend):
    function = branch(ops.layer_norm_mlp, torch.bfloat16) if of_a_branch else ops.mlp
    fixed = branch_tensors((3, 12)) if of_a_branch else mlp_tensors((3, 23))

    def run():
        given = [t.clone().requires_grad_() for t in fixed]
        with use_gemm(backend, TILE), backends.use_backend("triton"), poisoned_memory():
            out = function(*given)
        out.sum().backward()
        return [out, *(t.grad for t in given)]

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
    assert not launched["gemm_forward"]
    assert torch.equal(out, kernels_linear.linear_forward(x, w1, b1, activation="gelu")[0])


def test_results_that_a_descriptor_cannot_express_fall_back(launched):
    with use_gemm("tma", TILE):
        assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, *mlp_tensors((9,), 16, 35))
    assert launched == dict(activation_forward=1, activation_backward=1)


@pytest.fixture
def pre_activations(monkeypatch) -> list[bool | None]:
    """Whether each product of ours with an activation wrote what that acts on; None for other products."""
    written = []
    forward = kernels_linear.gemm_forward

    def call(*args, activation, needs_z, **kwargs):
        written.append(None if activation is None else needs_z)
        return forward(*args, activation=activation, needs_z=needs_z, **kwargs)

    monkeypatch.setattr(kernels_linear, "gemm_forward", call)
    return written


@pytest.mark.parametrize("compiled", [False, True])
def test_without_gradients_the_pre_activation_is_not_written(compiled, pre_activations):
    given = mlp_tensors((5,))
    torch.compiler.reset()
    mlp, linear = (torch.compile(f, backend="aot_eager") if compiled else f for f in (ops.mlp, ops.linear))
    with use_gemm("triton", TILE), backends.use_backend("triton"):
        mlp(*given)
        linear(*given[:3], activation="gelu")
        given = [t.requires_grad_() for t in given]
        mlp(*given)
        linear(*given[:3], activation="gelu")
    assert pre_activations == [False, False, True, True]


def test_loads_are_as_wide_as_every_stride_allows():
    assert [vector(*w) for w in ((768, 192), (768, 24), (35, 64), (8,))] == [16, 8, 1, 8]
