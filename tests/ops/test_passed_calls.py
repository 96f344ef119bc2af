"""A call skips an op's checks only where everything that they read is as in a call that passed them."""

import pytest
import torch

from fastdeit import backends, ops, refusals
from fastdeit.ops.passed_calls import PassedCalls
from fastdeit.testing import interpreter_active
from fastdeit.testing.ptx.tf32 import tf32


def tensors(**kwargs):
    return torch.zeros(2, 5, 8, **kwargs), None, torch.ones(8)


@pytest.fixture
def passed() -> PassedCalls:
    calls = PassedCalls()
    calls.add(tensors(), 1e-6, 2, "gelu")
    return calls


def test_a_call_like_one_that_passed_is_known(passed):
    assert passed.has(tensors(), 1e-6, 2, "gelu")
    noncontiguous = torch.zeros(5, 2, 8).transpose(0, 1)
    assert passed.has((noncontiguous, *tensors()[1:]), 1e-6, 2, "gelu")  # ops take any strides
    assert not PassedCalls().has(tensors(), 1e-6, 2, "gelu")


OTHERS = {
    "shape": (torch.zeros(2, 5, 9), None, torch.ones(8)),
    "dtype": tensors(dtype=torch.bfloat16),
    "device": tensors(device="meta"),
    "layout": (torch.zeros(2, 5, 8).to_sparse(), None, torch.ones(8)),
    "nested": (torch.nested.nested_tensor([torch.zeros(5, 8), torch.zeros(4, 8)]), None, torch.ones(8)),
    "gradient": tensors(requires_grad=True),
    "parameter": (torch.nn.Parameter(torch.zeros(2, 5, 8), requires_grad=False), None, torch.ones(8)),
    "one more": (torch.zeros(2, 5, 8), torch.ones(8), torch.ones(8)),
    "one in another place": (torch.zeros(2, 5, 8), torch.ones(8), None),
    "no tensor": ([[0.0]], None, torch.ones(8)),
    "a NumPy array": (torch.zeros(2, 5, 8).numpy(), None, torch.ones(8)),
}


@pytest.mark.parametrize("given", OTHERS.values(), ids=OTHERS)
def test_other_tensors_are_checked(passed, given):
    assert not passed.has(given, 1e-6, 2, "gelu")


@pytest.mark.parametrize("options", [(1e-5, 2, "gelu"), (1e-6, 2.0, "gelu"), (1e-6, 2, "relu"), (1e-6, 2, ["gelu"])])
def test_other_options_are_checked(passed, options):
    assert not passed.has(tensors(), *options)


def test_an_option_that_only_equals_is_checked(passed):
    passed.add(tensors(), 1.0)
    assert passed.has(tensors(), 1.0) and not passed.has(tensors(), True) and not passed.has(tensors(), 1)


SETTINGS = {
    "backend": lambda: backends.use_backend("reference"),
    **({} if backends.on_gpu(torch.empty(0)) else {"a GPU supposed": backends.supposed_gpu}),
    "all tensors": backends.kernels_for_all_tensors,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "grad mode": torch.no_grad,
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_other_settings_are_checked(passed, setting):
    with setting():
        assert not passed.has(tensors(), 1e-6, 2, "gelu")
    assert passed.has(tensors(), 1e-6, 2, "gelu")


def test_autocast_to_another_dtype_is_checked():
    calls = PassedCalls()
    with torch.autocast("cpu", torch.bfloat16):
        calls.add(tensors())
    with torch.autocast("cpu", torch.float16):
        assert not calls.has(tensors())


def test_tf32_is_checked(passed):
    with tf32(True):
        assert not passed.has(tensors(), 1e-6, 2, "gelu")


def test_without_products_tf32_is_not_read():
    calls = PassedCalls(products=False)
    calls.add(tensors())
    with tf32(True):
        assert calls.has(tensors())
        assert not calls.has(tensors(dtype=torch.bfloat16))


def test_a_call_inside_a_transform_is_checked(passed):
    seen = []

    def call(x):
        seen.append(passed.has((x, None, torch.ones(8)), 1e-6, 2, "gelu"))
        passed.add((x, None, torch.ones(8)), 1e-6, 2, "gelu")
        return x.sum()

    torch.func.grad(call)(torch.zeros(2, 5, 8))
    torch.func.grad(call)(torch.zeros(2, 5, 8))
    assert seen == [False, False]


def test_after_a_refusal_all_calls_are_checked(passed, monkeypatch):
    monkeypatch.setitem(refusals.refused, "norm", "refused on this machine")
    assert not passed.has(tensors(), 1e-6, 2, "gelu")


def test_after_everything_is_forgotten_all_calls_are_checked(passed):
    refusals.forget()
    assert not passed.has(tensors(), 1e-6, 2, "gelu")


def test_a_call_whose_backward_cannot_be_compiled_here_is_checked_again(passed):
    calls = PassedCalls()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # as checkpointing has
        calls.add(tensors())
    assert not calls.has(tensors())


def test_sizes_without_end_do_not_fill_the_memory():
    calls = PassedCalls()
    for size in range(5000):
        calls.add((torch.empty(1),), size)
    assert calls.has((torch.empty(1),), 4999) and len(calls._passed) < 4097


# ---- the ops, under the interpreter


def block(**changes):
    make = torch.zeros
    given = dict(
        x=make(2, 3, 32),
        branch=make(2, 3, 32),
        norm_weight=make(32),
        norm_bias=make(32),
        eps=1e-6,
        qkv_weight=make(96, 32),
        qkv_bias=None,
        proj_weight=make(32, 32),
        proj_bias=make(32),
        num_heads=1,
    )
    return given | changes


WRONG = {
    "branch": torch.zeros(2, 3, 16),
    "norm_weight": torch.zeros(16),
    "qkv_weight": torch.zeros(96, 16),
    "qkv_bias": torch.zeros(95),
    "proj_weight": torch.zeros(32, 32, dtype=torch.bfloat16),
    "proj_bias": torch.zeros(32, device="meta"),
    "num_heads": 1.0,
    "eps": True,
}


@pytest.mark.skipif(not interpreter_active(), reason="its float32 products have kernels under the interpreter alone")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found_after_a_call_that_was_right(name):
    with backends.use_backend("triton"):
        ops.add_layer_norm_attention(**block())
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            ops.add_layer_norm_attention(**block(**{name: WRONG[name]}))
        ops.add_layer_norm_attention(**block())


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter")
def test_a_second_call_is_not_checked_and_another_backend_runs(monkeypatch):
    from fastdeit.ops import mlp_op

    checked = []
    plain = mlp_op.check_mlp
    monkeypatch.setattr(mlp_op, "check_mlp", lambda *given: checked.append(1) or plain(*given))
    given = torch.randn(3, 17), torch.randn(32, 17), torch.randn(32), torch.randn(16, 32), torch.randn(16)
    with backends.use_backend("triton"):
        first = ops.mlp(*given)
        assert torch.equal(ops.mlp(*given), first) and len(checked) == 1
    with backends.use_backend("reference"):
        assert torch.equal(ops.mlp(*given), ops.mlp_reference(*given)) and len(checked) == 2
