"""`ops.attention` and `ops.attention_qkv`: numerics by the contract in every form of the kernels, and layouts."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastdeit import backends, ops, testing
from fastdeit.kernels.attention import forward as kernels
from fastdeit.kernels.attention.config import SDPA_PREFERRED, Shapes, one_program_tiles, select_config
from fastdeit.kernels.runtime.architecture import architecture
from fastdeit.ops import attention_op
from fastdeit.ops.attention_op import (
    HEAD_DIMS,
)
from fastdeit.testing import (
    assert_as_accurate_as_eager,
    assert_close_to_oracle,
    interpreter_active,
    kernel_device,
    kernel_dtypes,
)
from fastdeit.testing.ptx.tf32 import tf32

DEVICE = kernel_device()
# On a GPU float32 goes to PyTorch's own attention; the float32 kernels are for the interpreter and, tested below, for TF32.
DTYPES = kernel_dtypes(products=True)
MANY = 1024  # samples: the grid then fills any GPU


def randn(*shape, dtype=DTYPES[0]):
    return torch.randn(*shape).to(DEVICE, dtype)


def config_of(form, queries, keys, head_dim):
    """What a GPU of that kind would run, whatever runs here."""
    if form == "sm_80 pointers":
        return select_config(MANY, 1, queries, keys, head_dim, 2, 80, 108, False)
    if form == "narrow grid":
        return select_config(1, 1, queries, keys, head_dim, 2, 90, 132, True)
    if form == "sm_100 descriptors":
        return select_config(MANY, 1, queries, keys, head_dim, 2, 100, 148, True)
    if form == "TF32 tiles":
        return select_config(MANY, 1, queries, keys, head_dim, 4, 80, 108, True)
    config = select_config(MANY, 1, queries, keys, head_dim, 2, 90, 132, form != "pointers")
    return dataclasses.replace(config, one_program=one_program_tiles(keys)) if form == "one program" else config


@pytest.fixture
def form(request, monkeypatch):
    arch = None if interpreter_active() else architecture(torch.empty(0, device=DEVICE))
    if arch is not None and arch < 90 and request.param in ("descriptors", "sm_100 descriptors", "one program"):
        pytest.skip("tensor descriptors need capability 9.0")
    if arch is not None and arch >= 90 and request.param in ("sm_80 pointers", "TF32 tiles"):
        pytest.skip("on this architecture Triton omits a proxy fence in these tiles, which are not chosen there")

    def select(batch, heads, queries, keys, head_dim, *_):
        return config_of(request.param, queries, keys, head_dim)

    monkeypatch.setattr(kernels, "select_config", select)
    return request.param


forms = pytest.mark.parametrize("form", ["pointers", "descriptors"], indirect=True)


@forms
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 15, 16, 17, 63, 64, 65, 196, 197, 198, 255, 256, 257])
def test_as_accurate_as_eager_at_every_length(tokens, dtype, form):
    batch, heads = (2, 2) if tokens < 100 else (1, 1)
    qkv = randn(batch, tokens, 3 * heads * 64, dtype=dtype)
    assert_as_accurate_as_eager(ops.attention, ops.attention_reference, qkv, heads)


@pytest.mark.parametrize("form", ["pointers", "descriptors", "one program"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_attends_to_itself(dtype, form):
    """The output is V. dV is the upstream gradient and dQ and dK are zero, but for the rounding of 64 summed fp32 products: of a
    logit that meets its own log-sum-exp, and of two equal sums that are subtracted."""
    qkv, upstream = randn(2, 1, 3 * 2 * 64, dtype=dtype).requires_grad_(), randn(2, 1, 2, 64, dtype=dtype)
    with backends.use_backend("triton"), testing.poisoned_memory():
        out = ops.attention(qkv, 2)
        (gradient,) = torch.autograd.grad(out, qkv, upstream.flatten(2))
    q, k, v = qkv.detach().double().unflatten(-1, (3, 2, 64)).unbind(2)
    dq, dk, dv = gradient.unflatten(-1, (3, 2, 64)).unbind(2)
    rounding = 64 * torch.finfo(torch.float32).eps
    logit = (q * k).abs().sum(-1, keepdim=True) / 8
    delta = (upstream * v).abs().sum(-1, keepdim=True)
    assert torch.equal(out.double(), v.flatten(2))
    assert ((dv - upstream).abs() <= rounding * logit * upstream.abs()).all()
    assert (dq.abs() <= rounding * delta * k.abs() / 8).all()
    assert (dk.abs() <= rounding * delta * q.abs() / 8).all()


@forms
@pytest.mark.parametrize("head_dim", [d for d in HEAD_DIMS if d != 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_accurate_as_eager_for_every_head_dim(head_dim, dtype, form):
    qkv = randn(2, 66, 3 * 2 * head_dim, dtype=dtype)
    assert_as_accurate_as_eager(ops.attention, ops.attention_reference, qkv, 2)


@pytest.mark.parametrize("form", ["sm_80 pointers", "narrow grid", "TF32 tiles", "sm_100 descriptors"], indirect=True)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("tokens", [17, 98])
def test_as_accurate_as_eager_with_other_tiles(tokens, head_dim, form):
    qkv = randn(1, tokens, 3 * 2 * head_dim)
    assert_as_accurate_as_eager(ops.attention, ops.attention_reference, qkv, 2)


@pytest.mark.parametrize("form", ["one program"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 17, 128, 129, 197, 256])
def test_as_accurate_as_eager_with_backward_in_one_kernel(tokens, dtype, form):
    assert_as_accurate_as_eager(ops.attention, ops.attention_reference, randn(2, tokens, 3 * 2 * 64, dtype=dtype), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3])
def test_scale(scale, dtype):
    qkv = randn(2, 20, 3 * 2 * 64, dtype=dtype)
    assert_as_accurate_as_eager(ops.attention, ops.attention_reference, qkv, 2, scale=scale)


def in_products(qkv, heads):
    """Attention by PyTorch's matrix products, which heed the switch: its own attention makes float32 of several TF32 products."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return ((q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.gpu
