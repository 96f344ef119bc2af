"""Folded weights in the dtypes of an optimized model's buffers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastdeit.inference.architecture import FORMATS, STREAM, Options
from fastdeit.inference.host import Host, Normalisation
from fastdeit.ops.quantized_formats import quantize_rows_reference

NORMS = {"qkv": "norm1", "fc1": "norm2"}  # in front of layers whose input brings its own scales


def converted(
    host: Host, options: Options, calibrated: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The buffers of an `OptimizedModel` by their names.

    Args:
        host: the model that they come from.
        options: of the optimization.
        calibrated: of quantized layers, what `calibrate` gives; these are buffers too.
        dtype: of the residual stream, in place of the precision's: float64 for the quantized reference.
    """
    calibrated, stream = calibrated or {}, dtype or STREAM[options.precision]
    levels = Normalisation(options.mean, options.std) if options.images == "uint8" else None
    held_in = None if options.quantized else stream  # bfloat16, their stream, has the range of float32
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in host.weights(levels, options.readout, held_in):
            layer, _, kind = name.rpartition(".")
            if kind != "weight" or layer not in options.quantized:
                found[name] = tensor.to(stream)
                continue
            factors = calibrated.get(factors_name(layer) or "")
            tensor = tensor if factors is None else tensor / factors.double()
            found[name], scale = quantize_rows_reference(tensor, FORMATS[options.precision])
            input_scale = calibrated.get(f"{layer}.input_scale")
            found[f"{layer}.scale"] = (scale if input_scale is None else scale * input_scale.double()).float()
        for name, tensor in calibrated.items():
            found[name] = tensor if name.endswith(".input_scale") else tensor.to(stream)
    return found


def factors_name(layer: str) -> str | None:
    """The buffer that has SmoothQuant's factors for a layer's input, None for a layer behind no LayerNorm."""
    block, _, kind = layer.rpartition(".")
    return f"{block}.{NORMS[kind]}.weight" if kind in NORMS else None
