"""Where PyTorch's attention keeps its parts."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastdeit.blocks.checklist import why_not_inactive_dropout
from fastdeit.blocks.spec import Affine, Attention


def describe_multihead_attention(
    attn: nn.MultiheadAttention, out_dropout: nn.Module, batch_first: bool = True
) -> Attention:
    """Attention of a block that calls it with its tokens as query, key and value, and then out_dropout.

    Args:
        batch_first: whether the block gives it (B, N, C), or (N, B, C).
    """
    # Its output lies in memory with the tokens before the batch, and dropout draws its mask in that order.
    beyond, out_proj = why_not_inactive_dropout(out_dropout), attn.out_proj
    if attn.batch_first is not batch_first:
        beyond = "its tokens come before the batch" if batch_first else "its batch comes before the tokens"
    elif not attn._qkv_same_embed_dim:
        beyond = "keys or values have another width"
    elif attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
        beyond = "keys and values are added to those of the tokens"
    elif type(out_proj) is not NonDynamicallyQuantizableLinear and type(out_proj) is not nn.Linear:
        beyond = f"its out_proj is a {type(out_proj).__name__}, whose forward PyTorch's attention leaves out"
    qkv, proj = Affine(attn, "in_proj_weight", "in_proj_bias"), Affine(out_proj)
    dropout = attn.dropout if attn.training else 0.0
    return Attention(qkv, proj, attn.num_heads, attn.head_dim, (), dropout, out_dropout, beyond)
