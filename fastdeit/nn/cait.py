"""CaiT's block, whose LayerScale is a parameter of its own."""

from timm.models import cait

from fastdeit.blocks.adapters.cait import describe_block
from fastdeit.nn.host_block import HostBlock


class LayerScaleBlock(HostBlock, cait.LayerScaleBlock, source=cait.LayerScaleBlock):
    """timm.models.cait.LayerScaleBlock (Touvron et al. 2021, "Going deeper with image transformers", eq. 4), timm's constructor.

    LayerScale, stochastic depth and the additions are fused with the norms, and the MLP with its norm. Attention of any class is
    called: CaiT's talking heads stay timm's. `forward` takes and returns (B, N, C).
    """

    covers_parts = False
    describe_parts = describe_block
