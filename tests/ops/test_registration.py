"""What every op has of `Op`: fakes with the strides of what the op gives, and one tensor for two gradients that are equal."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastdeit import backends, ops
from fastdeit.testing import kernel_device, kernel_dtypes

DTYPE = kernel_dtypes(products=True)[0]


def randn(*shape, dtype=DTYPE):
    return torch.randn(shape, dtype=dtype, device=kernel_device())


def tokens(**options):
    """(2, 5, 32), tokens first in memory."""
    return randn(5, 2, 32, **options).transpose(0, 1)


def norm():
    return randn(32), randn(32)


def layer(outputs, inputs=32):
    return randn(outputs, inputs), randn(outputs)


CALLS = {
    "layer_norm": lambda: (ops.layer_norm, (tokens(), *norm())),
    "add_layer_norm": lambda: (ops.add_layer_norm, (tokens(), tokens(), *norm())),
    "add_layer_norm_attention": lambda: (
        lambda x, branch, w, b, *weights: ops.add_layer_norm_attention(x, branch, w, b, 1e-6, *weights, 1),
        (tokens(), tokens(), *norm(), *layer(96), *layer(32)),
    ),
    "add_layer_norm_mlp": lambda: (
        lambda x, branch, w, b, *weights: ops.add_layer_norm_mlp(x, branch, w, b, 1e-6, *weights),
        (tokens(), tokens(), *norm(), *layer(48), *layer(32, 48)),
    ),
    "attention": lambda: (lambda qkv: ops.attention(qkv, 1), (randn(5, 2, 96).transpose(0, 1),)),
    "attention_qkv": lambda: (ops.attention_qkv, tuple(randn(2, 2, 5, 32).transpose(1, 2) for _ in range(3))),
    "mlp": lambda: (ops.mlp, (tokens(), *layer(48), *layer(32, 48))),
    "linear": lambda: (
        lambda x, w, b, gamma, residual: ops.linear(x, w, b, activation="gelu", gamma=gamma, residual=residual),
        (tokens(), *layer(48), randn(48), randn(2, 5, 48)),
    ),
    "patch_embedding": lambda: (
        ops.patch_embedding,
        (randn(2, 4, 4, 3).permute(0, 3, 1, 2), randn(32, 3, 2, 2), randn(32), randn(1, 5, 32), randn(1, 1, 32)),
    ),
    "distillation_cross_entropy": lambda: (
        lambda z, d: ops.distillation_cross_entropy(z, d, torch.tensor([1, 2], device=z.device), d.detach()),
        (randn(10, 2).t(), randn(10, 2).t()),
    ),
}


class Compares(TorchDispatchMode):
    """Compares what this package's registered ops give with what their fakes say."""

    def __init__(self):
        super().__init__()
        self.compared = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        real = function(*args, **(kwargs or {}))
        if function.namespace == "fastdeit":
            with FakeTensorMode() as mode:
                fake = function(*tree_map_only(Tensor, mode.from_tensor, args))
            facts = [[(t.shape, t.stride(), t.dtype, t.device) for t in results] for results in (real, fake)]
            assert facts[0] == facts[1], function
            self.compared.append(function._opname)
        return real


def test_every_op_is_here():
    """Calls of `Op` register a forward and a backward each."""
    registered = {str(name).removesuffix("_backward") for name in dir(torch.ops.fastdeit) if name.endswith("_backward")}
    assert registered == set(CALLS)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", CALLS)
def test_a_fake_has_the_strides_of_what_the_op_gives(name, autocast):
    call, given = CALLS[name]()
    given = [t.requires_grad_() for t in given]
    with backends.use_backend("triton"), Compares() as mode:
        with torch.autocast(kernel_device().type, torch.bfloat16, enabled=autocast):
            outputs = call(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert mode.compared == [f"{name}_forward", f"{name}_backward"]
    assert all(t.grad.shape == t.shape for t in given)


ADDED = {
    "add_layer_norm": lambda x, branch, scale: ops.add_layer_norm(x, branch, None, None, drop_path_scale=scale),
    "add_layer_norm_mlp": lambda x, branch, scale: ops.add_layer_norm_mlp(
        x, branch, None, None, 1e-6, *layer(8), *layer(32, 8), drop_path_scale=scale
    ),
    "add_layer_norm_attention": lambda x, branch, scale: ops.add_layer_norm_attention(
        x, branch, None, None, 1e-6, *layer(96), *layer(32), 1, drop_path_scale=scale
    ),
}


@pytest.mark.parametrize("name", ["layer_norm", "mlp", "linear", "add_layer_norm_attention", "add_layer_norm_mlp"])
def test_what_backward_does_not_read_may_be_changed_in_place(name):
    """As LayerScale that works in place changes what a branch gives."""
    torch.manual_seed(0)
    call, arguments = CALLS[name]()
    learned = [t.requires_grad_() for t in arguments]

    def gradients(doubled):
        outputs = call(*learned)
        *others, last = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum(result.float().sum() for result in (*others, doubled(last)))
        return torch.autograd.grad(total, learned)

    with backends.use_backend("triton"):
        torch.testing.assert_close(gradients(lambda t: t.mul_(2)), gradients(lambda t: t * 2))


@pytest.mark.parametrize("registered", [False, True], ids=["eager", "registered"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("name", ADDED)
def test_a_gradient_that_x_and_branch_share_is_made_once_and_scaled_ones_are_apart(
    name, scaled, registered, monkeypatch
):
    """Equal gradients are one tensor on the way, but two in `.grad`: unscaling one in place leaves the other."""
    if registered:
        monkeypatch.setattr(backends, "registered_path", lambda *_: True)
    x, branch = randn(2, 5, 32).requires_grad_(), randn(2, 5, 32).requires_grad_()
    passing = [t * 1 for t in (x, branch)]
    arrived = []
    for t in passing:
        t.register_hook(arrived.append)
    scale = torch.tensor([0.0, 2.0], device=kernel_device()) if scaled else None
    with backends.use_backend("triton"):
        x_new, out = ADDED[name](*passing, scale)
    (1e-4 * (x_new.float().square().sum() + out.float().square().sum())).backward()  # within float16's range
    assert (arrived[0].data_ptr() == arrived[1].data_ptr()) is not scaled
    expected = x.grad if scale is None else (x.grad * scale[:, None, None]).to(DTYPE)
    torch.testing.assert_close(branch.grad, expected)
    assert x.grad.data_ptr() != branch.grad.data_ptr()
    before = branch.grad.clone()
    x.grad.mul_(0.5)
    assert torch.equal(branch.grad, before)
