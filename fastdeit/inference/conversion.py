"""Folded weights in the dtypes of an optimized model's buffers."""

import torch
from torch import Tensor

from fastdeit.inference.architecture import STREAM, Options
from fastdeit.inference.host import Host, Normalisation


def converted(host: Host, options: Options) -> dict[str, Tensor]:
    """The folded weights in the dtypes of the buffers."""
    dtype = STREAM[options.precision]
    levels = Normalisation(options.mean, options.std) if options.images == "uint8" else None
    with torch.no_grad():
        return {name: tensor.to(dtype) for name, tensor in host.weights(levels, options.readout, dtype)}
