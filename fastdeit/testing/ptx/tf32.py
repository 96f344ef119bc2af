"""Attention with TF32 products on a CPU, the baseline of fp32 kernels where TF32 is allowed."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allows TF32 in products for a while, as a user would."""
    matmul = torch.backends.cuda.matmul
    name, on = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)  # before 2.9
    before = getattr(matmul, name)
    setattr(matmul, name, on if allowed else before)
    try:
        yield
    finally:
        setattr(matmul, name, before)


class _Product(torch.autograd.Function):
    """a @ b with operands truncated to TF32 in forward and backward, as matrix instructions truncate float32 registers."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _cut(a) @ _cut(b)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return _cut(g) @ _cut(b).transpose(-2, -1), _cut(a).transpose(-2, -1) @ _cut(g)


def _cut(x: Tensor) -> Tensor:
    """Truncates to 10 bits of fraction."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def in_tf32_products(qkv: Tensor, heads: int) -> Tensor:
    """(B, N, 3 * H * D) -> (B, N, H * D)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    p = _Product.apply(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)).softmax(-1)
    return _Product.apply(p, v).transpose(1, 2).flatten(2)
