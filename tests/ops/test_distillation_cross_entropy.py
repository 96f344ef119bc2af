"""`ops.distillation_cross_entropy`: numerics by the contract, hostile values, both paths, bad input."""

import contextlib
import math
from unittest import mock

import pytest
import timm.loss
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastdeit import backends, costs, ops
from fastdeit.ops import distillation_cross_entropy as op
from fastdeit.ops import distillation_cross_entropy_reference as reference
from fastdeit.ops.distillation_cross_entropy_op import (
    BASES,
    KINDS,
    distillation_cross_entropy_backward,
    distillation_cross_entropy_forward,
    why_reference,
)
from fastdeit.testing import assert_as_accurate_as_eager, interpreter_active, kernel_device, kernel_dtypes

DEVICE = kernel_device()
DTYPES = kernel_dtypes()
INF, NAN = math.inf, math.nan
TERMS = [(kind, base) for kind in KINDS for base in BASES if (kind, base) != ("none", "none")]
needs_kernels = pytest.mark.skipif(
    DEVICE.type == "cpu" and not interpreter_active(), reason="needs a GPU or Triton's interpreter"
)


def randn(*shape, dtype=torch.float32):
    return (3 * torch.randn(*shape)).to(dtype).to(DEVICE)


def soft_target(batch, classes):
    """What mixup makes of two smoothed labels."""
    y = torch.full((batch, classes), 0.1 / classes)
    y[torch.arange(batch), torch.randint(classes, (batch,))] += 0.6
    y[torch.arange(batch), torch.randint(classes, (batch,))] += 0.3
    return y.to(DEVICE)


def indices(batch, classes):
    return torch.randint(classes, (batch,), device=DEVICE)


def present(kind, base, z, d, y, t):
    """The arguments that these terms take."""
    head, label = (None, None) if base == "none" else (z, y)
    dist, teacher = (None, None) if kind == "none" else (d, t)
    return head, dist, label, teacher


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
def test_means_what_the_paper_says(soft):
    z, d, t = torch.randn(3, 5, 11, dtype=torch.float64).unbind()
    y = soft_target(5, 11).cpu().double() if soft else torch.randint(11, (5,))
    torch.testing.assert_close(op(z, d, y, t), paper_hard(z, d, y, t), rtol=1e-12, atol=0)
    by_batch = op(z, d, y, t, kind="soft", alpha=0.1, tau=3.0, soft_divisor="batch")
    torch.testing.assert_close(by_batch, paper_soft(z, d, y, t, 0.1, 3.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["indices", "smoothed", "soft", "binary"])
def test_means_what_deit_computes(kind, base):
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


# ---- the kernels' numerics


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 10, 1000, 2049])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("binary", [False, True])
def test_as_accurate_as_deit_with_soft_targets(binary, kind, classes, dtype):
    z, d, t = randn(3, 3, classes, dtype=dtype).unbind()
    base = "binary_cross_entropy" if binary else "cross_entropy"
    args = present(kind, base, z, d, soft_target(3, classes).to(dtype), t)
    options = dict(kind=kind, alpha=0.3, tau=3.0)
    eager = lambda *a: deit(*a, **options, binary=binary)  # noqa: E731
    assert_as_accurate_as_eager(
        lambda *a: op(*a, **options, base=base), eager, *args, frozen=(2, 3), largest_intermediate=10.0
    )


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [7, 1000])
def test_as_accurate_as_deit_with_class_indices(classes, smoothing, dtype):
    z, d, t = randn(3, 3, classes, dtype=dtype).unbind()
    eager = lambda *a: deit(*a, kind="hard", smoothing=smoothing)  # noqa: E731
    fused = lambda *a: op(*a, label_smoothing=smoothing)  # noqa: E731
    assert_as_accurate_as_eager(fused, eager, z, d, indices(3, classes), t, frozen=(2, 3), largest_intermediate=10.0)


