"""Weights with factors and shifts folded in, and the gradients of all of them, against their formulas in float64."""

import itertools

import pytest
import torch

from fastdeit.kernels.gemm.folded_weights import (
    fold_both_forward,
    fold_columns_backward,
    fold_forward,
    fold_rows_backward,
)
from fastdeit.kernels.runtime.column_sums import add_partial_sums
from fastdeit.testing import assert_close_to_oracle, kernel_device, kernel_dtypes, poisoned_memory
from fastdeit.testing.merged_folds import folded_in_one_launch

DEVICE = kernel_device()
DTYPES = kernel_dtypes()
SHAPES = [(1, 1), (7, 3), (70, 65), (9, 515), (0, 4)]  # outputs, channels
SUBSETS = list(itertools.product((False, True), repeat=3))


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def folded(weight, bias, column_scale, column_shift, row_scale):
    """What the kernels compute, as plain formulas that can be differentiated."""
    shift = None if column_shift is None else weight @ column_shift
    bias = shift if bias is None else bias if shift is None else bias + shift
    weight = weight if column_scale is None else weight * column_scale
    if row_scale is not None:
        weight, bias = weight * row_scale[:, None], None if bias is None else bias * row_scale
    return weight, bias


def magnitude(*tensors) -> float:
    """Of the largest intermediate: a row's or column's sum of products of these."""
    product = 1.0
    for tensor in tensors:
        product = product * tensor.double().abs()
    return product.sum(0).max().item() + product.sum(-1).max().item() if product.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "channels"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", ["cast", "LayerNorm", "scale alone", "LayerScale", "all"])
def test_factors_and_shifts_are_folded_in_and_rounded_once(kind, has_bias, outputs, channels, dtype):
    weight = randn(outputs, channels)
    bias = randn(outputs) if has_bias else None
    column_scale = randn(channels) if kind in ("LayerNorm", "scale alone", "all") else None
    column_shift = randn(channels) if kind in ("LayerNorm", "all") else None
    row_scale = randn(outputs) if kind in ("LayerScale", "all") else None
    factors = dict(column_scale=column_scale, column_shift=column_shift, row_scale=row_scale)
    with poisoned_memory():
        found = fold_forward(weight, bias, dtype, **factors)
    tensors = (weight, bias, *factors.values())
    eager = folded(*tensors)
    exact = folded(*(None if t is None else t.double() for t in tensors))
    assert found[0].dtype == dtype and found[0].is_contiguous()
    for name, a, b, c in zip(("weight", "bias"), found, exact, eager, strict=True):
        assert (a is None) == (b is None)
        if a is not None and a.numel():
            shift = torch.ones(()) if column_shift is None else column_shift
            scale = 1.0 if row_scale is None else row_scale.abs().max().item()
            assert_close_to_oracle(name, a, c, b.to(dtype), scale * (1 + magnitude(weight, shift.expand_as(weight))))
    assert row_scale is not None or kind == "all" or torch.equal(found[0], eager[0].to(dtype))


def test_nothing_to_do_is_no_work():
    weight, bias = randn(4, 8), randn(4)
    assert fold_forward(weight, bias, torch.float32) == (weight, bias)
    assert fold_forward(weight, None, torch.float32) == (weight, None)


def gradients(tensors, upstream, dtype):
    inputs = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    outputs = [t for t in folded(*inputs) if t is not None]
    given = [g.to(dtype) for g in upstream[: len(outputs)]]
    wanted = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
    return [None if t is None else next(found) for t in inputs]


@pytest.mark.parametrize(("outputs", "channels"), SHAPES)
@pytest.mark.parametrize("needs", SUBSETS)
def test_gradients_of_columns(needs, outputs, channels):
    weight, scale, shift = randn(outputs, channels), randn(channels), randn(channels)
    dfolded, dbias = randn(outputs, channels), randn(outputs)
    tensors = (weight, None, scale, shift, None)
    exact, eager = (gradients(tensors, (dfolded, dbias), dtype) for dtype in (torch.float64, torch.float32))
    names = ("needs_weight", "needs_scale", "needs_shift")
    given = dfolded.clone() if needs[0] or needs[1] else None
    with poisoned_memory():
        found = fold_columns_backward(given, dbias, weight, scale, shift, **dict(zip(names, needs, strict=True)))
    largest = 1 + magnitude(weight, dfolded) + magnitude(weight, dbias[:, None].expand_as(weight))
    for name, needed, a, at in zip(names, needs, found, (0, 2, 3), strict=True):
        assert needed == (a is not None)
        if needed and a.numel():
            assert_close_to_oracle(name, a, exact[at], eager[at], largest)


