"""`ops.distillation_cross_entropy`: what it means, and its numerics by the contract."""

import pytest
import timm.loss
import torch
import torch.nn.functional as F

from fastdeit import backends
from fastdeit.ops import distillation_cross_entropy as op
from fastdeit.ops import distillation_cross_entropy_reference as reference
from fastdeit.ops.distillation_arguments import BASES, KINDS
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

DEVICE = kernel_device()
DTYPES = kernel_dtypes()
TERMS = [(kind, base) for kind in KINDS for base in BASES if (kind, base) != ("none", "none")]


def randn(*shape, dtype=torch.float32):
    return (3 * torch.randn(*shape)).to(dtype).to(DEVICE)


def indices(batch, classes):
    return torch.randint(classes, (batch,), device=DEVICE)


# ---- the formulas, as the paper and the public code have them


def softmax(z):
    e = (z - z.amax(1, keepdim=True)).exp()
    return e / e.sum(1, keepdim=True)


def one_hot(y, z):
    return torch.zeros_like(z).scatter_(1, y[:, None].long(), 1.0)


def paper_cross_entropy(z, y):
    """LCE(psi(Z), y)"""
    y = y if y.is_floating_point() else one_hot(y, z)
    return -(y * softmax(z).log()).sum(1).mean()


def paper_hard(z, d, y, t):
    """1/2 LCE(psi(Zs), y) + 1/2 LCE(psi(Zd), yt), yt = argmax_c Zt(c)"""
    return paper_cross_entropy(z, y) / 2 + paper_cross_entropy(d, t.argmax(1)) / 2


def paper_soft(z, d, y, t, lam, tau):
    """(1 - lambda) LCE(psi(Zs), y) + lambda tau^2 KL(psi(Zd / tau), psi(Zt / tau)), KL averaged over the batch"""
    student, teacher = softmax(d / tau), softmax(t / tau)
    divergence = (teacher * (teacher / student).log()).sum(1).mean()
    return (1 - lam) * paper_cross_entropy(z, y) + lam * tau**2 * divergence


def deit(z, d, y, t, *, kind, alpha=0.5, tau=1.0, smoothing=0.0, binary=False):
    """facebookresearch/deit's losses.py over timm's and PyTorch's criteria."""
    if binary:
        base = F.binary_cross_entropy_with_logits(z, y)
    elif y.is_floating_point():
        base = timm.loss.SoftTargetCrossEntropy()(z, y)
    else:
        base = timm.loss.LabelSmoothingCrossEntropy(smoothing)(z, y)
    if kind == "none":
        return base
    if kind == "hard":
        return base * (1 - alpha) + alpha * F.cross_entropy(d, t.argmax(1))
    divergence = F.kl_div((d / tau).log_softmax(1), (t / tau).log_softmax(1), reduction="sum", log_target=True)
    return base * (1 - alpha) + alpha * divergence * tau**2 / d.numel()


@pytest.mark.parametrize("soft", [False, True])
def test_means_what_the_paper_says(soft_target, soft):
    z, d, t = torch.randn(3, 5, 11, dtype=torch.float64).unbind()
    y = soft_target(5, 11).cpu().double() if soft else torch.randint(11, (5,))
    torch.testing.assert_close(op(z, d, y, t), paper_hard(z, d, y, t), rtol=1e-12, atol=0)
    by_batch = op(z, d, y, t, kind="soft", alpha=0.1, tau=3.0, soft_divisor="batch")
    torch.testing.assert_close(by_batch, paper_soft(z, d, y, t, 0.1, 3.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["indices", "smoothed", "soft", "binary"])
def test_means_what_deit_computes(present, soft_target, kind, base):
    z, d, t = torch.randn(3, 5, 11, dtype=torch.float64).unbind()
    y = soft_target(5, 11).cpu().double() if base in ("soft", "binary") else torch.randint(11, (5,))
    smoothing = 0.1 if base == "smoothed" else 0.0
    options = dict(kind=kind, alpha=0.3, tau=2.5)
    expected = deit(z, d, y, t, **options, smoothing=smoothing, binary=base == "binary")
    name = "binary_cross_entropy" if base == "binary" else "cross_entropy"
    got = op(*present(kind, name, z, d, y, t), **options, label_smoothing=smoothing, base=name)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_class_indices_with_binary_cross_entropy_are_one_hot():
    z, y = torch.randn(5, 11, dtype=torch.float64), torch.randint(11, (5,))
    expected = F.binary_cross_entropy_with_logits(z, F.one_hot(y, 11).double())
    got = op(z, None, y, None, kind="none", base="binary_cross_entropy")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "base"), TERMS)
