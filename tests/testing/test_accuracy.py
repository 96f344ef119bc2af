"""The judge is judged: the numerics rule must reject what is wrong, and poisoned memory must show."""

import importlib.util
import sys

import pytest
import torch

from fastdeit import ops, testing
from fastdeit.testing import assert_as_accurate_as_eager, assert_model_close_to_oracle, poisoned_memory

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


def gradients_of_a_model():
    """{name: gradient} in float64 and in bfloat16, as PyTorch might give it; a bias of one element, one that is unused."""
    exact = {"weight": torch.randn(64, 64, dtype=torch.float64), "bias": torch.full((1,), 0.1, dtype=torch.float64)}
    eager = {name: t.bfloat16() * 1.0078125 for name, t in exact.items()}
    return {**exact, "unused": None}, {**eager, "unused": None}


def test_a_model_is_judged_by_all_its_gradients():
    """An element alone may be off by more than twice PyTorch's error there, but not by more than twice the largest there is."""
    exact, eager = gradients_of_a_model()
    eager["bias"] = exact["bias"].bfloat16()
    got = {**eager, "bias": eager["bias"] * 1.0078125}
    assert_model_close_to_oracle(got, exact, eager)


def test_a_gradient_that_is_zero_but_for_rounding_hides_no_other():
    """As that of the keys' bias, of which float64 leaves noise too: relative to it, noise is all errors there are."""
    exact, eager = gradients_of_a_model()
    exact["keys.bias"] = torch.full((4,), 1e-17, dtype=torch.float64)
    eager["keys.bias"] = torch.full((4,), 1e-4).bfloat16()
    got = {**eager, "keys.bias": 3 * eager["keys.bias"]}
    assert_model_close_to_oracle(got, exact, eager)
    with pytest.raises(AssertionError, match="over"):
        assert_model_close_to_oracle({**got, "keys.bias": torch.full((4,), 0.1).bfloat16()}, exact, eager)
    with pytest.raises(AssertionError, match="over"):
        assert_model_close_to_oracle({**got, "weight": 1.02 * got["weight"]}, exact, eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda got: got.update(bias=1.1 * got["bias"]), "maximum error"),
        (lambda got: got.update(weight=1.02 * got["weight"]), "error .* is over"),
        (lambda got: got["weight"].view(-1)[:1].fill_(float("nan")), "weight: not finite where PyTorch's is"),
        (lambda got: got.update(weight=None), "weight: expected a tensor, got none"),
        (lambda got: got.update(unused=torch.ones(2)), "unused: expected none, got one"),
        (lambda got: got.update(bias=got["bias"].float()), "bias"),
        (lambda got: got.pop("bias"), ""),
    ],
)
def test_what_is_wrong_in_one_gradient_of_a_model_shows(change, message):
    exact, eager = gradients_of_a_model()
    got = {name: None if t is None else t.clone() for name, t in eager.items()}
    assert_model_close_to_oracle(got, exact, eager)
    change(got)
    with pytest.raises(AssertionError, match=message):
        assert_model_close_to_oracle(got, exact, eager)


def test_the_hastened_interpreter_patches_what_tritons_own_does(monkeypatch):
    import triton.language as tl
    from triton.runtime import interpreter

    source = importlib.util.spec_from_file_location("triton.runtime.another_interpreter", interpreter.__file__)
    another = importlib.util.module_from_spec(source)
    monkeypatch.setitem(sys.modules, another.__name__, another)
    source.loader.exec_module(another)
    if testing.interpreter_active():
        assert interpreter._patch_builtin.__module__ == testing.interpreter.__name__

    def patched(by, owner) -> list[str]:
        scope = interpreter._LangPatchScope()
        try:
            by._patch_builtin(owner, interpreter.interpreter_builder, scope)
            again = len(scope._changes)
            by._patch_builtin(owner, interpreter.interpreter_builder, scope)  # as a device function's call does
            assert len(scope._changes) == again
            return [name for _, name, _ in scope._changes]
        finally:
            scope.restore()

    for owner in (tl, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        names = patched(another, owner)
        assert names and patched(interpreter, owner) == names


def test_on_a_gpu_products_are_not_tested_in_float32(monkeypatch):
    """Attention's kernels refuse it there: PyTorch's own runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert testing.kernel_dtypes() == [torch.float32, torch.float16, torch.bfloat16]
    assert testing.kernel_dtypes(products=True) == [torch.float16, torch.bfloat16]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert testing.kernel_dtypes() == testing.kernel_dtypes(products=True) == [torch.float32, torch.float16]
