"""Models of `optimize_for_inference` as candidates, held to the contract of their precision, and what they are timed beside."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastdeit
from fastdeit import backends
from fastdeit.benchmarks.baselines import frozen_baselines, op_baselines
from fastdeit.benchmarks.roofline import Ceilings
from fastdeit.cost import frozen, models
from fastdeit.cost.formulas import Cost
from fastdeit.inference.conversion import converted, factors_name
from fastdeit.inference.host import Host
from fastdeit.inference.model import OptimizedModel
from fastdeit.testing import assert_close_to_oracle

CALIBRATION = 16  # images


def optimized(model: nn.Module, precision: str) -> OptimizedModel:
    """Of timm's model; calibrated on random images, whose labels are made up, since an untrained model sees one class in all."""
    options: dict = {}
    if precision != "bf16":
        parameter = next(model.parameters())
        shape = CALIBRATION, 3, *model.patch_embed.img_size
        options["calibration"] = [(torch.randn(shape, device=parameter.device), torch.arange(CALIBRATION))]
    return fastdeit.optimize_for_inference(model, precision, cuda_graphs="off", **options)


def check(model: nn.Module, fast: OptimizedModel, images: Tensor) -> None:
    """Holds a frozen model to twice the error of timm's model in bf16, or of the same quantized model in plain PyTorch.

    Raises:
        AssertionError: its logits are further from float64.
    """
    with torch.no_grad():
        if fast.options.quantized:
            exact = quantized_reference(model, fast, torch.float64)(images.double())
            with backends.use_backend("reference"):
                eager = quantized_reference(model, fast)(images)
        else:
            exact, eager = copy.deepcopy(model).double()(images.double()), model(images)
        assert_close_to_oracle("logits", fast(images), exact, eager)


def quantized_reference(model: nn.Module, fast: OptimizedModel, dtype: torch.dtype | None = None) -> OptimizedModel:
    """Of model anew, with the scales that calibration found for fast; a dtype is that of all but the 8-bit weights."""
    names = {f"{layer}.input_scale" for layer in fast.options.quantized}
    names |= {factors_name(layer) for layer in fast.options.quantized}
    scales = {name: tensor for name, tensor in fast.named_buffers() if name in names}
    return OptimizedModel(fast.architecture, fast.options, converted(Host(model), fast.options, scales, dtype)).eval()


def candidates(model: nn.Module, fast: OptimizedModel, toy: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """The frozen model first, then timm's in bf16, eager; what else depends on the precision."""
    found: dict[str, Callable[[Tensor], Tensor]] = {"fastdeit": fast, "timm eager": model}
    if toy:
        return found
    found["timm + torch.compile max-autotune"] = op_baselines.autotuned(model)
    if (precision := fast.options.precision) != "bf16":
        found[f"timm + torchao {precision} + torch.compile max-autotune"] = frozen_baselines.torchao(model, precision)
    found["TensorRT, bf16"] = frozen_baselines.tensorrt(model)
    found["ONNX Runtime, fp16"] = frozen_baselines.onnx_runtime(model)
    return found


def work(shape: models.Shape, batch: int, precision: str) -> tuple[Cost, Callable[[Ceilings], tuple[float, float]]]:
    """The arithmetic and least traffic of a forward pass, and from ceilings the floors of fastdeit and an ideal bf16 compiler."""

    def floors(ceilings: Ceilings) -> tuple[float, float]:
        rates = ceilings.tflops * 1e12, ceilings.tb_per_s * 1e12
        ours = frozen.frozen_parts(shape, batch, precision, epilogues=True)
        theirs = models.parts(shape, batch, "compile", "bf16", training=False)
        return models.seconds(ours, *rates) * 1e6, models.seconds(theirs, *rates) * 1e6

    flops = models.total(frozen.frozen_parts(shape, batch, "bf16", epilogues=True)).flops
    least = models.total(frozen.frozen_parts(shape, batch, precision, epilogues=True))
    return Cost(flops, least.bytes, least.launches), floors