@pytest.mark.parametrize("which", ["scale alone", "shift alone", "neither"])
def test_a_norm_without_one_of_its_parameters(which):
    weight, dfolded, dbias = randn(9, 20), randn(9, 20), randn(9)
    scale = randn(20) if which == "scale alone" else None
    shift = randn(20) if which == "shift alone" else None
    expected = gradients((weight, None, scale, shift, None), (dfolded, dbias), torch.float64)
    needs = dict(needs_weight=True, needs_scale=scale is not None, needs_shift=shift is not None)
    with poisoned_memory():
        found = fold_columns_backward(dfolded.clone(), dbias, weight, scale, shift, **needs)
    for a, b in zip(found, (expected[0], *expected[2:4]), strict=True):
        torch.testing.assert_close(a, None if b is None else b.float())


@pytest.mark.parametrize("strips", [1, 64, 150])
@pytest.mark.parametrize("channels", [65, 515])
def test_partial_sums_of_the_bias_are_added_where_they_are_read(channels, strips):
    weight, scale, shift, dfolded = randn(70, channels), randn(channels), randn(channels), randn(70, channels)
    partial, dbias, other = randn(strips, 70), torch.full((70,), float("nan"), device=DEVICE), (randn(1, 3), randn(3))
    later = [other, (partial, dbias)]
    with poisoned_memory():
        needs = dict(needs_weight=True, needs_scale=True, needs_shift=True)
        found = fold_columns_backward(dfolded.clone(), dbias, weight, scale, shift, **needs, later=later)
        assert later[0] is other and [total.shape for _, total in later[1:]] == [(channels,)] * 2
        add_partial_sums(*later)
    exact = partial.double().sum(0)
    assert_close_to_oracle("bias", dbias, exact, partial.sum(0), partial.abs().sum(0).max().item())
    expected = gradients((weight, None, scale, shift, None), (dfolded, dbias), torch.float64)
    for a, at in zip(found, (0, 2, 3), strict=True):
        torch.testing.assert_close(a, expected[at].float(), rtol=1e-4, atol=1e-4)


def test_partial_sums_that_nothing_reads_stay_on_the_list():
    weight, later = randn(9, 20), [(randn(3, 9), randn(9))]
    needs = dict(needs_weight=False, needs_scale=True, needs_shift=False)
    fold_columns_backward(randn(9, 20), later[0][1], weight, randn(20), randn(20), **needs, later=later)
    assert [total.shape for _, total in later] == [(9,), (20,)]


@pytest.mark.parametrize(("outputs", "channels"), SHAPES)
@pytest.mark.parametrize("needs", SUBSETS)
def test_gradients_of_rows(needs, outputs, channels):
    weight, bias, scale = randn(outputs, channels), randn(outputs), randn(outputs)
    dfolded, dbias = randn(outputs, channels), randn(outputs)
    tensors = (weight, bias, None, None, scale)
    exact, eager = (gradients(tensors, (dfolded, dbias), dtype) for dtype in (torch.float64, torch.float32))
    names = ("needs_weight", "needs_bias", "needs_scale")
    given = dfolded.clone() if needs[0] or needs[2] else None
    with poisoned_memory():
        found = fold_rows_backward(given, dbias, weight, bias, scale, **dict(zip(names, needs, strict=True)))
    for name, needed, a, at in zip(names, needs, found, (0, 1, 4), strict=True):
        assert needed == (a is not None)
        if needed and a.numel():
            assert_close_to_oracle(name, a, exact[at], eager[at], 1 + magnitude(weight, dfolded))


def test_rows_without_a_bias():
    weight, scale, dfolded = randn(9, 20), randn(9), randn(9, 20)
    expected = gradients((weight, None, None, None, scale), (dfolded,), torch.float64)
    needs = dict(needs_weight=True, needs_bias=False, needs_scale=True)
    dweight, dbias, dscale = fold_rows_backward(dfolded.clone(), None, weight, None, scale, **needs)
    assert dbias is None
    torch.testing.assert_close(dweight, expected[0].float())
    torch.testing.assert_close(dscale, expected[4].float())


def test_transposed_weights_and_strided_factors():
    weight, scale, shift = randn(12, 40).t(), randn(24)[::2], randn(36)[::3]
    found = fold_forward(weight, None, torch.float16, column_scale=scale, column_shift=shift)
    eager = folded(weight, None, scale, shift, None)
    assert torch.equal(found[0], eager[0].half())
    torch.testing.assert_close(found[1], eager[1].half())