@needs_kernels
@pytest.mark.parametrize("label", ["indices", "smoothed", "soft"])
def test_a_maximum_in_a_later_block_moves_what_was_summed_before(label):
    z = randn(2, 4099)
    z[:, -1] = 50.0
    y = soft_target(2, 4099) if label == "soft" else indices(2, 4099)
    smoothing = 0.1 if label == "smoothed" else 0.0
    both = [lambda z, y, f=f: f(z, None, y, None, kind="none", label_smoothing=smoothing) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, y, frozen=(1,))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_as_accurate_as_the_paper_formula(kind, dtype):
    z, d, t = randn(3, 4, 1000, dtype=dtype).unbind()
    if kind == "hard":
        paper, options = paper_hard, {}
    else:
        paper = lambda *a: paper_soft(*a, 0.1, 3.0)  # noqa: E731
        options = dict(kind="soft", alpha=0.1, tau=3.0, soft_divisor="batch")
    assert_as_accurate_as_eager(
        *(lambda *a: op(*a, **options), paper, z, d, soft_target(4, 1000).to(dtype), t),
        eager=lambda *a: reference(*a, **options),
        frozen=(2, 3),
        largest_intermediate=10.0,
    )


@needs_kernels
@pytest.mark.parametrize("classes", [1, 3, 997, 1024, 2048, 4099, 21841, 30000])  # one, primes, blocks and beyond
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_any_number_of_classes(kind, classes):
    z, d, t = randn(3, 2, classes).unbind()
    options = dict(kind=kind, tau=2.0, reduction="none")
    both = [lambda *a, f=f: f(*a, **options) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, d, soft_target(2, classes), t, frozen=(2, 3))


@needs_kernels
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("kind", "base"), TERMS)
def test_every_reduction_of_every_term(kind, base, reduction):
    z, d, t = randn(3, 5, 24).unbind()
    options = dict(kind=kind, base=base, reduction=reduction, soft_divisor="batch")
    both = [lambda *a, f=f: f(*a, **options) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, *present(kind, base, z, d, indices(5, 24), t), frozen=(2, 3))


@needs_kernels
@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_either_head_may_be_frozen(kind, frozen):
    z, d, t = randn(3, 3, 40).unbind()
    both = [lambda *a, f=f: f(*a, kind=kind) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, d, indices(3, 40), t, frozen=(*frozen, 2, 3))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_one_head_may_serve_both_terms(kind, dtype):
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


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_any_layout(kind, layout):
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


@needs_kernels
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_dtype_and_stride(label_dtype):
    z, d = randn(2, 5, 24).unbind()
    y, k = torch.randint(24, (2, 5, 2), device=DEVICE)
    expected = op(z, d, y[:, 0], k[:, 0])
    with backends.use_backend("triton"):
        got = op(z, d, y.to(label_dtype)[:, 0], k.to(label_dtype)[:, 0])
    torch.testing.assert_close(got, expected)


@needs_kernels
@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_teacher_and_heads_may_differ_in_dtype(kind, teacher_dtype):
    z, d, t = randn(3, 4, 24).unbind()
    args = (z, d.half(), soft_target(4, 24), t.to(teacher_dtype))
    both = [lambda *a, f=f: f(*a, kind=kind) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, *args, frozen=(2, 3))


@needs_kernels
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


@needs_kernels
def test_one_row():
    z, d, t = randn(3, 1, 24).unbind()
    assert_as_accurate_as_eager(op, reference, z, d, indices(1, 24), t, frozen=(2, 3))


@needs_kernels
def test_repeated_runs_give_the_same_bits():
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


@needs_kernels
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_registered_and_eager_paths_give_the_same_bits(kind, monkeypatch):
    z, d, t = randn(3, 4, 24).unbind()
    y = indices(4, 24)
    z.requires_grad_()
    d.requires_grad_()
    outcomes = []
    for registered in (False, True):
        monkeypatch.setattr(backends, "registered_path", lambda *_, r=registered: r)
        with backends.use_backend("triton"):
            loss = op(z, d, y, t, kind=kind)
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, (z, d))))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


