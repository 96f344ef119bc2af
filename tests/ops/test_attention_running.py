"""`ops.attention` and `ops.attention_qkv` as they run: both paths, PyTorch's own machinery, the reference, bad input."""

import pytest
import torch

from fastdeit import backends, ops
from fastdeit.ops.attention_op import why_reference
from fastdeit.testing import kernel_device, kernel_dtypes

DEVICE = kernel_device()
registered = torch.ops.fastdeit
# On a GPU float32 goes to PyTorch's own attention; the float32 kernels are for the interpreter and for TF32.
DTYPES = kernel_dtypes(products=True)


def randn(*shape, dtype=DTYPES[0]):
    return torch.randn(*shape).to(DEVICE, dtype)


# ---- paths


def test_registered_and_eager_paths_give_the_same_bits(monkeypatch):
    packed, separate = randn(2, 18, 3 * 2 * 32), [randn(2, 18, 2, 32) for _ in range(3)]

    def run():
        inputs = [t.clone().requires_grad_() for t in (packed, *separate)]
        with backends.use_backend("triton"):
            out = ops.attention(inputs[0], 2), ops.attention_qkv(*inputs[1:])
        return *out, *torch.autograd.grad(sum(o.square().sum() for o in out), inputs)

    eager = run()
    monkeypatch.setattr(backends, "registered_path", lambda *_: True)
    assert all(torch.equal(a, b) for a, b in zip(eager, run(), strict=True))


def test_compiles_to_one_graph_forward_and_backward_with_dynamic_batch():
    torch.compiler.reset()

    def step(qkv):
        q, k, v = qkv.unflatten(-1, (3, 2, 32)).unbind(2)
        return ops.attention(qkv, 2) + ops.attention_qkv(q, k, v).flatten(2)

    def run(function, batch):
        torch.manual_seed(batch)
        qkv = randn(batch, 18, 3 * 2 * 32).requires_grad_()
        out = function(qkv)
        return out, *torch.autograd.grad(out.square().sum(), qkv)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with backends.use_backend("triton"):
        for batch in (2, 3):
            assert all(torch.equal(a, b) for a, b in zip(run(step, batch), run(compiled, batch), strict=True))


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_registered_ops_pass_opcheck(needs_gradient):
    qkv = randn(2, 3, 3 * 2 * 32).requires_grad_(needs_gradient)
    torch.library.opcheck(registered.attention_forward, (qkv, 2, 0.2, needs_gradient))
    q, k, v = (randn(2, 2, 3, 32).transpose(1, 2).requires_grad_(needs_gradient) for _ in range(3))
    torch.library.opcheck(registered.attention_qkv_forward, (q, k, v, 0.2, needs_gradient))


def test_registered_backward_ops_pass_opcheck():
    qkv, dout = randn(2, 3, 3 * 2 * 32), randn(2, 3, 64)
    out, lse = registered.attention_forward(qkv, 2, 0.2, True)
    wanted = (qkv.dtype, qkv.shape)
    torch.library.opcheck(registered.attention_backward, (dout, qkv, out, lse, *wanted, 2, 0.2))
    q, k, v = (randn(2, 2, 3, 32).transpose(1, 2) for _ in range(3))
    out, lse = registered.attention_qkv_forward(q, k, v, 0.2, True)
    wanted = (*(t.dtype for t in (q, k, v)), *(t.shape for t in (q, k, v)))
    torch.library.opcheck(registered.attention_qkv_backward, (dout.view(2, 3, 2, 32), q, k, v, out, lse, *wanted, 0.2))


