"""Layers without inputs, hidden units or outputs: what PyTorch makes of them, where kernels would have nothing to read."""

import pytest
import torch

from fastdeit import backends, ops, testing

DEVICE = testing.kernel_device()
DTYPE = testing.kernel_dtypes(products=True)[0]


def layer(outputs, inputs):
    return torch.randn(outputs, inputs), torch.randn(outputs)


def norm(x):
    return x, torch.randn(x.shape[-1]), torch.randn(x.shape[-1]), 1e-6


ARGUMENTS = {
    "linear": lambda x, hidden, outputs: (x, *layer(outputs, x.shape[-1])),
    "mlp": lambda x, hidden, outputs: (x, *layer(hidden, x.shape[-1]), *layer(outputs, hidden)),
    "layer_norm_mlp": lambda x, hidden, outputs: (*norm(x), *layer(hidden, x.shape[-1]), *layer(outputs, hidden)),
    "add_layer_norm_mlp": lambda x, *rest: (x, x.clone(), *ARGUMENTS["layer_norm_mlp"](x, *rest)[1:]),
    "add_layer_norm_attention": lambda x, hidden, outputs: (
        x,
        x.clone(),
        *norm(x)[1:],
        *layer(96, x.shape[-1]),
        *layer(outputs, 32),
        1,
    ),
}


@pytest.mark.parametrize("sizes", [(0, 2, 2), (2, 0, 2), (2, 2, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_results_and_gradients_are_pytorchs(name, sizes):
    channels, hidden, outputs = sizes
    if "attention" in name and hidden == 0:
        channels = 0  # its hidden units are its heads, of which there is one
    given = ARGUMENTS[name](torch.randn(2, 3, channels), hidden, outputs)
    results = []
    for backend in ("triton", "reference"):
        inputs = [t.to(DEVICE, DTYPE, copy=True).requires_grad_() if isinstance(t, torch.Tensor) else t for t in given]
        with backends.use_backend(backend):
            outs = getattr(ops, name)(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        sum(out.sum() for out in outs).backward()
        results.append([*outs, *(t.grad for t in inputs if isinstance(t, torch.Tensor))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
