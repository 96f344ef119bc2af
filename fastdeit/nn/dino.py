"""The block of facebookresearch/dino's vision_transformer.py."""

import sys
from typing import Any

from fastdeit.blocks.adapters.dino import register
from fastdeit.nn.dino_block import DinoBlock

_file: Any = sys.modules["vision_transformer"]
register(_file, mlp="Mlp")


class Block(DinoBlock, _file.Block, source=_file.Block):
    """vision_transformer.Block (Caron et al. 2021) with DINO's constructor."""

    attention_classes = (_file.Attention,)
    mlp_class = _file.Mlp
    drop_path_class = _file.DropPath
