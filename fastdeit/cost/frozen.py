"""Cost of a model of `optimize_for_inference`, part by part and by precision, as implemented and with everything fused."""

from dataclasses import replace

from fastdeit.cost.formulas import Cost
from fastdeit.cost.models import LAST_BLOCK, Part, Shape, parts

PRECISIONS = ("bf16", "fp8", "int8")
# Rates of 8-bit products over bf16's, estimated by the width of DeiT-Ti, S and B: a short sum leaves less to gain. Wider models are
# given B's, the last.
PRODUCT_RATES = {192: 1.05, 384: 1.25, 768: 1.45}
_QUANTIZED = ("qkv", "proj", "fc1", "fc2")


def product_rate(channels: int) -> float:
    """The rate of 8-bit products over bf16's at this width: that of the nearest smaller width on record, or of the smallest."""
    return PRODUCT_RATES[max((width for width in PRODUCT_RATES if width <= channels), default=min(PRODUCT_RATES))]


def frozen_parts(
    shape: Shape, batch: int, precision: str, *, epilogues: bool = False, rate: float | None = None
) -> list[Part]:
    """The work of one forward pass. The residual stream has 2 bytes in every precision.

    Products in 8 bits read one byte a value and count the FLOPs that bf16 products take as long for. As it ships, LayerNorms,
    attention and GELU write one byte. In int8 products also write int32, and a kernel behind each applies scales and bias.

    Args:
        precision: one of PRECISIONS.
        epilogues: GELU is cast and scales are applied where they are computed, in no kernel of their own.
        rate: of 8-bit products over bf16's, by default that of `product_rate`.

    Raises:
        ValueError: a precision that is not there.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    found = parts(shape, batch, "epilogues" if epilogues else "fastdeit", "bf16", training=False)
    if precision == "bf16":
        return found
    rate = product_rate(shape.channels) if rate is None else rate
    return [part for each in found for part in _in_8_bits(each, shape, batch, precision, epilogues, rate)]


def _in_8_bits(part: Part, shape: Shape, batch: int, precision: str, epilogues: bool, rate: float) -> list[Part]:
    name = part.name.removeprefix(LAST_BLOCK)
    queries = shape.prefix_tokens if part.name.startswith(LAST_BLOCK) else shape.tokens
    rows, all_rows = batch * queries, batch * shape.tokens
    integers = precision == "int8"
    if name == "norms and additions":  # in front of qkv and of fc1
        return [_with_bytes(part, -(all_rows + rows) * shape.channels)]
    if name == "activation":  # reads 4 bytes where products are int32, and writes 1 in place of 2
        return [_with_bytes(part, (2 if integers else 0) * rows * shape.mlp - rows * shape.mlp)]
    if name == "attention":
        return [_with_bytes(part, -rows * shape.channels)]
    if name not in _QUANTIZED:
        return [part]
    written = {
        "qkv": (rows + 2 * all_rows) * shape.channels,
        "proj": rows * shape.channels,
        "fc1": rows * shape.mlp,
        "fc2": rows * shape.channels,
    }[name]
    read = {"qkv": all_rows * shape.channels, "proj": rows * shape.channels}
    read |= {"fc1": rows * shape.channels, "fc2": rows * shape.mlp}
    weight = shape.channels * (shape.mlp if name in ("fc1", "fc2") else shape.channels * (3 if name == "qkv" else 1))
    fewer = read[name] + weight
    if epilogues:
        fewer += written if name == "fc1" else 0  # the activation, in one byte
    elif integers:
        fewer -= 2 * written  # int32
    product = _with_bytes(part, -fewer)
    product = replace(product, forward=replace(product.forward, flops=round(part.forward.flops / rate)))
    if integers and not epilogues and name != "fc1":  # whose scales are applied with the activation
        return [product, _kernel(part, f"scales of {name}", 6 * written, part.forward.launches)]
    return [product]


def _with_bytes(part: Part, more: int) -> Part:
    return replace(part, forward=part.forward + Cost(0, more, 0))


def _kernel(part: Part, name: str, moved: int, launches: int) -> Part:
    """A kernel beside a part's, launched as often as the part occurs in the model."""
    prefix = LAST_BLOCK if part.name.startswith(LAST_BLOCK) else ""
    return Part(prefix + name, Cost(0, moved, launches), Cost(0, 0, 0), part.count)
