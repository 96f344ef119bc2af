"""Floors of single ops beside those of an ideal compiler."""

import pytest

from fastdeit.benchmarks.roofline import Ceilings, beside_compile
from fastdeit.costs import Cost, attention_backward, layer_norm_backward

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
