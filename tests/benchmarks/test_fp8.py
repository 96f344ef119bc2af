"""FP8 products of the benchmarks: quantization by the formats' definition, products held to float64, devices that have none."""

from dataclasses import replace

import pytest
import torch

from fastdeit.benchmarks import fp8, timing
from fastdeit.testing import fake_cuda

FORMATS = [fp8.VALUE, fp8.GRADIENT]
SCALED = [fp8.PER_TENSOR, fp8.PER_ROW]


def operands(scaled):
    """Of a product that sums over 48 elements; one row a thousand times larger than the others, one of zeros."""
    torch.manual_seed(0)
    a, b = torch.randn(32, 48), torch.randn(64, 48)
    a[3] *= 1000
    b[5] = 0
    return fp8.quantize(a, fp8.GRADIENT, scaled), fp8.quantize(b, fp8.VALUE, scaled)


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_value_becomes_the_nearest_of_the_format(dtype, scaled):
    torch.manual_seed(0)
    matrix = torch.randn(8, 40) * torch.logspace(-6, 3, 8)[:, None]
    got = fp8.quantize(matrix, dtype, scaled)
    there_are = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    there_are = there_are[there_are.isfinite()].double()
    wanted = matrix.double() / got.scale.double()
    least = (wanted[..., None] - there_are).abs().amin(-1)
    # The division is rounded to fp32 before.
    assert ((got.values.double() - wanted).abs() <= least + 1e-6 * wanted.abs()).all()
    top = got.values.float().abs()
    assert (top.amax(1) if scaled == fp8.PER_ROW else top.amax()).eq(torch.finfo(dtype).max).all()
    assert got.scale.shape == ((8, 1) if scaled == fp8.PER_ROW else ())


@pytest.mark.parametrize("scaled", SCALED)
def test_a_product_is_held_to_the_quantized_operands(scaled):
    a, b = operands(scaled)
    fp8.check(fp8.product, a, b)
    assert fp8.product(a, b).dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="FP8 product"):  # a scale that is 2 % off
        fp8.check(lambda a, b: fp8.product(a, replace(b, scale=b.scale * 1.02)), a, b)
    if scaled == fp8.PER_ROW:
        with pytest.raises(AssertionError, match="FP8 product"):
            fp8.check(lambda a, b: fp8.product(replace(a, scale=a.scale.roll(1, 0)), b), a, b)


@pytest.mark.fake_device
def test_a_gpu_gets_one_product_and_an_old_one_says_why_not(monkeypatch):
    cuda = [fp8.Quantized(x.values.cuda(), x.scale.cuda()) for x in operands(fp8.PER_TENSOR)]
    fp8.product(*cuda)
    with fake_cuda.counting() as counts:
        assert fp8.product(*cuda).shape == (32, 64)
    assert counts == dict(gemm=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(timing.NotSupported, match=r"compute capability 8\.9, this GPU has 8\.0"):
        fp8.product(*cuda)