@pytest.mark.numeric
@pytest.mark.parametrize("tokens", [17, 197])
@pytest.mark.parametrize("head_dim", [32, 48, 64])
def test_as_accurate_as_eager_in_tf32_where_it_is_allowed(head_dim, tokens):
    with tf32(True):
        qkv = randn(2, tokens, 3 * 2 * head_dim, dtype=torch.float32)
        assert_as_accurate_as_eager(ops.attention, ops.attention_reference, qkv, 2, eager=in_products)


@pytest.mark.gpu
@pytest.mark.numeric
def test_a_cuda_graph_replays_forward_and_backward():
    qkv = randn(2, 197, 3 * 3 * 64, dtype=torch.bfloat16).requires_grad_()

    def step():
        out = ops.attention(qkv, 3)
        return out, *torch.autograd.grad(out.float().square().sum(), qkv)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        qkv.copy_(randn(*qkv.shape))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("gradients", [False, True])
def test_what_pytorch_does_faster_is_handed_over(gradients, monkeypatch):
    monkeypatch.setitem(SDPA_PREFERRED, architecture(randn(1)), (Shapes(32, range(17, 33), range(4, 16), gradients),))
    launches = []
    monkeypatch.setattr(attention_op, "why_reference", lambda *_: None)
    monkeypatch.setattr(attention_op, "attention_unchecked", lambda qkv, *_: launches.append(qkv) or (qkv,))
    for name, (batch, tokens, heads) in {"in range": (2, 20, 2), "longer": (2, 33, 2), "fewer": (1, 20, 3)}.items():
        for mode in (torch.no_grad, torch.enable_grad):
            launches.clear()
            with mode():
                ops.attention(randn(batch, tokens, 3 * heads * 32), heads)
            left = name == "in range" and gradients is (mode is torch.enable_grad)
            assert bool(launches) is not left, (name, mode)


def test_a_forced_backend_keeps_what_would_be_handed_over(monkeypatch):
    monkeypatch.setitem(SDPA_PREFERRED, architecture(randn(1)), (Shapes(32, range(1, 33), range(1, 16), True),))
    assert "measured faster at 20 tokens" in attention_op.why_handed_over(randn(1), 32, 20, 4)
    with backends.use_backend("triton"):
        assert attention_op.why_handed_over(randn(1), 32, 20, 4) is None


