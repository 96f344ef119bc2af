"""The residual addition with its LayerNorm, at the token count of DeiT with a distillation token at 224 pixels.

On a GPU the kernels are timed beside PyTorch's own operations. Without one there is only PyTorch to time, on few images.
"""

import pytest
import torch

from fastdeit.backends import use_backend
from fastdeit.ops import add_layer_norm, add_layer_norm_reference
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device

DEVICE = kernel_device()
ON_GPU = DEVICE.type == "cuda"
BATCH, TOKENS = (256, 198) if ON_GPU else (2, 198)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
CALLS = 20 if ON_GPU else 1  # to one synchronisation with the host


def arguments(channels: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = ((BATCH, TOKENS, channels), (BATCH, TOKENS, channels), (channels,), (channels,))
    return tuple(torch.randn(s, generator=generator, device=DEVICE, dtype=DTYPE) for s in shapes)


@pytest.mark.parametrize("backend", ["reference", "triton"] if ON_GPU else ["reference"])
@pytest.mark.parametrize("channels", [192, 384, 768])
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def test_add_layer_norm(benchmark, direction, channels, backend):
    args = arguments(channels)
    if backend == "triton":
        assert_as_accurate_as_eager(add_layer_norm, add_layer_norm_reference, *args)
    upstream = torch.randn_like(args[0])
    inputs = [a.requires_grad_(direction != "forward") for a in args]

    def step():
        for _ in range(CALLS):
            outputs = add_layer_norm(*inputs)
            if direction != "forward":
                torch.autograd.grad(outputs, inputs, (upstream, upstream))
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.extra_info |= {
        "calls": CALLS,
        "shape": list(args[0].shape),
        "dtype": str(DTYPE),
        "torch": torch.__version__,
    }
    with use_backend(backend):
        benchmark.pedantic(step, rounds=30 if ON_GPU else 5, warmup_rounds=3)
