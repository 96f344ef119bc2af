"""`ops.add_layer_norm_attention` and `ops.add_layer_norm_mlp` on subsets of the samples: numerics, both paths, bad input."""

import pytest
import torch

from fastdeit import backends, ops
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

DEVICE = kernel_device()
SAMPLES, CHANNELS = 6, 48
DTYPES = kernel_dtypes(products=True)
FORMS = [*((dtype, None) for dtype in DTYPES), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
KEPT = [(4, 3), (None, 4), (3, None), (1, 6)]  # samples of the branch that is added, and of the one after it
OPS = {
    "attention": (ops.add_layer_norm_attention, ops.add_layer_norm_attention_reference, (2,)),
    "mlp": (ops.add_layer_norm_mlp, ops.add_layer_norm_mlp_reference, ()),
}
forms = pytest.mark.parametrize(("dtype", "autocast"), FORMS)
both = pytest.mark.parametrize("name", OPS)


def tensors(name, samples, dtype=DTYPES[0], autocast=None):
    """Stream, branch of so many samples, norm, layers and LayerScale."""
    width = 3 * 64 if name == "attention" else 96
    inner = 64 if name == "attention" else 96
    given = (
        2 * torch.randn(SAMPLES, 9, CHANNELS) + 1,
        torch.randn(samples or SAMPLES, 9, CHANNELS).to(autocast or dtype),
        1 + 0.3 * torch.randn(CHANNELS),
        0.2 * torch.randn(CHANNELS),
        torch.randn(width, CHANNELS) * CHANNELS**-0.5,
        0.1 * torch.randn(width),
        torch.randn(CHANNELS, inner) * inner**-0.5,
        0.1 * torch.randn(CHANNELS),
        0.5 + torch.rand(CHANNELS),
    )
    return [t.to(DEVICE, t.dtype if i == 1 else dtype) for i, t in enumerate(given)]


def slots(kept):
    return None if kept is None else torch.randperm(SAMPLES, device=DEVICE)


def call_of(op, more, autocast=None, **options):
    def call(x, branch, norm_weight, norm_bias, *rest):
        *layers, gamma = rest
        exact = x.dtype == torch.float64
        with torch.autocast(DEVICE.type, dtype=autocast, enabled=autocast is not None and not exact):
            given = (x, branch, norm_weight, norm_bias, 1e-6, *layers, *more)
            out = op(*given, gamma=gamma, **options)
        return out if branch is not None else out[1]

    return call


def assert_accurate(name, given, autocast=None, frozen=(), recompute=None, **options):
    op, reference, more = OPS[name]
    lean = {} if recompute is None else {"recompute": recompute}
    pair = call_of(op, more, autocast, **options, **lean), call_of(reference, more, autocast, **options)
    assert_as_accurate_as_eager(*pair, *given, frozen=frozen)


def options_of(branch_kept, kept):
    given = dict(branch_slots=slots(branch_kept), slots=slots(kept), kept=kept)
    if branch_kept is not None:
        given["drop_path_scale"] = torch.full((SAMPLES,), SAMPLES / branch_kept, device=DEVICE)
    return given


@both
@forms
@pytest.mark.parametrize(("branch_kept", "kept"), KEPT)
def test_numbers_and_gradients_by_the_contract(name, dtype, autocast, branch_kept, kept):
    assert_accurate(name, tensors(name, branch_kept, dtype, autocast), autocast, **options_of(branch_kept, kept))


@both
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_without_a_branch(name, autocast):
    given = tensors(name, None, torch.float32 if autocast else DTYPES[0], autocast)
    given[1] = None
    assert_accurate(name, given, autocast, slots=slots(2), kept=2)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_recomputed_pre_activation(autocast):
    given = tensors("mlp", 4, torch.float32, autocast)
    assert_accurate("mlp", given, autocast, recompute="preactivation", **options_of(4, 3))


@both
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (4,), (0, 4)])
def test_some_inputs_trained(name, autocast, trained):
    given = tensors(name, 4, torch.float32 if autocast else DTYPES[0], autocast)
    assert_accurate(name, given, autocast, [i for i in range(9) if i not in trained], **options_of(4, 3))


