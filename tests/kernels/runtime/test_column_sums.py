"""Sums over rows: of one or two matrices, and of tables of partial sums, four a launch."""

import pytest
import torch

from fastdeit.kernels.mlp.activation import activation_backward
from fastdeit.kernels.runtime import column_sums
from fastdeit.kernels.runtime.column_sums import add_partial_sums, row_strips
from fastdeit.testing import assert_close_to_oracle, kernel_device, kernel_dtypes, poisoned_memory

DEVICE = kernel_device()


def sums(*matrices):
    later = []
    with poisoned_memory():
        totals = column_sums.column_sums(*matrices, later=later)
        add_partial_sums(*later)
    return totals


def assert_sums(total, x):
    exact = x.double().sum(0)
    assert_close_to_oracle("sum", total, exact, x.float().sum(0), x.abs().float().sum(0).max().item())


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(("rows", "widths"), [(1, (1, 3)), (9, (259, 16)), (70, (32, 512)), (5, (7,))])
def test_columns_of_one_or_two_matrices(rows, widths, dtype):
    matrices = [torch.randn(rows, width).to(DEVICE, dtype) for width in widths]
    for total, x in zip(sums(*((x, torch.float32) for x in matrices)), matrices, strict=True):
        assert_sums(total, x)


def test_what_is_not_wanted_is_not_summed():
    x, y = torch.randn(6, 8, device=DEVICE), torch.randn(6, 24, device=DEVICE)
    assert sums((x, None), (y, None)) == [None, None]
    none, total = sums((x, None), (y, torch.float32))
    assert none is None
    assert_sums(total, y)
    assert sums((x, torch.float16), (y, None))[0].dtype == torch.float16


def test_no_rows_sum_to_zero():
    total, other = sums((torch.empty(0, 4, device=DEVICE), torch.float32), (torch.empty(0, 2, device=DEVICE), None))
    assert torch.equal(total, torch.zeros(4, device=DEVICE)) and other is None


@pytest.mark.parametrize(("rows", "hidden", "width"), [(1, 3, 1), (70, 259, 300), (9, 16, 32)])
def test_columns_of_a_matrix_in_the_launch_of_an_activations_gradient(rows, hidden, width):
    dh, z, x = (torch.randn(rows, n, device=DEVICE) for n in (hidden, hidden, width))
    total, later = x.new_empty(width), []
    with poisoned_memory():
        found = activation_backward(dh, z, "gelu", dbias_dtype=torch.float32, summed=(x, total), later=later)
        add_partial_sums(*later)
        alone = activation_backward(dh, z, "gelu")
    assert all(map(torch.equal, found[:2], alone[:2]))
    assert_sums(found[2], found[0])
    assert_sums(total, x)


def test_tables_of_any_shape_share_launches(monkeypatch):
    launches = []
    launch = column_sums.launch
    monkeypatch.setattr(column_sums, "launch", lambda *args: (launches.append(args[1]), launch(*args)))
    tables = [
        torch.randn(strips, width, device=DEVICE) for strips, width in [(1, 40), (300, 5), (7, 64), (2, 16), (3, 9)]
    ]
    totals = [torch.full(t.shape[1:], float("nan"), device=DEVICE, dtype=torch.float32) for t in tables]
    add_partial_sums(*zip(tables, totals, strict=True))
    assert launches == [(4, 4), (1, 1)]
    for total, table in zip(totals, tables, strict=True):
        assert_sums(total, table)
    add_partial_sums()
    assert len(launches) == 2


def test_strips_cover_the_rows():
    for rows in (1, 4, 1000):
        strips, rows_per_strip = row_strips(rows, 4, 3, torch.empty(0, device=DEVICE))
        assert (strips - 1) * rows_per_strip < rows <= strips * rows_per_strip and rows_per_strip % 4 == 0
