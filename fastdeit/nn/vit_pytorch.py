"""The transformers of vit-pytorch's `ViT`, `DistillableViT` and `SimpleViT`."""

from torch import Tensor
from vit_pytorch import simple_vit, vit

from fastdeit.blocks.adapters.vit_pytorch import describe_transformer
from fastdeit.nn.host_block import HostBlock


class _Transformer(HostBlock):
    """All layers and the norm after them. `forward` takes and returns (B, N, C).

    The residual is carried from layer to layer: each addition is made in the LayerNorm kernel that follows. Active dropout of
    attention weights or inside the MLP runs vit-pytorch's code.
    """

    describe_parts = describe_transformer

    def finish(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens)


class Transformer(_Transformer, vit.Transformer, source=vit.Transformer):
    """vit_pytorch.vit.Transformer with vit-pytorch's constructor."""


class SimpleTransformer(_Transformer, simple_vit.Transformer, source=simple_vit.Transformer):
    """vit_pytorch.simple_vit.Transformer with vit-pytorch's constructor."""
