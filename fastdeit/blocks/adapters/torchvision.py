"""Where torchvision's vision transformer keeps the parts of a block."""

from functools import partial

from torch import Tensor, nn
from torchvision.models import vision_transformer
from torchvision.models.vision_transformer import MLPBlock

from fastdeit.blocks.adapters.multihead_attention import describe_multihead_attention
from fastdeit.blocks.checklist import activation_name
from fastdeit.blocks.snapshot import register_methods
from fastdeit.blocks.spec import NOTHING, Affine, Block, Branch, Mlp

register_methods(vision_transformer.EncoderBlock, "forward", host=True)
register_methods(MLPBlock, "forward", host=True)


def describe_block(module: vision_transformer.EncoderBlock) -> Block:
    """The block; its attention has the packed weight itself (`in_proj_weight`), and its MLP is a Sequential."""
    children = module._modules
    attn, mlp = children["self_attention"], children["mlp"]
    attention = describe_multihead_attention(attn, children["dropout"]) if type(attn) is nn.MultiheadAttention else None
    perceptron = _describe_mlp(mlp) if type(mlp) is MLPBlock and len(mlp) == 5 else None
    first = Branch(Affine(children["ln_1"]), attn, attention, NOTHING, NOTHING, call=partial(_attend, module))
    second = Branch(Affine(children["ln_2"]), mlp, perceptron, NOTHING, NOTHING)
    return Block(module, vision_transformer.EncoderBlock, (first, second), module.memory)


def _attend(block: vision_transformer.EncoderBlock, x: Tensor) -> Tensor:
    return block.dropout(block.self_attention(x, x, x, need_weights=False)[0])


def _describe_mlp(mlp: MLPBlock) -> Mlp:
    fc1, act, drop1, fc2, drop2 = mlp._modules.values()
    return Mlp(Affine(fc1), act, activation_name(act), Affine(fc2), (drop1,), drop1, drop2)
