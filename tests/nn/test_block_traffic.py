"""The tensors of tokens that a block reads and writes, kernel by kernel, are those that docs/memory.md lists."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from fastdeit import backends
from fastdeit.blocks.run import PendingResidual
from fastdeit.nn import Block
from fastdeit.ops import matmul
from fastdeit.testing import kernel_device

pytestmark = pytest.mark.skipif(
    kernel_device().type == "cuda", reason="counts tensors behind pointers; descriptors hide theirs"
)

DOCS = Path(__file__).parents[2] / "docs" / "memory.md"
B, N, C, HEADS = 2, 5, 64, 2
LAUNCHING = ("norm.layer_norm", "mlp.activation", "attention.forward", "attention.backward", "norm.residual_branch")
LAUNCHING += ("runtime.column_sums",)


def recording(monkeypatch) -> list[tuple[str, int]]:
    """Fills with (kernel or "GEMM", bytes per token and channel) as they run."""
    steps = []

    def record(name, tensors):
        def size(t):  # no matter how often it is given; weights, statistics and partial sums aside
            of_tokens = t.dim() > 1 and (B * N in t.shape or t.shape[:2] == (B, N)) and t.numel() >= B * N * C
            return t.numel() * t.element_size() if of_tokens else 0

        distinct = {t.data_ptr(): size(t) for t in tensors if isinstance(t, torch.Tensor)}
        if sum(distinct.values()):
            steps.append((name, sum(distinct.values()) // (B * N * C)))

    for name in LAUNCHING:
        module = importlib.import_module(f"fastdeit.kernels.{name}")

        def launched(kernel, grid, args, *rest, launch=module.launch):
            record(getattr(kernel, "fn", kernel).__name__.removesuffix("_kernel"), args)
            return launch(kernel, grid, args, *rest)

        monkeypatch.setattr(module, "launch", launched)

    def recorded(product, kind):
        def multiplied(*args):
            out = product(*args)
            record(kind, (*args, out))
            return out

        return multiplied

    products = [
        (torch, "mm", "GEMM"),
        (torch, "addmm", "GEMM"),
        (matmul, "product_in_float32", "weight gradient"),
    ]
    for owner, name, kind in products:
        monkeypatch.setattr(owner, name, recorded(getattr(owner, name), kind))
    return steps


def documented(heading: str) -> list[tuple[str, int]]:
    section = DOCS.read_text().split(f"### {heading}\n")[1].split("\n#")[0]
    return [
        (name, int(size))
        for name, size in re.findall(r"^\| `?([a-zA-Z_ ]+?)`? \|.*\| (\d+) \|$", section, re.MULTILINE)
    ]


def through_block(dtype, autocast):
    block = Block(C, HEADS, qkv_bias=True).to(dtype)
    x, branch = torch.randn(B, N, C, dtype=dtype), torch.randn(B, N, C, dtype=torch.bfloat16)
    return block, x, branch, torch.autocast("cpu", torch.bfloat16, enabled=autocast)


@pytest.mark.parametrize(
    ("heading", "dtype", "autocast"),
    [("Inference, a bf16 model", torch.bfloat16, False), ("Inference, autocast", torch.float32, True)],
)
def test_inference(monkeypatch, heading, dtype, autocast):
    block, x, branch, context = through_block(dtype, autocast)
    steps = recording(monkeypatch)
    with backends.use_backend("triton"), torch.no_grad(), context:
        block.forward_deferred(PendingResidual(x, branch))
    assert steps == documented(heading)


def test_backward(monkeypatch):
    block, x, branch, context = through_block(torch.float32, True)
    with backends.use_backend("triton"), context:
        pending = block.forward_deferred(PendingResidual(x.requires_grad_(), branch.requires_grad_()))
    steps = recording(monkeypatch)
    torch.autograd.backward([pending.x, pending.branch], [torch.ones_like(pending.x), torch.ones_like(pending.branch)])
    assert steps == documented("Backward, autocast")
