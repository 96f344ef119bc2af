"""Tensors whose memory is not what their strides say: the negative bit is resolved, other layouts are refused by name."""

import pytest
import torch

from fastdeit import backends, ops, testing

DEVICE = testing.kernel_device()


def negated(tensor):
    """Its values, held negated, with the bit that says so."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg() and torch.equal(view, tensor)
    return view


@pytest.mark.parametrize("which", [None, 0, 1, 2], ids=["gradient alone", "x", "weight", "bias"])
def test_the_negative_bit_is_resolved(which):
    given = [torch.randn(3, 8), torch.randn(8), torch.randn(8)]
    given = [t.to(DEVICE) for t in given]
    cotangent = torch.randn(3, 8, device=DEVICE)
    results = []
    for convert in (lambda t: t, negated):
        inputs = [t.clone().requires_grad_() for t in given]
        tensors = [convert(t) if i == which else t for i, t in enumerate(inputs)]
        with backends.use_backend("triton"):
            out = ops.layer_norm(*tensors)
            results.append([out, *torch.autograd.grad(out, inputs, convert(cotangent))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


LAYOUTS = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.reshape(t.shape[-2:]).to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[0]]),
}
OPS = {
    "layer_norm": ("x", lambda t: ops.layer_norm(t, None, None)),
    "add_layer_norm": ("branch", lambda t: ops.add_layer_norm(torch.ones(1, 2, 96), t, None, None)),
    "attention": ("qkv", lambda t: ops.attention(t, 1)),
    "linear": ("weight", lambda t: ops.linear(torch.ones(1, 96), t)),
    "mlp": ("x", lambda t: ops.mlp(t, torch.ones(4, 96), None, torch.ones(4, 4), None)),
    "patch_embedding": ("images", lambda t: ops.patch_embedding(t, torch.ones(1, 1, 1, 1))),
    "distillation_cross_entropy": (
        "logits",
        lambda t: ops.distillation_cross_entropy(t, None, torch.ones(1), None, kind="none"),
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_other_layouts_are_refused(name, layout):
    argument, call = OPS[name]
    with pytest.raises(TypeError, match=rf"{argument}: expected a dense tensor \(torch.strided\), got a {layout} one"):
        call(LAYOUTS[layout](torch.ones(1, 2, 96)))
