"""The blocks of facebookresearch/deit's models_v2.py."""

import sys
from typing import ClassVar

from torch import nn

from fastdeit.blocks.adapters.deit import describe_block, register
from fastdeit.nn.host_block import HostBlock

_file = sys.modules["models_v2"]
register(_file, "Attention.forward", "Block.forward", "Layer_scale_init_Block.forward")


class _DeitBlock(HostBlock):
    """`forward` takes and returns (B, N, C). Its attention is fused where it is deit's, and otherwise called.

    Attributes:
        attention: the class of deit's attention.
        scales: whether the block has LayerScale (Touvron et al. 2021, eq. 4).
    """

    covers_parts = True
    attention: ClassVar[type[nn.Module]] = _file.Attention
    scales: ClassVar[bool]
    describe_parts = describe_block


class Block(_DeitBlock, _file.Block, source=_file.Block):
    """models_v2.Block with deit's constructor."""

    scales = False


class LayerScaleBlock(_DeitBlock, _file.Layer_scale_init_Block, source=_file.Layer_scale_init_Block):
    """models_v2.Layer_scale_init_Block (DeiT III, Touvron et al. 2022, section 3) with deit's constructor."""

    scales = True
