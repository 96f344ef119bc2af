"""One attention through tensor descriptors: `python -m fastdeit.benchmarks.first_descriptors forward` or `backward`.

The first work on a GPU that nobody tried: a wrong descriptor can hang it, so each runs alone, under a time limit of its caller.
`backward` makes its first launch with descriptors from autograd's own thread. Without a GPU the kernels are interpreted.
"""

import os
import sys

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch.nn.functional as F

from fastdeit.benchmarks.small_kernels import descriptor_attention
from fastdeit.kernels.attention.config import takes_descriptors
from fastdeit.kernels.runtime.architecture import architecture
from fastdeit.testing import correct_interpreter_bfloat16, kernel_device

TOKENS, HEAD_DIM = 66, 64
PARTS = ("forward", "backward")
_TOLERANCE = 0.02  # of bf16 results of size one; the contract is held by the tests


class _Backward(torch.autograd.Function):
    """Calls a function in backward, in the thread that autograd keeps for the device."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.function(), None


def main(part: str) -> int:
    """0 if the result is right or attention takes no descriptors there, 1 otherwise."""
    qkv = torch.randn(2, TOKENS, 3 * HEAD_DIM, device=kernel_device(), dtype=torch.bfloat16)
    if not takes_descriptors(architecture(qkv)):
        print("attention takes no tensor descriptors on this GPU with this Triton")
        return 0
    if not qkv.is_cuda:
        correct_interpreter_bfloat16()
    calls = dict(descriptor_attention(qkv))
    leaf = qkv.clone().requires_grad_()
    expected = _attention(leaf)
    if part == "forward":
        found = calls["attention, descriptors"]()
    else:
        _Backward.apply(leaf, calls["its gradient in two kernels"]).backward(torch.ones_like(qkv))
        found, leaf.grad = leaf.grad, None
        (expected,) = torch.autograd.grad(expected, leaf, torch.ones_like(expected))
    error = (found.float() - expected.float()).abs().max().item()
    print(f"{part}: largest difference from PyTorch's {error:.1e}")
    return 0 if error < _TOLERANCE else 1


def _attention(qkv: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv.unflatten(-1, (3, 1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


if __name__ == "__main__":
    if sys.argv[1:] not in [[part] for part in PARTS]:
        sys.exit(f"usage: python -m fastdeit.benchmarks.first_descriptors {'|'.join(PARTS)}")
    sys.exit(main(sys.argv[1]))