# ---- hostile values


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_logits_of_ten_thousand(kind, binary, dtype):
    z, d, t = (torch.randint(-1, 2, (3, 4, 24)) * 1e4).to(dtype).to(DEVICE).unbind()
    base = "binary_cross_entropy" if binary else "cross_entropy"
    both = [lambda *a, f=f: f(*a, kind=kind, base=base, tau=2.0, reduction="none") for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, d, soft_target(4, 24).to(dtype), t, frozen=(2, 3))


@needs_kernels
def test_small_losses_beside_large_logits_keep_their_digits():
    """log-sum-exp as one fp32 number would round to multiples of 1e-3 here."""
    z = torch.tensor([[1e4, 1e4 - 2.0, -1e4]], device=DEVICE)
    with backends.use_backend("triton"):
        loss = op(z, None, torch.tensor([0], device=DEVICE), None, kind="none")
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-6)


@needs_kernels
def test_small_binary_losses_keep_their_digits():
    """log(1 + exp(-12)) has two digits left once 1 + exp(-12) is rounded to fp32."""
    z = torch.tensor([[-12.0, -14.0]], device=DEVICE)
    with backends.use_backend("triton"):
        loss = op(z, None, torch.zeros_like(z), None, kind="none", base="binary_cross_entropy")
    expected = (math.log1p(math.exp(-12)) + math.log1p(math.exp(-14))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@needs_kernels
def test_what_a_later_block_outweighs_entirely_leaves_no_nan():
    """A class that the student masks adds infinity while it seems likely; a later one makes its probability zero."""
    z, t = randn(2, 1, 5000).unbind()
    z[0, 7] = -INF
    t[0, 4000] = 1000.0
    with backends.use_backend("triton"):
        loss = op(None, z, None, t, kind="soft", base="none")
    expected = reference(None, z.double(), None, t.double(), kind="soft", base="none")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@needs_kernels
@pytest.mark.parametrize("classes", [24, 5000])  # one block, and blocks that are masked as a whole
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_masked_classes_count_as_if_they_were_not_there(backend, binary, kind, classes):
    kept = torch.zeros(classes, dtype=torch.bool, device=DEVICE)
    kept[-9:-1] = True
    z, d, t = randn(3, 2, classes).unbind()
    y = soft_target(2, classes) * kept
    base = "binary_cross_entropy" if binary else "cross_entropy"

    def run(z, d, y, t):
        z, d = z.detach().requires_grad_(), d.detach().requires_grad_()
        # By the sum over classes, whose number differs.
        loss = op(z, d, y, t, base=base, kind=kind, tau=2.0, soft_divisor="batch", alpha=0.0 if binary else 0.3)
        return loss.detach(), *torch.autograd.grad(loss, (z, d))

    with backends.use_backend(backend):
        loss, dz, dd = run(*(x.masked_fill(~kept, -INF) for x in (z, d)), y, t.masked_fill(~kept, -INF))
    expected, expected_dz, expected_dd = run(*(x[:, kept] for x in (z, d, y, t)))
    scale = kept.sum() / classes if binary else 1.0  # binary cross-entropy is a mean over the classes
    torch.testing.assert_close(loss, expected * scale)
    torch.testing.assert_close(dz[:, kept], expected_dz * scale)
    torch.testing.assert_close(dd[:, kept], expected_dd)
    assert not dz[:, ~kept].any() and not dd[:, ~kept].any()


@needs_kernels
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["logits", "dist_logits", "teacher", "target"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_non_finite_values_spread_as_pytorch_spreads_them(kind, where, value):
    z, d, t = randn(3, 4, 24).unbind()
    y = soft_target(4, 24)
    dict(logits=z, dist_logits=d, teacher=t, target=y)[where][1, 5] = value
    both = [lambda *a, f=f: f(*a, kind=kind, reduction="none") for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, d, y, t, frozen=(2, 3))


@needs_kernels
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_of_non_finite_values_spoils_no_other(value, kind):
    z, d, t = randn(3, 4, 24).unbind()
    z[1], d[1], t[1] = value, value, value
    y = soft_target(4, 24)
    both = [lambda *a, f=f: f(*a, kind=kind, reduction="none") for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, d, y, t, frozen=(2, 3))
    with backends.use_backend("triton"):
        assert op(z, d, y, t, kind=kind, reduction="none").isnan().tolist() == [False, True, False, False]


@needs_kernels
def test_equal_logits_lose_the_logarithm_of_the_number_of_classes():
    z = torch.full((3, 1000), -7.5, device=DEVICE)
    with backends.use_backend("triton"):
        loss = op(z, z, indices(3, 1000), z)
    assert loss.item() == pytest.approx(math.log(1000), rel=1e-6)


@needs_kernels
@pytest.mark.parametrize("total", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("base", ["cross_entropy", "binary_cross_entropy"])
def test_soft_targets_need_not_sum_to_one(base, total):
    z = randn(4, 24)
    both = [lambda z, y, f=f: f(z, None, y, None, kind="none", base=base) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, total * soft_target(4, 24), frozen=(1,))


@needs_kernels
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_term_of_weight_zero_counts_as_zero_whatever_its_value(backend, alpha):
    z, d, t = randn(3, 4, 24).unbind()
    y = indices(4, 24)
    idle, busy = (d, z) if alpha == 0 else (z, d)
    idle[:, :] = 0.0
    idle[torch.arange(4), t.argmax(1) if alpha == 0 else y] = -INF  # an infinite loss
    idle[1] = NAN
    z.requires_grad_()
    d.requires_grad_()
    with backends.use_backend(backend):
        loss = op(z, d, y, t, alpha=alpha)
        alone = op(
            *((z, None, y, None) if alpha == 0 else (None, d, None, t)),
            **(dict(kind="none") if alpha == 0 else dict(base="none")),
        )
    torch.testing.assert_close(loss, alone)
    loss.backward()
    assert not idle.grad.any() and busy.grad.any()


# ---- class indices out of range


@needs_kernels
@pytest.mark.parametrize("base", ["cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("index", [-1, -100, 24, 2**40])
def test_an_index_out_of_range_makes_its_own_row_nan(index, base):
    z, d = randn(2, 4, 24).unbind()
    z.requires_grad_()
    d.requires_grad_()
    y, k = indices(4, 24), indices(4, 24)
    y[1], k[2] = index, index
    with backends.use_backend("triton"):
        loss = op(z, d, y, k, base=base, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, True, False]
    assert z.grad.isnan().all(1).tolist() == [False, True, False, False]
    assert d.grad.isnan().all(1).tolist() == [False, False, True, False]
    assert torch.equal(z.grad.isnan().any(1), z.grad.isnan().all(1))


@pytest.mark.parametrize("index", [-1, -100, 24])
def test_the_reference_agrees_on_indices_out_of_range(index):
    z, d = torch.randn(2, 4, 24, requires_grad=True).unbind()
    y, k = torch.randint(24, (2, 4))
    y[1], k[2] = index, index
    loss = reference(z, d, y, k, reduction="none", label_smoothing=0.1)
    dz, dd = torch.autograd.grad(loss.sum(), (z, d))
    assert loss.isnan().tolist() == [False, True, True, False]
    assert dz.isnan().any(1).tolist() == [False, True, False, False]
    assert dd.isnan().any(1).tolist() == [False, False, True, False]


@needs_kernels
@pytest.mark.parametrize(("argument", "row"), [("target", 1), ("teacher", 2)])
def test_the_debug_switch_names_an_index_out_of_range(argument, row):
    z, d = randn(2, 4, 24).unbind()
    labels = dict(target=indices(4, 24), teacher=indices(4, 24))
    labels[argument][row] = 24
    message = rf"{argument}: expected class indices in \[0, 24\), got 24 in row {row}"
    with backends.use_backend("triton"), pytest.raises(IndexError, match=message):
        op(z, d, **labels, check_indices=True)


def test_the_reference_on_a_cpu_always_names_an_index_out_of_range():
    with pytest.raises(IndexError, match=r"target: expected class indices in \[0, 3\), got -100 in row 0"):
        op(torch.randn(1, 3), None, torch.tensor([-100]), None, kind="none")


# ---- what is kept, launched and waited for


@contextlib.contextmanager
def counted_launches():
    from fastdeit.kernels import distillation_cross_entropy as kernels

    launched = []

    def launch(kernel, *args, **kwargs):
        launched.append(kernel.__name__)
        return real(kernel, *args, **kwargs)

    real = kernels.launch
    with mock.patch.object(kernels, "launch", launch), backends.use_backend("triton"):
        yield launched


@needs_kernels
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_three_launches_forward_and_backward(kind):
    z, d, t = randn(3, 4, 1000).unbind()
    z.requires_grad_()
    d.requires_grad_()
    with counted_launches() as launched:
        op(z, d, soft_target(4, 1000), t, kind=kind).backward()
    assert len(launched) == 3


@needs_kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(mode):
    z, d, t = randn(3, 4, 24).unbind()
    z.requires_grad_()
    allocated = []
    empty = torch.empty

    def counting(*args, **kwargs):
        allocated.append(empty(*args, **kwargs))
        return allocated[-1]

    with mode(), backends.use_backend("triton"), mock.patch.object(torch, "empty", counting):
        loss = op(z, d, indices(4, 24), t)
    assert not loss.requires_grad
    assert sorted(x.numel() for x in allocated) == [1, 4]  # the loss and the rows it sums


@needs_kernels
def test_hard_distillation_keeps_the_teachers_labels_only():
    z, d, t = randn(3, 4, 24).unbind()
    z.requires_grad_()
    d.requires_grad_()
    kept = []
    with backends.use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, id):
        op(z, d, indices(4, 24), t)
    assert {x.data_ptr() for x in kept}.isdisjoint({t.data_ptr()})
    own = [x for x in kept if x.data_ptr() not in {z.data_ptr(), d.data_ptr()}]
    assert sum(x.numel() * x.element_size() for x in own) == 4 * (8 + 7 * 4 + 4)  # target, statistics, labels


@needs_kernels
def test_inputs_are_not_written_to():
    tensors = [*randn(3, 4, 24).unbind(), soft_target(4, 24)]
    before = [x.clone() for x in tensors]
    z, d, t, y = (x.requires_grad_() if i < 2 else x for i, x in enumerate(tensors))
    with backends.use_backend("triton"):
        op(z, d, y, t, kind="soft").backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_never_waits_for_the_gpu(kind):
    z, d, t = randn(3, 4, 24).unbind()
    z.requires_grad_()
    args = present(kind, "cross_entropy", z, d, indices(4, 24), t)
    op(*args, kind=kind).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*args, kind=kind).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_runs_inside_a_cuda_graph():
    z, d, t = randn(3, 4, 24).unbind()
    y = indices(4, 24)
    z.requires_grad_()
    expected = torch.autograd.grad(op(z, d, y, t), z)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = torch.autograd.grad(op(z, d, y, t), z)[0]
    graph.replay()
    assert torch.equal(got, expected)


# ---- PyTorch's own machinery


@needs_kernels
@pytest.mark.parametrize("low", DTYPES[1:])
def test_autocast_gives_a_float32_loss(low):
    z, d, t = randn(3, 4, 24, dtype=low).unbind()
    z.requires_grad_()
    y = indices(4, 24)
    losses = {}
    for backend in ("triton", "reference"):
        with backends.use_backend(backend), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            losses[backend] = op(z, d, y, t, kind="soft")
    exact = reference(z.double(), d.double(), y, t.double(), kind="soft").float()
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.testing.assert_close(losses["triton"], exact)
    torch.testing.assert_close(losses["reference"], exact)
    assert torch.autograd.grad(losses["triton"], z)[0].dtype == low


@pytest.mark.parametrize(("kind", "base"), TERMS)
@pytest.mark.parametrize("soft", [False, True])
def test_reference_gradients(kind, base, soft):
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


@pytest.mark.parametrize("argument", range(4))
def test_float64_anywhere_runs_the_reference(argument):
    tensors = [randn(2, 5) for _ in range(4)]
    tensors[argument] = tensors[argument].double()
    assert why_reference(*tensors) is not None
    with backends.use_backend("triton"), pytest.raises(RuntimeError, match="float64 input"):
        why_reference(*tensors)


@needs_kernels
def test_a_second_derivative_is_refused_rather_than_zero():
    z = randn(2, 5).requires_grad_()
    with backends.use_backend("triton"):
        loss = op(z, None, indices(2, 5), None, kind="none")
    (dz,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dz.sum().backward()


def test_torch_func_takes_the_reference():
    z, d, t = torch.randn(3, 4, 5, dtype=torch.float64).unbind()
    y = torch.randint(5, (4,))
    got = torch.func.grad(lambda z: op(z, d, y, t))(z)
    z.requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(reference(z, d, y, t), z)[0])


@needs_kernels
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_compiles_to_one_graph_forward_and_backward(kind):
    z, d, t = randn(3, 4, 24).unbind()
    y = indices(4, 24)
    z.requires_grad_()
    d.requires_grad_()
    torch.compiler.reset()
    with backends.use_backend("triton"):
        compiled = torch.compile(lambda *a: op(*a, kind=kind), fullgraph=True, backend="aot_eager")
        got, expected = compiled(z, d, y, t), op(z, d, y, t, kind=kind)
        once = torch.compile(lambda z, y, t: op(z, z, y, t, kind=kind), fullgraph=True, backend="aot_eager")
        got_once, expected_once = once(z, y, t), op(z, z, y, t, kind=kind)
    assert torch.equal(got, expected) and torch.equal(got_once, expected_once)
    for a, b in zip(torch.autograd.grad(got, (z, d)), torch.autograd.grad(expected, (z, d)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.autograd.grad(got_once, z)[0], torch.autograd.grad(expected_once, z)[0])


@needs_kernels
@pytest.mark.parametrize("one_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_registered_ops_pass_opcheck(kind, one_head):
    z, d, t = randn(3, 2, 8).unbind()
    z, d, y, t = present(kind, "cross_entropy", z.requires_grad_(), d.requires_grad_(), indices(2, 8), t)
    d = None if one_head else d
    options = (kind, "cross_entropy", 0.5, 2.0, 0.0, "numel", "mean")
    torch.library.opcheck(distillation_cross_entropy_forward, (z, d, y, t, *options, torch.float32))
    loss, statistics, labels = distillation_cross_entropy_forward(z, d, y, t, *options, torch.float32)
    heads = [x if x is None else x.detach() for x in (z, d)]
    arguments = (torch.ones_like(loss.detach()), *heads, y, t, statistics, labels, *options, True, d is not None)
    torch.library.opcheck(distillation_cross_entropy_backward, arguments)


@needs_kernels
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_pytorchs_flop_counter_knows_the_ops(kind):
    z, d, t = randn(3, 4, 24).unbind()
    z.requires_grad_()
    d.requires_grad_()
    with backends.use_backend("triton"), FlopCounterMode(display=False) as counter:
        op(z, d, soft_target(4, 24), t, kind=kind).backward()
    options = dict(kind=kind, soft_target=True)
    forward = costs.distillation_cross_entropy_forward(4, 24, **options)
    backward = costs.distillation_cross_entropy_backward(4, 24, **options)
    assert counter.get_total_flops() == (forward + backward).flops > 0


# ---- bad input

Z = torch.zeros(2, 3)
Y = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(kind="medium"), ValueError, "kind: expected one of none, hard, soft, got 'medium'"),
        (dict(base="mse"), ValueError, "base: expected one of cross_entropy, binary_cross_entropy, none, got 'mse'"),
        (dict(reduction="max"), ValueError, "reduction: expected one of mean, sum, none, got 'max'"),
        (dict(soft_divisor="rows"), ValueError, "soft_divisor: expected one of numel, batch, got 'rows'"),
        (dict(alpha=1.5), ValueError, r"alpha: expected a weight in \[0, 1\], got 1.5"),
        (dict(alpha=NAN), ValueError, "alpha: .* got nan"),
        (dict(tau=0.0), ValueError, "tau: expected a finite temperature > 0, got 0.0"),
        (dict(tau=INF), ValueError, "tau: .* got inf"),
        (dict(label_smoothing=1.0), ValueError, r"label_smoothing: expected a value in \[0, 1\), got 1.0"),
        (dict(label_smoothing=0.1, target=Z), ValueError, "label_smoothing: expected 0 with soft targets, got 0.1"),
        (
            dict(label_smoothing=0.1, base="binary_cross_entropy"),
            ValueError,
            "label_smoothing: expected 0 with base 'binary_cross_entropy', got 0.1",
        ),
        (dict(kind="none", base="none"), ValueError, "kind, base: expected at least one term"),
        (dict(kind="none"), ValueError, r"dist_logits: expected None with kind 'none', got a tensor \(2, 3\)"),
        (dict(base="none"), ValueError, r"logits: expected None with base 'none', got a tensor \(2, 3\)"),
        (dict(logits=None), TypeError, "logits: expected a tensor with base 'cross_entropy', got None"),
        (dict(dist_logits=None), TypeError, "dist_logits: expected a tensor with kind 'hard', got None"),
        (dict(target=None), TypeError, "target: expected a tensor with base 'cross_entropy', got None"),
        (dict(teacher=[1, 2]), TypeError, r"teacher: expected a tensor with kind 'hard', got \[1, 2\]"),
        (dict(logits=Z.long()), TypeError, "logits: expected a floating-point tensor, got torch.int64"),
        (dict(logits=Z[0]), ValueError, r"logits: expected shape \(B, C\) with at least one class, got \(3,\)"),
        (dict(dist_logits=Z[:, :0]), ValueError, r"dist_logits: expected shape \(B, C\) with at least one class"),
        (dict(dist_logits=Z[:1]), ValueError, r"dist_logits: expected the shape of logits \(2, 3\), got \(1, 3\)"),
        (
            dict(target=Y[:1]),
            ValueError,
            r"target: expected one class index per row of logits \(2, 3\), got shape \(1,\)",
        ),
        (dict(target=Y.bool()), TypeError, "target: expected integer class indices or floats, got torch.bool"),
        (dict(target=Z[:, :2]), ValueError, r"target: expected shape \(2, 3\) to match logits, got \(2, 2\)"),
        (
            dict(teacher=torch.zeros(2, 4)),
            ValueError,
            r"teacher: expected shape \(2, 3\) to match logits, got \(2, 4\)",
        ),
        (dict(teacher=Z.clone().requires_grad_()), ValueError, "teacher: it is a constant of the loss"),
        (
            dict(kind="soft", teacher=Y),
            TypeError,
            "teacher: expected floating-point logits with kind 'soft', got torch.int64",
        ),
        (dict(dist_logits=Z.to("meta")), ValueError, "dist_logits: expected device cpu as logits has, got meta"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    arguments = dict(logits=Z, dist_logits=Z, target=Y, teacher=Z) | changes
    with pytest.raises(error, match=message):
        op(**arguments)


def test_exported_among_the_ops():
    assert ops.distillation_cross_entropy is op and "distillation_cross_entropy" in ops.__all__
