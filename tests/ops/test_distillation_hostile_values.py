"""`ops.distillation_cross_entropy` of infinite, huge and masked values, of odd targets, and of class indices out of range."""

import math

import pytest
import torch

from fastdeit import backends
from fastdeit.ops import distillation_cross_entropy as op
from fastdeit.ops import distillation_cross_entropy_reference as reference
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device, kernel_dtypes

DEVICE = kernel_device()
DTYPES = kernel_dtypes()
INF, NAN = math.inf, math.nan


def randn(*shape, dtype=torch.float32):
    return (3 * torch.randn(*shape)).to(dtype).to(DEVICE)


def indices(batch, classes):
    return torch.randint(classes, (batch,), device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_logits_of_ten_thousand(soft_target, kind, binary, dtype):
    z, d, t = (torch.randint(-1, 2, (3, 4, 24)) * 1e4).to(dtype).to(DEVICE).unbind()
    base = "binary_cross_entropy" if binary else "cross_entropy"
    both = [lambda *a, f=f: f(*a, kind=kind, base=base, tau=2.0, reduction="none") for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, d, soft_target(4, 24).to(dtype), t, frozen=(2, 3))


def test_small_losses_beside_large_logits_keep_their_digits():
    """log-sum-exp as one fp32 number would round to multiples of 1e-3 here."""
    z = torch.tensor([[1e4, 1e4 - 2.0, -1e4]], device=DEVICE)
    with backends.use_backend("triton"):
        loss = op(z, None, torch.tensor([0], device=DEVICE), None, kind="none")
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-6)


def test_small_binary_losses_keep_their_digits():
    """log(1 + exp(-12)) has two digits left once 1 + exp(-12) is rounded to fp32."""
    z = torch.tensor([[-12.0, -14.0]], device=DEVICE)
    with backends.use_backend("triton"):
        loss = op(z, None, torch.zeros_like(z), None, kind="none", base="binary_cross_entropy")
    expected = (math.log1p(math.exp(-12)) + math.log1p(math.exp(-14))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_what_a_later_block_outweighs_entirely_leaves_no_nan():
    """A class that the student masks adds infinity while it seems likely; a later one makes its probability zero."""
    z, t = randn(2, 1, 5000).unbind()
    z[0, 7] = -INF
    t[0, 4000] = 1000.0
    with backends.use_backend("triton"):
        loss = op(None, z, None, t, kind="soft", base="none")
    expected = reference(None, z.double(), None, t.double(), kind="soft", base="none")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("classes", [24, 5000])  # one block, and blocks that are masked as a whole
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_masked_classes_count_as_if_they_were_not_there(soft_target, backend, binary, kind, classes):
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


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["logits", "dist_logits", "teacher", "target"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_non_finite_values_spread_as_pytorch_spreads_them(soft_target, kind, where, value):
    z, d, t = randn(3, 4, 24).unbind()
    y = soft_target(4, 24)
    dict(logits=z, dist_logits=d, teacher=t, target=y)[where][1, 5] = value
    both = [lambda *a, f=f: f(*a, kind=kind, reduction="none") for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, d, y, t, frozen=(2, 3))


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_of_non_finite_values_spoils_no_other(soft_target, value, kind):
    z, d, t = randn(3, 4, 24).unbind()
    z[1], d[1], t[1] = value, value, value
    y = soft_target(4, 24)
    both = [lambda *a, f=f: f(*a, kind=kind, reduction="none") for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, d, y, t, frozen=(2, 3))
    with backends.use_backend("triton"):
        assert op(z, d, y, t, kind=kind, reduction="none").isnan().tolist() == [False, True, False, False]


def test_equal_logits_lose_the_logarithm_of_the_number_of_classes():
    z = torch.full((3, 1000), -7.5, device=DEVICE)
    with backends.use_backend("triton"):
        loss = op(z, z, indices(3, 1000), z)
    assert loss.item() == pytest.approx(math.log(1000), rel=1e-6)


@pytest.mark.parametrize("total", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("base", ["cross_entropy", "binary_cross_entropy"])
def test_soft_targets_need_not_sum_to_one(soft_target, base, total):
    z = randn(4, 24)
    both = [lambda z, y, f=f: f(z, None, y, None, kind="none", base=base) for f in (op, reference)]
    assert_as_accurate_as_eager(*both, z, total * soft_target(4, 24), frozen=(1,))


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


@pytest.mark.parametrize(("argument", "row"), [("target", 1), ("teacher", 2)])
def test_the_debug_switch_names_an_index_out_of_range(argument, row):
    z, d = randn(2, 4, 24).unbind()
    labels = dict(target=indices(4, 24), teacher=indices(4, 24))
    labels[argument][row] = 24
    message = rf"{argument}: expected class indices in \[0, 24\), got 24 in row {row}"
    with backends.use_backend("triton"), pytest.raises(IndexError, match=message):
        op(z, d, **labels, check_indices=True)


@pytest.mark.skipif(backends.on_gpu(torch.empty(0)), reason="tensors on the CPU count as a GPU's")
def test_the_reference_on_a_cpu_always_names_an_index_out_of_range():
    with pytest.raises(IndexError, match=r"target: expected class indices in \[0, 3\), got -100 in row 0"):
        op(torch.randn(1, 3), None, torch.tensor([-100]), None, kind="none")
