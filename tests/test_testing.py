"""The judge is judged: the numerics rule must reject what is wrong, and poisoned memory must show."""

import pytest
import torch

from fastdeit import ops
from fastdeit.testing import assert_as_accurate_as_eager, poisoned_memory

X = torch.linspace(-3, 3, 600).reshape(3, 200)


def judge(op, x=X, reference=lambda x: ops.layer_norm_reference(x, None, None)):
    assert_as_accurate_as_eager(op, reference, x, backend="reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_accepts_the_reference_itself(dtype):
    judge(lambda x: ops.layer_norm_reference(x, None, None), X.to(dtype))


def test_rejects_a_slightly_wrong_result():
    with pytest.raises(AssertionError, match="output 0: maximum error"):
        judge(lambda x: ops.layer_norm_reference(x, None, None) * (1 + 1e-5))


def test_rejects_one_wrong_element_among_many():
    def off_in_one(x):
        y = ops.layer_norm_reference(x, None, None)
        return y + 1e-3 * torch.nn.functional.one_hot(torch.tensor(7), 200)

    with pytest.raises(AssertionError, match="maximum error"):
        judge(off_in_one)


def test_rejects_a_wrong_gradient_behind_a_right_result():
    def detached_mean(x):
        return ops.layer_norm_reference(x, None, None) + (x.detach() - x) * 1e-3

    with pytest.raises(AssertionError, match="gradient of argument 0"):
        judge(detached_mean)


def test_rejects_a_lower_precision_than_was_asked_for():
    with pytest.raises(AssertionError, match="maximum error"):
        judge(lambda x: ops.layer_norm_reference(x.bfloat16(), None, None).float())


def test_rejects_another_dtype_and_another_shape():
    with pytest.raises(AssertionError, match=r"expected torch[.]float32"):
        judge(lambda x: ops.layer_norm_reference(x, None, None).double())
    with pytest.raises(AssertionError, match="expected shape"):
        judge(lambda x: ops.layer_norm_reference(x, None, None)[:1])


def test_rejects_an_element_never_written():
    def forgets_the_last_row(x):
        y = torch.empty_like(x)
        y[:-1] = ops.layer_norm_reference(x, None, None)[:-1]
        return y

    with pytest.raises(AssertionError, match="isnan differs"):
        judge(forgets_the_last_row)


def test_rejects_infinity_where_eager_is_finite():
    with pytest.raises(AssertionError, match="isposinf differs"):
        judge(lambda x: ops.layer_norm_reference(x, None, None).masked_fill(x > 2.9, float("inf")))


def test_rejects_a_missing_gradient():
    with pytest.raises(AssertionError, match="gradient of argument 0: expected a tensor, got none"):
        judge(lambda x: ops.layer_norm_reference(x.detach(), None, None))


def test_strides_of_the_arguments_reach_the_op():
    seen = []
    x = torch.randn(4, 10)[:, ::2]
    judge(lambda x: seen.append(x.stride()) or ops.layer_norm_reference(x, None, None), x)
    assert seen[0] == (10, 2)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3),
        lambda: torch.empty_like(X),
        lambda: torch.empty_strided((2, 2), (2, 1)),
        lambda: X.new_empty(3),
        lambda: X.new_empty_strided((2, 2), (2, 1)),
    ],
)
def test_poisoned_memory_is_nan_and_only_inside(allocate):
    with poisoned_memory():
        assert allocate().isnan().all()
    assert torch.empty is not None and torch.empty.__name__ == "empty"


def test_poisoned_integers_are_out_of_range():
    with poisoned_memory():
        assert (torch.empty(3, dtype=torch.int32) == -1).all()
