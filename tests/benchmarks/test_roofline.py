"""Floors of single ops beside those of an ideal compiler."""

import pytest
import torch

from fastdeit.benchmarks.roofline import Ceilings, after_product, beside_compile, one_after_another
from fastdeit.benchmarks.suites import test_mlp as mlp_suite
from fastdeit.cost.formulas import Cost, attention_backward, layer_norm_backward
from fastdeit.cost.models import mlp_parts

GPU = Ceilings(tflops=1.0, tb_per_s=1.0)


def test_the_compilers_floor_moves_more_bytes():
    memory_bound = Cost(flops=10**6, bytes=4 * 10**6, launches=1)
    assert beside_compile(memory_bound, 10**6, matrix=True)(GPU) == pytest.approx((4.0, 5.0))
    bound_by_arithmetic = Cost(flops=8 * 10**6, bytes=4 * 10**6, launches=1)
    assert beside_compile(bound_by_arithmetic, 10**6, matrix=True)(GPU) == pytest.approx((8.0, 8.0))
    assert beside_compile(bound_by_arithmetic, 10**6, matrix=False)(GPU) == pytest.approx((4.0, 5.0))


@pytest.mark.parametrize(
    "cost, more, elements, bytes_each",
    [
        (attention_backward(2, 10, 1, 64), 22, 2 * 10 * 64, 38),
        (layer_norm_backward(20, 64, stream_bytes=2, out_bytes=2), 4, 20 * 64, 14),
    ],
    ids=["attention", "bf16 LayerNorm"],
)
def test_the_suites_figures_are_those_of_the_whole_model(cost, more, elements, bytes_each):
    """But for statistics, a few bytes a row."""
    _, compiled = beside_compile(cost, more * elements, matrix=False)(GPU)
    assert compiled * 1e6 == pytest.approx(bytes_each * elements, rel=0.06)


def test_a_product_bound_by_arithmetic_hides_what_is_inside_it():
    with_everything, alone = Cost(10 * 10**6, 4 * 10**6, 1), Cost(10 * 10**6, 3 * 10**6, 1)
    assert after_product(with_everything, alone, 2 * 10**6)(GPU) == pytest.approx((10.0, 12.0))


def test_an_mlp_s_parts_follow_one_another():
    """By hand, 2 rows of 4 channels and 8 hidden, bound by memory: products, then what is between them."""

    def forward(execution):
        return [part for part in mlp_parts(2, 4, 8, execution, training=False) if part.name != "fc2"]

    fc1 = 2 * 2 * (4 + 8) + 2 * 4 * 8 + 2 * (2 * 2 * (4 + 8)) + 8 * 4 * 8
    compiled = fc1 + 2 * 2 * 8 + 2 * 2 * 2 * 8 + 3 * 2 * 2 * 8  # the bias's sum; the activation there and back
    fused_floor, compile_floor = one_after_another(forward)(Ceilings(tflops=1e9, tb_per_s=1.0))
    assert (fused_floor * 1e6, compile_floor * 1e6) == pytest.approx((fc1, compiled))


@pytest.mark.parametrize("work", mlp_suite.WORKS)
@pytest.mark.parametrize("channels", [192, 768])
def test_fusing_what_is_between_products_lowers_the_floor_of_each_work(work, channels):
    name, _, direction = work.partition("-")
    sizes = mlp_suite.Sizes(256, 198, channels, torch.bfloat16)
    fused, compiled = mlp_suite.WORK[name](sizes, direction).floors(Ceilings(tflops=600.0, tb_per_s=4.3))
    assert 0 < fused < compiled
