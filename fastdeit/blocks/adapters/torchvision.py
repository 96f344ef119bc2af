"""Where torchvision's vision transformer keeps the parts of a block."""

from functools import partial

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchvision.models import vision_transformer
from torchvision.models.vision_transformer import MLPBlock

from fastdeit.blocks.checklist import activation_name, why_not_inactive_dropout
from fastdeit.blocks.snapshot import register_methods
from fastdeit.blocks.spec import NOTHING, Affine, Attention, Block, Branch, Mlp

register_methods(vision_transformer.EncoderBlock, "forward", host=True)
register_methods(MLPBlock, "forward", host=True)


def describe_block(module: vision_transformer.EncoderBlock) -> Block:
    """The block; its attention has the packed weight itself (`in_proj_weight`), and its MLP is a Sequential."""
    children = module._modules
    attn, mlp = children["self_attention"], children["mlp"]
    attention = _describe_attention(attn, children["dropout"]) if type(attn) is nn.MultiheadAttention else None
    perceptron = _describe_mlp(mlp) if type(mlp) is MLPBlock and len(mlp) == 5 else None
    first = Branch(Affine(children["ln_1"]), attn, attention, NOTHING, NOTHING, call=partial(_attend, module))
    second = Branch(Affine(children["ln_2"]), mlp, perceptron, NOTHING, NOTHING)
    return Block(module, vision_transformer.EncoderBlock, (first, second), module.memory)


def _attend(block: vision_transformer.EncoderBlock, x: Tensor) -> Tensor:
    return block.dropout(block.self_attention(x, x, x, need_weights=False)[0])


def _describe_attention(attn: nn.MultiheadAttention, out_dropout: nn.Module) -> Attention:
    # Its output lies in memory with the tokens before the batch, and dropout draws its mask in that order.
    beyond, out_proj = why_not_inactive_dropout(out_dropout), attn._modules["out_proj"]
    if not attn.batch_first:
        beyond = "its tokens come before the batch"
    elif not attn._qkv_same_embed_dim:
        beyond = "keys or values have another width"
    elif attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
        beyond = "keys and values are added to those of the tokens"
    elif type(out_proj) is not NonDynamicallyQuantizableLinear and type(out_proj) is not nn.Linear:
        beyond = f"its out_proj is a {type(out_proj).__name__}, whose forward PyTorch's attention leaves out"
    qkv, proj = Affine(attn, "in_proj_weight", "in_proj_bias"), Affine(out_proj)
    dropout = attn.dropout if attn.training else 0.0
    return Attention(qkv, proj, attn.num_heads, attn.head_dim, (), dropout, out_dropout, beyond)


def _describe_mlp(mlp: MLPBlock) -> Mlp:
    fc1, act, drop1, fc2, drop2 = mlp._modules.values()
    return Mlp(Affine(fc1), act, activation_name(act), Affine(fc2), (drop1,), drop1, drop2)