def test_repeats_are_bitwise_equal():
    weight, scale, shift, dfolded, dbias = randn(300, 40), randn(40), randn(40), randn(300, 40), randn(300)
    needs = dict(needs_weight=True, needs_scale=True, needs_shift=True)
    first, second = (fold_columns_backward(dfolded.clone(), dbias, weight, scale, shift, **needs) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_infinities_and_nans_stay():
    weight = randn(3, 5)
    weight[0, 0], weight[1, 1] = float("inf"), float("nan")
    found, bias = fold_forward(
        weight, None, torch.float32, column_scale=randn(5), column_shift=torch.ones(5, device=DEVICE)
    )
    assert found[0, 0].isinf() and found[1, 1].isnan() and found[2].isfinite().all()
    assert bias[0].isinf() and bias[1].isnan() and bias[2].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shapes", [((5, 24), (24, 7)), ((70, 300), (9, 260)), ((1, 1), (3, 2))])
@pytest.mark.parametrize("biased", [True, False])
def test_both_layers_are_folded_as_each_alone(shapes, dtype, biased):
    """In one launch where both change. Weights have equal bits; biases are sums, whose order may differ."""
    head, tail = ((randn(*shape), randn(shape[0]) if biased else None) for shape in shapes)
    scale, shift, gamma = randn(head[0].shape[1]), randn(head[0].shape[1]), randn(tail[0].shape[0])
    for columns, rows in (((scale, shift), gamma), ((scale, None), None), ((None, None), None)):
        options = dict(column_scale=columns[0], column_shift=columns[1])
        with poisoned_memory():
            found = fold_both_forward(head, tail, dtype, **options, row_scale=rows)
        alone = fold_forward(*head, dtype, **options), fold_forward(*tail, dtype, row_scale=rows)
        for (weight, bias), (expected, _), layer, factors in zip(
            found, alone, (head, tail), ((*columns, None), (None, None, rows)), strict=True
        ):
            assert weight is expected or torch.equal(weight, expected)
            exact = folded(*(None if t is None else t.double() for t in (*layer, *factors)))[1]
            assert (bias is None) == (exact is None)
            if bias is not None:
                eager = folded(*layer, *factors)[1].to(dtype)
                assert_close_to_oracle("bias", bias, exact, eager, magnitude(layer[0]) + exact.abs().max().item())


def branch(width, inner, rows, dtype, biased=True, shifted=True, scaled=True):
    """Layers behind a LayerNorm of this width and before a LayerScale, and a call that folds them."""
    head, tail = ((randn(*shape), randn(shape[0]) if biased else None) for shape in ((rows, width), (width, inner)))
    factors = randn(width), randn(width) if shifted else None, randn(width) if scaled else None
    options = dict(zip(("column_scale", "column_shift", "row_scale"), factors, strict=True))
    return head, tail, factors, lambda: fold_both_forward(head, tail, dtype, **options)


# Of attention the width, that which it gives, and rows of its first weight; of an MLP the width and hidden channels.
BRANCHES = [
    ((192, 192, 70, 176, 208), {}, torch.float16),
    ((384, 384, 9, 384, 272), {}, torch.bfloat16),
    ((768, 256, 9, 784, 272), {"biased": False}, torch.float16),
    ((65, 70, 261, 67, 90), {"scaled": False}, torch.bfloat16),
    ((515, 300, 7, 511, 259), {}, torch.float16),
    ((33, 40, 1, 35, 65), {"biased": False, "shifted": False, "scaled": False}, torch.float16),
    ((1, 1, 1, 1, 1), {}, torch.bfloat16),
]


@pytest.mark.parametrize(("sizes", "layers", "dtype"), BRANCHES, ids=str)
def test_two_branches_are_folded_in_one_launch_with_equal_bits(sizes, layers, dtype):
    width, attended, rows, other, hidden = sizes
    branches = branch(width, attended, rows, dtype, **layers), branch(other, hidden, hidden, dtype, **layers)
    branches[1][0][0].view(-1)[-1], branches[0][1][0][0, 0] = float("inf"), float("nan")
    with poisoned_memory():
        found = folded_in_one_launch([call for *_, call in branches])
        apart = [call() for *_, call in branches]
    for (head, tail, (scale, shift, gamma), _), both, expected in zip(branches, found, apart, strict=True):
        parts = zip(both, expected, (head, tail), ((scale, shift, None), (None, None, gamma)), strict=True)
        for made, others, layer, factors in parts:
            exact = folded(*(None if t is None else t.double() for t in (*layer, *factors)))
            eager = folded(*layer, *factors)
            for name, a, other, b, c in zip(("weight", "bias"), made, others, exact, eager, strict=True):
                assert (a is None) == (other is None) == (b is None)
                if a is not None:
                    assert torch.equal(a.view(torch.int16), other.view(torch.int16))
                    assert_close_to_oracle(name, a, b, c.to(dtype))


def test_branches_that_one_kernel_cannot_fold_are_known():
    plain = branch(256, 256, 8, torch.float16)
    others = {
        "tiles": branch(96, 256, 8, torch.float16),
        "vectors": branch(256, 260, 8, torch.float16),
        "dtypes": branch(256, 256, 8, torch.bfloat16),
        "biases": branch(256, 256, 8, torch.float16, biased=False),
        "shifts": branch(256, 256, 8, torch.float16, shifted=False),
        "LayerScale": branch(256, 256, 8, torch.float16, scaled=False),
    }
    folded_in_one_launch([plain[-1], branch(512, 256, 9, torch.float16)[-1]])
    for other in others.values():
        with pytest.raises(ValueError, match="equal tiles, dtypes and missing tensors"):
            folded_in_one_launch([plain[-1], other[-1]])
