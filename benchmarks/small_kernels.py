"""Every op forward and backward at a small, odd size, once a dtype: `python -m fastdeit.benchmarks.small_kernels`.

For compute-sanitizer, under which a kernel runs a hundred times slower. Without a GPU the kernels are interpreted.
"""

import os
import sys
from collections.abc import Iterator

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from fastdeit import backends, ops
from fastdeit.testing import kernel_device, kernel_dtypes


def calls(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The name and the result of each op, whose inputs all want gradients."""

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, device=kernel_device()).to(dtype).requires_grad_()

    tokens, channels, heads = 17, 64, 1
    x, branch = randn(2, tokens, channels), randn(2, tokens, channels)
    weight, bias, gamma = randn(channels), randn(channels), randn(channels)
    scale = torch.tensor([0.0, 2.0], device=x.device)
    w1, b1, w2, b2 = randn(96, channels), randn(96), randn(channels, 96), randn(channels)
    yield "layer_norm", ops.layer_norm(x, weight, bias)
    yield "add_layer_norm", torch.cat(ops.add_layer_norm(x, branch, weight, bias, gamma=gamma, drop_path_scale=scale))
    yield "attention", ops.attention(randn(2, tokens, 3 * channels), heads)
    yield "attention, 80", ops.attention(randn(1, tokens, 3 * 80), heads)
    q, k, v = (randn(2, heads, tokens, channels).transpose(1, 2) for _ in range(3))
    yield "attention_qkv", ops.attention_qkv(q, k, v)
    yield "mlp", ops.mlp(x, w1, b1, w2, b2)
    yield "linear", ops.linear(x, w1, b1, activation="gelu")
    options = dict(gamma=gamma, drop_path_scale=scale, residual=x)
    yield "layer_norm_mlp", ops.layer_norm_mlp(x, weight, bias, 1e-6, w1, b1, w2, b2, **options)
    if dtype != torch.float32:
        masters = [randn(*t.shape, dtype=torch.float32) for t in (x, weight, bias, w1, b1, w2, b2)]
        with torch.autocast(x.device.type, dtype):
            yield "layer_norm_mlp, folded", ops.layer_norm_mlp(*masters[:3], 1e-6, *masters[3:])
    target = torch.tensor([1, 40], device=x.device)
    logits = [randn(2, 77) for _ in range(2)]
    yield "distillation", ops.distillation_cross_entropy(*logits, target, randn(2, 77).detach())


def main() -> None:
    with backends.use_backend("triton"):
        for dtype in kernel_dtypes():
            if dtype == torch.float32 and torch.cuda.is_available():
                continue  # IEEE products are the libraries'
            for name, result in calls(dtype):
                result.float().sum().backward()
                assert result.isfinite().all(), name
                print(f"{name} {str(dtype).removeprefix('torch.')}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
