"""The residual block of open_clip's vision and text transformers, and the LayerNorms in and around it."""

from open_clip import transformer

from fastdeit.blocks.adapters.open_clip import describe_block
from fastdeit.nn.host_block import HostBlock
from fastdeit.nn.layer_norm import FusedLayerNorm


class ResidualAttentionBlock(HostBlock, transformer.ResidualAttentionBlock, source=transformer.ResidualAttentionBlock):
    """open_clip.transformer.ResidualAttentionBlock (Radford et al. 2021) with open_clip's constructor.

    `forward` takes and returns (B, N, C). With other keys and values or a mask, as in text models, it runs open_clip's code.
    """

    tokens_name = "q_x"
    describe_parts = describe_block


class LayerNorm(FusedLayerNorm, transformer.LayerNorm, source=transformer.LayerNorm):
    """open_clip.transformer.LayerNorm on the fused kernel. `forward` takes (..., C) and returns its shape and dtype."""

    keeps_dtype = True


class LayerNormFp32(FusedLayerNorm, transformer.LayerNormFp32, source=transformer.LayerNormFp32):
    """open_clip.transformer.LayerNormFp32, for half-precision tokens and float32 parameters; otherwise as `LayerNorm`."""

    keeps_dtype = True
