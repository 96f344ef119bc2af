"""What the fused blocks of facebookresearch's self-supervised models have in common."""

from typing import ClassVar

from torch import nn

from fastdeit.blocks.adapters.dino import describe_block, describe_block_v2
from fastdeit.nn.host_block import HostBlock


class DinoBlock(HostBlock):
    """`forward` takes and returns (B, N, C). With `return_attention` it runs the host's code.

    Attributes:
        attention_classes: the host's classes of attention.
        mlp_class: of MLPs.
        drop_path_class: of stochastic depth.
    """

    attention_classes: ClassVar[tuple[type[nn.Module], ...]]
    mlp_class: ClassVar[type[nn.Module]]
    drop_path_class: ClassVar[type[nn.Module]]
    describe_parts = describe_block


class DinoV2Block(HostBlock):
    """`forward` takes and returns (B, N, C). A list of tensors, which needs xFormers, runs the host's code.

    Attributes:
        attention_classes: the host's classes of attention.
        mlp_class: of MLPs; its SwiGLU is called.
    """

    attention_classes: ClassVar[tuple[type[nn.Module], ...]]
    mlp_class: ClassVar[type[nn.Module]]
    describe_parts = describe_block_v2