@pytest.mark.parametrize("soft", [False, True])
def test_reference_gradients(present, soft_target, kind, base, soft):
    z, d, t = torch.randn(3, 3, 5, dtype=torch.float64).unbind()
    z, d = z.requires_grad_(), d.requires_grad_()
    y = soft_target(3, 5).cpu().double() if soft else torch.randint(5, (3,))
    heads = [x for x in present(kind, base, z, d, None, None)[:2] if x is not None]

    def loss(*heads):
        heads = list(heads)
        args = present(kind, base, heads[0], heads[-1], y, t)
        return op(*args, kind=kind, base=base, tau=2.0, alpha=0.3)

    assert torch.autograd.gradcheck(loss, heads)
    assert torch.autograd.gradgradcheck(loss, heads)


def test_binary_gradient_at_zero_is_that_of_the_sigmoid():
    z = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.0, 1.0, 0.25]] * 2, dtype=torch.float64)
    op(z, None, y, None, kind="none", base="binary_cross_entropy", reduction="sum").backward()
    torch.testing.assert_close(z.grad, (0.5 - y) / 3)


# ---- the kernels' numerics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 10, 1000, 2049])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("binary", [False, True])
def test_as_accurate_as_deit_with_soft_targets(present, soft_target, binary, kind, classes, dtype):
    z, d, t = randn(3, 3, classes, dtype=dtype).unbind()
    base = "binary_cross_entropy" if binary else "cross_entropy"
    args = present(kind, base, z, d, soft_target(3, classes).to(dtype), t)
    options = dict(kind=kind, alpha=0.3, tau=3.0)
    eager = lambda *a: deit(*a, **options, binary=binary)  # noqa: E731
    assert_as_accurate_as_eager(
        lambda *a: op(*a, **options, base=base), eager, *args, frozen=(2, 3), largest_intermediate=10.0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [7, 1000])
def test_as_accurate_as_deit_with_class_indices(classes, smoothing, dtype):
    z, d, t = randn(3, 3, classes, dtype=dtype).unbind()
    eager = lambda *a: deit(*a, kind="hard", smoothing=smoothing)  # noqa: E731
    fused = lambda *a: op(*a, label_smoothing=smoothing)  # noqa: E731
    assert_as_accurate_as_eager(fused, eager, z, d, indices(3, classes), t, frozen=(2, 3), largest_intermediate=10.0)