@both
def test_a_strided_stream(name):
    given = tensors(name, 4, torch.float32, torch.bfloat16)
    given[0] = given[0].transpose(0, 1).contiguous().transpose(0, 1)
    given[1] = torch.nn.functional.pad(given[1], (0, 16))[..., :CHANNELS]
    assert_accurate(name, given, torch.bfloat16, **options_of(4, 3))


@both
def test_dropped_samples_pass_unread(name):
    """A sample that both drop is the stream's, bit for bit, whatever it holds; and no NaN of it is met."""
    op, _, more = OPS[name]
    x, *rest = tensors(name, 4, torch.float32, torch.bfloat16)
    places = torch.tensor([0, 1, 5, 2, 3, 4], device=DEVICE)
    x[2] = float("nan")
    x.requires_grad_()
    call = call_of(op, more, torch.bfloat16, branch_slots=places, slots=places, kept=4)
    with backends.use_backend("triton"):
        x_new, out = call(x, *rest)
    assert x_new[2].isnan().all() and torch.equal(x_new[5], x[5]) and out.shape == (4, 9, CHANNELS)
    assert out.isfinite().all() and not torch.equal(x_new[0], x[0])
    (dx,) = torch.autograd.grad(out.float().sum(), x)
    assert (dx[[2, 5]] == 0).all() and dx.isfinite().all() and (dx[0] != 0).any()


@both
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_registered_op(name, autocast):
    """Schema, fake, autograd, and what a compiled call gives."""
    op, _, more = OPS[name]
    given = [t.requires_grad_() for t in tensors(name, 4, torch.float32 if autocast else DTYPES[0], autocast)]
    options = options_of(4, 3)
    call = call_of(op, more, autocast, **options)
    found = []
    with backends.use_backend("triton"):
        for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
            outputs = function(*given)
            grads = torch.autograd.grad(outputs, given, [torch.ones_like(y) for y in outputs])
            found.append((*outputs, *grads))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(slots=torch.arange(6).int()), TypeError, "slots: expected an int64 tensor, got torch.int32"),
        (dict(branch_slots=3), TypeError, "branch_slots: expected an int64 tensor, got int"),
        (dict(slots=torch.arange(5)), ValueError, r"slots: expected one contiguous slot per sample of x \(6, 9, 48\)"),
        (dict(slots=None), ValueError, "kept: expected a number with slots, and None without, got 3"),
        (dict(kept=None), ValueError, "kept: expected a number with slots, and None without, got None"),
        (dict(kept=7), ValueError, "kept: expected 1 to 6, the samples of x, got 7"),
        (dict(kept=0), ValueError, "kept: expected 1 to 6, the samples of x, got 0"),
        (dict(kept=2.0), TypeError, "kept: expected an int, got float"),
        (dict(branch_slots=None), ValueError, r"branch: expected the shape of x \(6, 9, 48\), got \(4, 9, 48\)"),
        (dict(branch=None), ValueError, "branch_slots: expected None without a branch, got a tensor"),
        (
            dict(branch=torch.zeros(7, 9, CHANNELS)),
            ValueError,
            "branch: expected 1 to 6 samples with branch_slots, got 7",
        ),
        (dict(branch=torch.zeros(4, 8, CHANNELS)), ValueError, "branch: expected the shape of x"),
    ],
)
@both
def test_what_does_not_fit_is_named(name, change, error, message):
    op, _, more = OPS[name]
    x, branch, norm_weight, norm_bias, *layers, gamma = (t.cpu() for t in tensors(name, 4))
    given = dict(branch=branch, branch_slots=torch.arange(6), slots=torch.arange(6), kept=3) | change
    with pytest.raises(error, match=message):
        op(x, given.pop("branch"), norm_weight, norm_bias, 1e-6, *layers, *more, gamma=gamma, **given)
