"""The pointwise ends of a residual branch, against their formulas in float64."""

import pytest
import torch

from fastdeit.kernels.norm.residual_branch import (
    TILE,
    folded_layer_norm_backward,
    scale_add_backward,
    scale_add_forward,
    select_row_config,
)
from fastdeit.testing import assert_close_to_oracle, kernel_device, kernel_dtypes, poisoned_memory

DEVICE = kernel_device()
DTYPES = kernel_dtypes()
SHAPES = [(1, 1), (3, 7), (2 * TILE.rows + 1, TILE.columns + 3), (6, 2 * TILE.columns)]  # rows, columns


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def per_row(scale, rows):
    return scale.repeat_interleave(rows // len(scale))[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_end_of_a_branch_is_rounded_once(rows, columns, dtype):
    branch, residual, gamma = randn(rows, columns, dtype=dtype), randn(rows, columns), randn(columns)
    samples = 3 if rows % 3 == 0 else 1
    scale = torch.rand(samples, device=DEVICE)
    with poisoned_memory():
        out = scale_add_forward(branch, residual, gamma, scale, torch.float32)
    exact = residual.double() + branch.double() * gamma.double() * per_row(scale, rows).double()
    eager = residual + branch.float() * gamma * per_row(scale, rows)
    assert_close_to_oracle("out", out, exact, eager, exact.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_upstream_gradient_is_scaled_cast_and_summed(rows, columns, dtype):
    dy = randn(rows, columns)
    scale = torch.rand(3 if rows % 3 == 0 else 1, device=DEVICE)
    with poisoned_memory():
        g, total = scale_add_backward(dy, scale, dtype, torch.float32)
    exact = dy.double() * per_row(scale, rows).double()
    eager = dy * per_row(scale, rows)
    assert torch.equal(g, eager.to(dtype))
    assert_close_to_oracle("sum", total, exact.sum(0), eager.sum(0), exact.abs().sum(0).max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_needs_no_scale_and_no_cast_is_not_copied(dtype):
    dy = randn(5, 9, dtype=dtype)
    assert scale_add_backward(dy, None, dtype, None) == (dy, None)
    g, total = scale_add_backward(dy, None, dtype, torch.float32)
    assert g is dy
    assert_close_to_oracle("sum", total, dy.double().sum(0), dy.float().sum(0), dy.abs().float().sum(0).max().item())


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 192, 768, 1000])
def test_the_start_of_a_branch(channels, beside):
    x, upstream = 3 * randn(4, channels) + 1, randn(4, channels)
    dx_new = randn(4, channels) if beside else None

    def gradient(dtype):
        rows = x.detach().to(dtype).requires_grad_()
        normed = torch.nn.functional.layer_norm(rows, (channels,), eps=1e-6)
        (dx,) = torch.autograd.grad(normed, rows, upstream.to(dtype))
        return dx if dx_new is None else dx + dx_new

    mean = x.double().mean(1, keepdim=True)
    rstd = (x.double().var(1, unbiased=False, keepdim=True) + 1e-6).rsqrt()
    x_hat = ((x - mean) * rstd).float()
    with poisoned_memory():
        dx, _ = folded_layer_norm_backward(upstream, x_hat, rstd.flatten().float(), dx_new, torch.float32)
    largest = max(1.0, rstd.max().item()) * upstream.abs().max().item() * max(1.0, x_hat.abs().max().item())
    assert_close_to_oracle("dx", dx, gradient(torch.float64), gradient(torch.float32), largest)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("with_dx", [False, True])
def test_the_branch_added_before_gets_its_scaled_share(scaled, with_dx):
    x_hat, upstream, dx_new, rstd = randn(6, 40), randn(6, 40), randn(6, 40), torch.rand(6, device=DEVICE)
    scale = torch.tensor([0.0, 2.0, 0.5], device=DEVICE) if scaled else None
    dtypes = dict(dx_dtype=torch.float32 if with_dx else None, dbranch_dtype=torch.float16)
    with poisoned_memory():
        alone, _ = folded_layer_norm_backward(upstream, x_hat, rstd, dx_new, torch.float32)
        dx, dbranch = folded_layer_norm_backward(upstream, x_hat, rstd, dx_new, drop_path_scale=scale, **dtypes)
    assert torch.equal(dx, alone) if with_dx else dx is None
    assert torch.equal(dbranch, (alone if scale is None else alone * per_row(scale, 6)).half())


def test_no_rows():
    empty = randn(0, 8)
    with poisoned_memory():
        assert scale_add_forward(empty, empty, None, None, torch.float16).shape == (0, 8)
        assert not scale_add_backward(empty, None, torch.float16, torch.float32)[1].any()
        assert folded_layer_norm_backward(empty, empty, randn(0), None, torch.float32)[0].shape == (0, 8)


def test_a_row_is_held_by_few_enough_warps():
    assert [select_row_config(c).num_warps for c in (1, 192, 384, 768, 1024, 8192)] == [1, 1, 2, 4, 4, 16]