@pytest.mark.parametrize("label", ["indices", "smoothed", "soft"])
def test_a_maximum_in_a_later_block_moves_what_was_summed_before(soft_target, label):
    z = randn(2, 4099)
    z[:, -1] = 50.0
    y = soft_target(2, 4099) if label == "soft" else indices(2, 4099)
    smoothing = 0.1 if label == "smoothed" else 0.0
    both = [lambda z, y, f=f: f(z, None, y, None, kind="none", label_smoothing=smoothing) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, y, frozen=(1,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_as_accurate_as_the_paper_formula(soft_target, kind, dtype):
    z, d, t = randn(3, 4, 1000, dtype=dtype).unbind()
    if kind == "hard":
        paper, options = paper_hard, {}
    else:
        paper = lambda *a: paper_soft(*a, 0.1, 3.0)  # noqa: E731
        options = dict(kind="soft", alpha=0.1, tau=3.0, soft_divisor="batch")
    assert_as_accurate_as_eager(
        lambda *a: op(*a, **options),
        paper,
        z,
        d,
        soft_target(4, 1000).to(dtype),
        t,
        eager=lambda *a: reference(*a, **options),
        frozen=(2, 3),
        largest_intermediate=10.0,
    )


@pytest.mark.parametrize("classes", [1, 3, 997, 1024, 2048, 4099, 21841, 30000])  # one, primes, blocks and beyond
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_any_number_of_classes(soft_target, kind, classes):
    z, d, t = randn(3, 2, classes).unbind()
    options = dict(kind=kind, tau=2.0, reduction="none")
    both = [lambda *a, f=f: f(*a, **options) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, d, soft_target(2, classes), t, frozen=(2, 3))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("kind", "base"), TERMS)
def test_every_reduction_of_every_term(present, kind, base, reduction):
    z, d, t = randn(3, 5, 24).unbind()
    options = dict(kind=kind, base=base, reduction=reduction, soft_divisor="batch")
    both = [lambda *a, f=f: f(*a, **options) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, *present(kind, base, z, d, indices(5, 24), t), frozen=(2, 3))


@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_either_head_may_be_frozen(kind, frozen):
    z, d, t = randn(3, 3, 40).unbind()
    both = [lambda *a, f=f: f(*a, kind=kind) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, d, indices(3, 40), t, frozen=(*frozen, 2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_one_head_may_serve_both_terms(soft_target, kind, dtype):
    z, t = randn(2, 3, 40, dtype=dtype).unbind()
    y = soft_target(3, 40).to(dtype)
    both = [lambda z, y, t, f=f: f(z, z, y, t, kind=kind, tau=2.0) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, y, t, frozen=(1, 2))


LAYOUTS = {
    "columns": lambda x: x.t().contiguous().t(),
    "part of wider rows": lambda x: F.pad(x, (3, 2))[:, 3:-2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_any_layout(soft_target, kind, layout):
    z, d, t, y = (LAYOUTS[layout](x) for x in (*randn(3, 4, 24).unbind(), soft_target(4, 24)))
    outcomes = []
    for strided in (True, False):
        tensors = [x if strided else x.contiguous() for x in (z, d, y, t)]
        heads = [x.detach().requires_grad_() for x in tensors[:2]]
        with backends.use_backend("triton"):
            loss = op(*heads, *tensors[2:], kind=kind)
        outcomes.append([loss, *torch.autograd.grad(loss, heads)])
    for got, expected in zip(*outcomes, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_dtype_and_stride(label_dtype):
    z, d = randn(2, 5, 24).unbind()
    y, k = torch.randint(24, (2, 5, 2), device=DEVICE)
    expected = op(z, d, y[:, 0], k[:, 0])
    with backends.use_backend("triton"):
        got = op(z, d, y.to(label_dtype)[:, 0], k.to(label_dtype)[:, 0])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_term_of_weight_zero_counts_in_the_dtype_of_the_loss(soft_target, alpha):
    z, d = randn(2, 4, 24, dtype=torch.float16).unbind()
    for kind, target, teacher in (("hard", soft_target(4, 24), d), ("soft", soft_target(4, 24).half(), d.float())):
        for backend in ("triton", "reference"):
            with backends.use_backend(backend):
                assert op(z, d, target, teacher, kind=kind, alpha=alpha).dtype == torch.float32, (kind, backend)


@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_teacher_and_heads_may_differ_in_dtype(soft_target, kind, teacher_dtype):
    z, d, t = randn(3, 4, 24).unbind()
    args = (z, d.half(), soft_target(4, 24), t.to(teacher_dtype))
    both = [lambda *a, f=f: f(*a, kind=kind) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, *args, frozen=(2, 3))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_empty_batch(backend, reduction):
    z, d, t = torch.empty(3, 0, 24, device=DEVICE).unbind()
    z.requires_grad_()
    with backends.use_backend(backend):
        loss = op(z, d, torch.empty(0, dtype=torch.int64, device=DEVICE), t, reduction=reduction)
    expected = torch.empty(0, 24).log_softmax(1).sum(1)
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    torch.testing.assert_close(loss.detach().cpu(), expected, equal_nan=True)
    assert torch.autograd.grad(loss.sum(), z)[0].shape == (0, 24)


def test_one_row():
    z, d, t = randn(3, 1, 24).unbind()
    assert_as_accurate_as_eager(op, reference, z, d, indices(1, 24), t, frozen=(2, 3))


def test_repeated_runs_give_the_same_bits(soft_target):
    z, d, t = randn(3, 37, 300).unbind()
    z.requires_grad_()
    d.requires_grad_()
    y = soft_target(37, 300)
    with backends.use_backend("triton"):
        runs = []
        for _ in range(2):
            loss = op(z, d, y, t, kind="soft")
            runs.append((loss.detach(), *torch.autograd.grad(loss, (z, d))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
