"""What a block keeps for backward, beside timm's: the widths and depths of heads of DeiT, at a few tokens."""

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock

from fastdeit import backends
from fastdeit.blocks.run import PendingResidual
from fastdeit.nn import Block
from fastdeit.testing import kernel_device

pytestmark = pytest.mark.skipif(kernel_device().type == "cuda", reason="counted on a CPU")

SIZES = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}
TOKENS = 5  # of 2 samples; per token the count does not depend on it


def kept_bytes(block, x, autocast) -> int:
    """Bytes of distinct storages saved for backward, without parameters and their casts.

    A cast has a parameter's size and is not a token's.
    """
    sizes = {p.numel() for p in block.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.numel() not in sizes:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    counting = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with counting, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = block(x)
    assert out.requires_grad
    return sum(kept.values())


def blocks(size, dtype=torch.float32, **options):
    dim, heads = SIZES[size]
    fused, timms = (cls(dim, heads, qkv_bias=True, **options).to(dtype) for cls in (Block, TimmBlock))
    return fused, timms, torch.randn(2, TOKENS, dim, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("autocast", "memory", "share"),
    [(True, "usual", 0.56), (True, "lean", 0.45), (False, "usual", 0.65), (False, "lean", 0.45)],
)
def test_it_keeps_this_share_of_what_timms_keeps(size, autocast, memory, share):
    fused, timms, x = blocks(size, torch.float32 if autocast else torch.bfloat16)
    fused.memory = memory
    with backends.use_backend("triton"):
        ours = kept_bytes(fused, x, autocast)
    assert ours <= share * kept_bytes(timms, x, autocast)


@pytest.mark.parametrize("options", [dict(init_values=0.1), dict(drop_path=0.3), dict(init_values=0.1, drop_path=0.3)])
def test_layer_scale_and_drop_path_keep_no_more_than_timms_share(options):
    fused, timms, x = blocks("Ti", **options)
    with backends.use_backend("triton"):
        ours = kept_bytes(fused, x, True)
    assert ours <= 0.56 * kept_bytes(timms, x, True)


@pytest.mark.parametrize("options", [{}, dict(init_values=0.1, drop_path=0.3)])
def test_carried_from_block_to_block_it_keeps_20_bytes_a_token_and_channel(options):
    """With LayerScale and stochastic depth too; and the statistics, two of LayerNorm and one a head."""
    fused, _, x = blocks("Ti", **options)
    branch = torch.randn_like(x).bfloat16()

    def through(x):
        pending = fused.forward_deferred(PendingResidual(x, branch))
        return pending.x + pending.branch

    through.parameters = fused.parameters
    with backends.use_backend("triton"):
        kept = kept_bytes(through, x, True)
    factors = 4 * 2 if options else 0  # one drop path factor a sample between the branches
    assert kept == 2 * TOKENS * (20 * 192 + 2 * 4 + 3 * 4) + factors
