"""The block of facebookresearch/ijepa's src/models/vision_transformer.py."""

import sys
from typing import Any

from fastdeit.blocks.adapters.dino import register
from fastdeit.nn.dino_block import DinoBlock

_file: Any = sys.modules["src.models.vision_transformer"]
register(_file, mlp="MLP")


class Block(DinoBlock, _file.Block, source=_file.Block):
    """src.models.vision_transformer.Block (Assran et al. 2023) with I-JEPA's constructor. Encoder and predictor have it."""

    attention_classes = (_file.Attention,)
    mlp_class = _file.MLP
    drop_path_class = _file.DropPath
