"""What an optimized model consists of, as plain data: enough to make its modules again without the model that it came from."""

import dataclasses
from typing import Any, NamedTuple

import torch

READOUTS = {
    "class": "logits of the class token",
    "distillation": "logits of the distillation token",
    "mean": "mean of both logits",
    "softmax_sum": "sum of both softmax",
}
IMAGES = ("float", "uint8")
# The dtype of the residual stream and of the logits
STREAM = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16, "int8": torch.bfloat16}
FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}  # of weights and their inputs
RANGES = ("maximum", "percentile")  # of what one scale must reach


class Options(NamedTuple):
    """How a model was optimized, beside its architecture; plain values.

    Attributes:
        mean, std: that went into the weights for uint8 images, empty for float ones.
        quantized: layers in 8 bits, such as `blocks.0.qkv`.
    """

    precision: str
    images: str
    readout: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    quantized: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Block:
    """A transformer block.

    Attributes:
        activation: the op's name for it.
        eps: of the LayerNorm in front of attention, and of the one in front of the MLP.
        names: of the host's modules that hold qkv, proj, fc1 and fc2, as `exclude` and reports have them.
    """

    num_heads: int
    head_dim: int
    activation: str
    eps: tuple[float, float]
    names: tuple[str, str, str, str]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A vision transformer whose heads read its prefix tokens.

    Attributes:
        img_size: height and width.
        prefix: class, distillation and register tokens.
        eps: of the final LayerNorm.
        eps_before: of a LayerNorm in front of the blocks, None without one.
        classes: that the heads have logits for.
    """

    img_size: tuple[int, int]
    in_chans: int
    prefix: int
    eps: float
    eps_before: float | None
    classes: int
    blocks: tuple[Block, ...]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "Architecture":
        """The architecture from `as_dict`'s result, also after JSON. Raises KeyError or TypeError for another dictionary."""
        blocks = tuple(Block(**_tuples(block)) for block in given["blocks"])
        return cls(**_tuples({**given, "blocks": blocks}))


def _tuples(given: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
