"""torchvision's encoder block (`torchvision.models.vit_b_16` to `vit_h_14`)."""

from torchvision.models import vision_transformer

from fastdeit.blocks.adapters.torchvision import describe_block
from fastdeit.nn.host_block import HostBlock


class EncoderBlock(HostBlock, vision_transformer.EncoderBlock, source=vision_transformer.EncoderBlock):
    """torchvision.models.vision_transformer.EncoderBlock (Dosovitskiy et al. 2021, eqs. 2-3) with torchvision's constructor.

    `forward` takes and returns (B, N, C). Active dropout runs torchvision's code.
    """

    tokens_name = "input"
    describe_parts = describe_block