def test_a_second_derivative_is_refused_clearly():
    qkv = randn(1, 5, 3 * 32).requires_grad_()
    with backends.use_backend("triton"):
        (gradient,) = torch.autograd.grad(ops.attention(qkv, 1).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_batched_gradients_are_refused_clearly():
    qkv = randn(1, 5, 3 * 32).requires_grad_()
    with backends.use_backend("triton"):
        out = ops.attention(qkv, 1)
    upstream = out.new_ones(2, *out.shape)
    with pytest.raises(RuntimeError, match="inside vmap"):
        torch.autograd.grad(out, qkv, upstream, is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="inside vmap"):
        torch.vmap(lambda g: torch.autograd.grad(out, qkv, g)[0])(upstream)


def test_torch_func_takes_the_reference():
    qkv = randn(1, 5, 3 * 32)
    with backends.use_backend("triton"):
        gradient = torch.func.grad(lambda t: ops.attention(t, 1).square().sum())(qkv)
    expected = torch.func.grad(lambda t: ops.attention_reference(t, 1).square().sum())(qkv)
    assert torch.equal(gradient, expected)


def test_autocast_casts_as_for_scaled_dot_product_attention():
    """float32 in under autocast: the low dtype out, as PyTorch's own attention gives, and a float32 gradient."""
    qkv = randn(2, 18, 3 * 2 * 32, dtype=torch.float32).requires_grad_()
    with backends.use_backend("triton"), torch.autocast(DEVICE.type, dtype=torch.float16):
        out = ops.attention(qkv, 2)
    (gradient,) = torch.autograd.grad(out.float().sum(), qkv)
    with backends.use_backend("triton"):
        expected = ops.attention(qkv.detach().half(), 2)
    assert out.dtype == torch.float16 and torch.equal(out, expected)
    assert gradient.dtype == torch.float32


def test_checkpointed_attention_gives_the_same_gradient():
    qkv = randn(2, 18, 3 * 2 * 32).requires_grad_()
    with backends.use_backend("triton"):
        (plain,) = torch.autograd.grad(ops.attention(qkv, 2).square().sum(), qkv)
        out = torch.utils.checkpoint.checkpoint(ops.attention, qkv, 2, use_reentrant=False)
        (again,) = torch.autograd.grad(out.square().sum(), qkv)
    assert torch.equal(plain, again)


def test_kept_for_backward_are_input_output_and_lse_alone():
    qkv = randn(2, 18, 3 * 2 * 32).requires_grad_()
    kept = []
    with backends.use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        ops.attention(qkv, 2)
    assert sorted(t.numel() for t in kept) == sorted((qkv.numel(), 2 * 18 * 64, 2 * 2 * 18))


def test_flops_are_counted_as_for_scaled_dot_product_attention():
    from torch.utils.flop_counter import FlopCounterMode

    def total(step):
        with FlopCounterMode(display=False) as counter:
            step().sum().backward()
        return counter.get_total_flops()

    qkv = randn(2, 17, 3 * 2 * 64).requires_grad_()
    q, k, v = (randn(2, n, 2, 64).requires_grad_() for n in (3, 17, 17))
    with backends.use_backend("triton"):
        assert total(lambda: ops.attention(qkv, 2)) == (4 + 10) * 2 * 17 * 17 * 128
        assert total(lambda: ops.attention_qkv(q, k, v)) == (4 + 10) * 2 * 3 * 17 * 128


# ---- the reference


def test_reference_gradients():
    qkv = torch.randn(2, 5, 3 * 2 * 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.attention_reference(t, 2, scale=0.7), qkv)
    q, k, v = (torch.randn(2, n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5))
    assert torch.autograd.gradcheck(lambda *t: ops.attention_qkv_reference(*t), (q, k, v))


def test_reference_is_softmax_attention():
    qkv = torch.randn(2, 5, 3 * 2 * 4, dtype=torch.float64)
    q, k, v = qkv.view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = (torch.softmax(q @ k.mT / 2, -1) @ v).transpose(1, 2).reshape(2, 5, 8)
    torch.testing.assert_close(ops.attention_reference(qkv, 2), expected)


@pytest.mark.parametrize(
    ("head_dim", "scale", "reason"),
    [(40, None, "head dimension 40 is none of 32, 48"), (64, 0.0, "scale 0.0 is not"), (64, -1.0, "scale -1.0 is not")],
)
def test_what_the_kernels_do_not_cover_runs_the_reference(head_dim, scale, reason):
    qkv = randn(2, 5, 3 * head_dim)
    assert reason in why_reference(qkv, head_dim, scale)
    assert torch.equal(ops.attention(qkv, 1, scale=scale), ops.attention_reference(qkv, 1, scale=scale))
    with backends.use_backend("triton"), pytest.raises(RuntimeError, match=f"'triton' cannot run here: {reason}"):
        ops.attention(qkv, 1, scale=scale)


def test_no_keys_run_the_reference():
    q, k, v = (randn(2, n, 1, 64) for n in (3, 0, 0))
    with backends.use_backend("triton"):
        out = ops.attention_qkv(q, k, v)
    assert torch.equal(out, ops.attention_qkv_reference(q, k, v))


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(2, 5, 100), 2), ValueError, r"qkv: expected a last dimension .*multiple of 6 .*got 100"),
        ((torch.randn(2, 5, 0), 2), ValueError, r"qkv: expected a last dimension .*got 0"),
        ((torch.randn(5, 192), 1), ValueError, r"qkv: expected rank 3, .*got shape \(5, 192\)"),
        ((torch.ones(2, 5, 192, dtype=torch.long), 1), TypeError, r"qkv: expected a floating-point.*got torch.int64"),
        (([1.0], 1), TypeError, r"qkv: expected a floating-point tensor, got list"),
        ((torch.randn(2, 5, 192), 0), ValueError, r"num_heads: expected at least 1, got 0"),
        ((torch.randn(2, 5, 192), -3), ValueError, r"num_heads: expected at least 1, got -3"),
        ((torch.randn(2, 5, 192), 1.0), TypeError, r"num_heads: expected an int, got float"),
        ((torch.randn(2, 5, 192), True), TypeError, r"num_heads: expected an int, got bool"),
    ],
)
def test_bad_packed_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.attention(*arguments)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (float("nan"), ValueError, "scale: expected a finite number, got nan"),
        (float("inf"), ValueError, "scale: expected a finite number, got inf"),
        ("1", TypeError, "scale: expected a number or None, got str"),
    ],
)
def test_bad_scale_is_named(scale, error, message):
    with pytest.raises(error, match=message):
        ops.attention(torch.randn(2, 5, 192), 1, scale=scale)
    q = torch.randn(2, 5, 1, 64)
    with pytest.raises(error, match=message):
        ops.attention_qkv(q, q, q, scale=scale)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(q=torch.randn(2, 5, 64)), ValueError, r"q: expected rank 4, .*got shape \(2, 5, 64\)"),
        (dict(k=torch.ones(2, 5, 1, 64, dtype=torch.int)), TypeError, r"k: expected a floating-point tensor"),
        (dict(k=torch.randn(2, 5, 1, 64).half()), TypeError, r"k: expected dtype torch.float32 .*got torch.float16"),
        (dict(v=torch.randn(2, 5, 1, 64, device="meta")), ValueError, r"v: expected device cpu .*got meta"),
        (
            dict(k=torch.randn(3, 5, 1, 64)),
            ValueError,
            r"k: expected .*to match q \(2, 5, 1, 64\), got \(3, 5, 1, 64\)",
        ),
        (dict(k=torch.randn(2, 5, 1, 32)), ValueError, r"k: expected .*to match q"),
        (
            dict(v=torch.randn(2, 6, 1, 64)),
            ValueError,
            r"v: expected the shape of k \(2, 5, 1, 64\), got \(2, 6, 1, 64\)",
        ),
        (dict(q=torch.randn(2, 5, 1, 0)), ValueError, r"q: expected .* a head dimension of at least 1"),
        (dict(q=torch.randn(2, 5, 0, 32)), ValueError, r"q: expected at least one head"),
    ],
)
def test_bad_separate_input_is_named(changed, error, message):
    arguments = {name: torch.randn(2, 5, 1, 64) for name in "qkv"} | changed
    with pytest.raises(error, match=message):
        ops.attention_qkv(**arguments)