LAYOUTS = {
    "tokens first": lambda *shape: randn(*shape),
    "heads first": lambda b, n, h, d: randn(b, h, n, d).transpose(1, 2),
    "part of a packed projection": lambda b, n, h, d: randn(b, n, 3, h, d)[:, :, 1],
    "odd strides": lambda b, n, h, d: randn(b, n, h, d + 1)[..., :d],
    "channels not innermost": lambda b, n, h, d: randn(b, n, d, h).transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_separate_inputs_of_any_layout(layout, dtype):
    q, k, v = (LAYOUTS[layout](2, 18, 2, 32).to(dtype) for _ in range(3))
    assert_as_accurate_as_eager(ops.attention_qkv, ops.attention_qkv_reference, q, k, v)


def test_keys_and_values_shared_by_all_heads():
    q, k, v = randn(2, 18, 2, 32), *(randn(2, 18, 1, 32).expand(2, 18, 2, 32) for _ in range(2))
    with backends.use_backend("triton"):
        shared, copied = ops.attention_qkv(q, k, v), ops.attention_qkv(q, k.clone(), v.clone())
    assert torch.equal(shared, copied)


@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
def test_gradients_have_the_strides_of_their_inputs(layout):
    q, k, v = (LAYOUTS[layout](2, 18, 2, 32).requires_grad_() for _ in range(3))
    with backends.use_backend("triton"):
        gradients = torch.autograd.grad(ops.attention_qkv(q, k, v).sum(), (q, k, v))
    assert [g.stride() for g in gradients] == [t.stride() for t in (q, k, v)]


@pytest.mark.parametrize("frozen", [f for n in range(4) for f in itertools.combinations(range(3), n)])
def test_every_subset_of_frozen_inputs(frozen):
    q, k, v = (randn(2, 18, 2, 32) for _ in range(3))
    assert_as_accurate_as_eager(ops.attention_qkv, ops.attention_qkv_reference, q, k, v, frozen=frozen)


@pytest.mark.parametrize(("queries", "keys"), [(1, 70), (2, 17), (70, 3)])
def test_fewer_or_more_queries_than_keys(queries, keys):
    """The last block needs the prefix tokens' queries alone."""
    q, k, v = (randn(2, n, 2, 64) for n in (queries, keys, keys))
    assert_as_accurate_as_eager(ops.attention_qkv, ops.attention_qkv_reference, q, k, v)


@pytest.mark.parametrize("layout", ["sliced tokens", "sliced channels", "transposed"])
def test_packed_input_of_any_layout(layout):
    qkv = {
        "sliced tokens": lambda: randn(2, 20, 192)[:, 1:18],
        "sliced channels": lambda: randn(2, 17, 200)[..., 3:195],
        "transposed": lambda: randn(2, 192, 17).transpose(1, 2),
    }[layout]()
    assert_as_accurate_as_eager(ops.attention, ops.attention_reference, qkv, 2)


@pytest.mark.parametrize("form", ["pointers", "descriptors", "one program"], indirect=True)
def test_huge_logits_select_one_value(form):
    """Logits of +-1e4: no overflow, and the softmax is the one-hot of the largest logit."""
    tokens = 70
    qkv = torch.zeros(1, tokens, 3, 1, 64, device=DEVICE, dtype=DTYPES[0])
    angle = torch.arange(tokens, device=DEVICE) * (2 * math.pi / tokens)
    directions = torch.stack([angle.cos(), angle.sin()], -1)
    qkv[0, :, 0, 0, :2] = 4e3 * directions
    qkv[0, :, 1, 0, :2] = 20 * directions.roll(-3, 0)
    qkv[0, :, 2, 0] = randn(tokens, 64)
    qkv = qkv.flatten(2).requires_grad_()
    logits = 8e4 / 8 * directions @ directions.T
    assert logits.max() > 9.9e3 and logits.min() < -9.9e3
    with backends.use_backend("triton"), testing.poisoned_memory():
        out = ops.attention(qkv, 1)
        (gradient,) = torch.autograd.grad(out.sum(), qkv)
    value = qkv.detach().unflatten(-1, (3, 64))[:, :, 2]
    torch.testing.assert_close(out, value.roll(3, 1))
    assert gradient.isfinite().all()


@forms
def test_equal_logits_average_the_values(form):
    qkv = randn(1, 70, 3, 2, 64)
    qkv[:, :, 1] = qkv[:, :1, 1]
    with backends.use_backend("triton"):
        out = ops.attention(qkv.flatten(2), 2)
    mean = qkv[:, :, 2].double().mean(1, keepdim=True).flatten(2).expand(1, 70, 128)
    eager = ops.attention_reference(qkv.flatten(2), 2)
    testing.assert_close_to_oracle("mean of values", out, mean, eager, qkv.abs().max().item())


@pytest.mark.parametrize("form", ["pointers", "descriptors", "one program"], indirect=True)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("token", [3, 68])  # in a full block and in the tail
def test_non_finite_values_propagate_as_in_softmax(part, value, token, form):
    qkv = randn(1, 70, 3, 2, 64)
    qkv[0, token, part, 0, 5] = value
    inputs = [t.requires_grad_() for t in (qkv.flatten(2).clone(), qkv.flatten(2).clone())]
    upstream = randn(1, 70, 128)

    def composition(x):
        q, k, v = x.unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        return (torch.softmax(q @ k.mT / 8, -1) @ v).transpose(1, 2).flatten(2)

    with backends.use_backend("triton"):
        out = ops.attention(inputs[0], 2)
        (gradient,) = torch.autograd.grad(out, inputs[0], upstream)
    expected = composition(inputs[1])
    (expected_gradient,) = torch.autograd.grad(expected, inputs[1], upstream)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(gradient.isfinite(), expected_gradient.isfinite())


@pytest.mark.parametrize("form", ["pointers", "descriptors", "one program"], indirect=True)
def test_keys_at_minus_infinity_are_as_if_not_there(form):
    """A whole block of logits at -Inf, then finite ones: the running maximum must survive. Padded rows must not make NaN of it."""
    qkv = randn(1, 70, 3, 1, 64)
    qkv[:, :, 0, :, 0] = 1.0
    qkv[:, :64, 1, :, 0] = -float("inf")
    qkv = qkv.flatten(2).requires_grad_()
    upstream = randn(1, 70, 64)
    with backends.use_backend("triton"):
        out = ops.attention(qkv, 1)
        (gradient,) = torch.autograd.grad(out, qkv, upstream)
    rest = qkv.detach()[:, 64:, :]
    q, k, v = (t.unflatten(-1, (3, 64)) for t in (qkv.detach(), rest, rest))
    rest = q[:, :, 0], k[:, :, 1], v[:, :, 2]
    exact, eager = (
        scaled_dot_product_attention(*(cast(t) for t in rest)) for cast in (torch.Tensor.double, torch.clone)
    )
    assert_close_to_oracle("output", out, exact, eager, rest[2].abs().max().item())
    d_key_value = gradient.unflatten(-1, (3, 64))[:, :64, 1:]
    assert torch.equal(d_key_value, torch.zeros_like(d_key_value))


@pytest.mark.parametrize("form", ["pointers", "descriptors", "one program"], indirect=True)
def test_very_negative_logits_do_not_overflow_padded_rows(form):
    """With every logit near -500, 2**(0 - lse) of a padded row is Inf, and Inf times a padded zero NaN."""
    qkv = 0.01 * randn(1, 70, 3, 1, 64)
    qkv[:, :, 0, :, 0], qkv[:, :, 1, :, 0] = 64.0, -64.0
    assert_as_accurate_as_eager(ops.attention, ops.attention_reference, qkv.flatten(2), 1)


@forms
def test_repeated_runs_give_the_same_bits(form):
    qkv = randn(2, 70, 3 * 2 * 64).requires_grad_()

    def run():
        with backends.use_backend("triton"):
            out = ops.attention(qkv, 2)
        return out, *torch.autograd.grad(out.square().sum(), qkv)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@forms
def test_padding_does_not_reach_a_row(form):
    """Each sample alone gives the bits that it gives in a batch: nothing is read across samples or heads."""
    qkv = randn(3, 70, 3 * 2 * 64)
    with backends.use_backend("triton"):
        together = ops.attention(qkv, 2)
        alone = torch.cat([ops.attention(sample[None], 2) for sample in qkv])
    assert torch.equal(together, alone)


def test_inputs_are_not_written_to():
    qkv = randn(2, 18, 3 * 2 * 32)
    before = qkv.clone()
    leaf = qkv.requires_grad_()
    with backends.use_backend("triton"):
        ops.attention(leaf, 2).sum().backward()
    assert torch.equal(qkv.detach(), before)


@pytest.mark.parametrize("shape", [(0, 17), (3, 0)])
def test_empty_input_gives_empty_output_and_empty_gradient(shape):
    for backend in ("triton", "reference"):
        qkv = randn(*shape, 3 * 64).requires_grad_()
        q = randn(*shape, 1, 64).requires_grad_()
        with backends.use_backend(backend):
            out, separate = ops.attention(qkv, 1), ops.attention_qkv(q, q, q)
        (out.sum() + separate.sum()).backward()
        assert out.shape == (*shape, 64) and qkv.grad.shape == qkv.shape
        assert separate.shape == q.shape and q.grad.shape == q.shape


def test_no_queries_give_zero_gradients_of_keys():
    q, k, v = (randn(2, n, 1, 64).requires_grad_() for n in (0, 5, 5))
    with backends.use_backend("triton"), testing.poisoned_memory():
        ops.attention_qkv(q, k, v).sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k)) and torch.equal(v.grad, torch.zeros_like(v))
