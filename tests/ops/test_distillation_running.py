"""`ops.distillation_cross_entropy` as it runs: what is kept, launched and waited for, PyTorch's own machinery, bad input."""

import contextlib
import math
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdeit import backends, ops
from fastdeit.cost import formulas as costs
from fastdeit.ops import distillation_cross_entropy as op
from fastdeit.ops import distillation_cross_entropy_reference as reference
from fastdeit.ops.distillation_arguments import KINDS
from fastdeit.ops.distillation_cross_entropy_op import why_reference
from fastdeit.testing import kernel_device, kernel_dtypes

DEVICE = kernel_device()
DTYPES = kernel_dtypes()
INF, NAN = math.inf, math.nan


def randn(*shape, dtype=torch.float32):
    return (3 * torch.randn(*shape)).to(dtype).to(DEVICE)


def indices(batch, classes):
    return torch.randint(classes, (batch,), device=DEVICE)


# ---- what is kept, launched and waited for


@contextlib.contextmanager
def counted_launches():
    from fastdeit.kernels.loss import distillation_cross_entropy as kernels

    launched = []

    def launch(kernel, *args, **kwargs):
        launched.append(kernel.__name__)
        return real(kernel, *args, **kwargs)

    real = kernels.launch
    with mock.patch.object(kernels, "launch", launch), backends.use_backend("triton"):
        yield launched


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_three_launches_forward_and_backward(soft_target, kind):
    z, d, t = randn(3, 4, 1000).unbind()
    z.requires_grad_()
    d.requires_grad_()
    with counted_launches() as launched:
        op(z, d, soft_target(4, 1000), t, kind=kind).backward()
    assert len(launched) == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(mode):
    z, d, t = randn(3, 4, 24).unbind()
    z.requires_grad_()
    allocated, allocate = [], torch.Tensor.new_empty

    def counting(*args, **kwargs):
        made = allocate(*args, **kwargs)
        allocated.append(made.numel())
        return made

    with mode(), backends.use_backend("triton"), mock.patch.object(torch.Tensor, "new_empty", counting):
        loss = op(z, d, indices(4, 24), t)
    assert not loss.requires_grad
    assert sorted(filter(None, allocated)) == [
        1,
        4,
    ]  # the loss and the rows it sums; the interpreter's are empty at first


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


def test_inputs_are_not_written_to(soft_target):
    tensors = [*randn(3, 4, 24).unbind(), soft_target(4, 24)]
    before = [x.clone() for x in tensors]
    z, d, t, y = (x.requires_grad_() if i < 2 else x for i, x in enumerate(tensors))
    with backends.use_backend("triton"):
        op(z, d, y, t, kind="soft").backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_never_waits_for_the_gpu(present, kind):
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
@pytest.mark.numeric
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


# ---- PyTorch's own machinery


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


@pytest.mark.parametrize("argument", range(4))
def test_float64_anywhere_runs_the_reference(argument):
    tensors = [randn(2, 5) for _ in range(4)]
    tensors[argument] = tensors[argument].double()
    assert why_reference(*tensors) is not None
    with backends.use_backend("triton"), pytest.raises(RuntimeError, match="float64 input"):
        why_reference(*tensors)


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


@pytest.mark.parametrize("one_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_registered_ops_pass_opcheck(present, kind, one_head):
    z, d, t = randn(3, 2, 8).unbind()
    z, d, y, t = present(kind, "cross_entropy", z.requires_grad_(), d.requires_grad_(), indices(2, 8), t)
    d = None if one_head else d
    options = (kind, "cross_entropy", 0.5, 2.0, 0.0, "numel", "mean")
    registered, options = torch.ops.fastdeit, (*options, torch.float32)
    torch.library.opcheck(registered.distillation_cross_entropy_forward, (z, d, y, t, *options, True))
    loss, statistics, labels = registered.distillation_cross_entropy_forward(z, d, y, t, *options, True)
    labels = labels if kind == "hard" else None
    heads = [x if x is None else x.detach() for x in (z, d)]
    wanted = [*(None if x is None else x.dtype for x in heads), None, None]
    wanted += [[] if x is None else x.shape for x in (*heads, y, t)]
    arguments = (torch.ones_like(loss.detach()), *heads, y, t, statistics, labels, *wanted, *options)
    torch.library.opcheck(registered.distillation_cross_entropy_backward, arguments)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_pytorchs_flop_counter_knows_the_ops(soft_target, kind):
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
