"""The residual branches, whatever of them is frozen: each gradient that is asked for is the one of full training, and no other."""

import itertools

import pytest
import torch

from fastdeit import backends, ops
from fastdeit.testing import kernel_device

DEVICE = kernel_device()
C, H = 8, 16
LAYERS = ("norm_weight", "norm_bias", "w1", "b1", "w2", "b2", "gamma")


def given(names):
    """By name."""
    shapes = dict.fromkeys(names, (2, C)) | dict(w1=(H, C), b1=(H,), w2=(C, H))
    shapes |= dict.fromkeys(("norm_weight", "norm_bias", "b2", "gamma"), (C,))
    return {name: torch.randn(shapes[name], device=DEVICE) for name in names}


def gradients(op, tensors, trained, autocast):
    """By name, of those that got one."""
    tensors = {name: t.detach().clone().requires_grad_(name in trained) for name, t in tensors.items()}
    scale = torch.tensor([1.25, 0.0], device=DEVICE)
    with backends.use_backend("triton"), torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
        out = op(**tensors, eps=1e-6, drop_path_scale=scale)
    outputs = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
    assert bool(outputs) == bool(trained)
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    return {name: t.grad for name, t in tensors.items() if t.grad is not None}


def same(found, expected):
    """To the bit under the interpreter. A compiler may contract a product and a sum in one variant of a kernel, not in another."""
    if backends.interpreter_active():
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=0, atol=2**-8 * expected.abs().max())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("op", "stream", "counts"),
    [(ops.add_layer_norm_mlp, "branch", (0, 1, 2, 7, 8)), (ops.layer_norm_mlp, "residual", (0, 1, 8))],
    ids=["add_layer_norm_mlp", "layer_norm_mlp"],
)
def test_subsets_of_an_mlp_branch(op, stream, counts, autocast):
    """So many trained of nine: whatever turns on whether one of two is wanted shows among pairs and their complements."""
    names = ("x", stream, *LAYERS)
    tensors = given(names)
    expected = gradients(op, tensors, names, autocast)
    assert expected.keys() == set(names)
    for trained in (subset for count in counts for subset in itertools.combinations(names, count)):
        found = gradients(op, tensors, trained, autocast)
        assert found.keys() == set(trained)
        assert all(same(gradient, expected[name]) for name, gradient in found.items()), trained
