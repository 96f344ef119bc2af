"""`optimize_for_inference`: from a trained model to a frozen one."""

import torch
from torch import nn

from fastdeit.inference.architecture import IMAGES, READOUTS, STREAM, Options
from fastdeit.inference.conversion import converted
from fastdeit.inference.host import Host, Normalisation
from fastdeit.inference.model import OptimizedModel


def optimize_for_inference(
    model: nn.Module,
    precision: str = "bf16",
    *,
    images: str = "float",
    readout: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> OptimizedModel:
    """A module of its own that computes what model computes in evaluation, with as little work as that takes.

    Weights are converted once. LayerNorm's and LayerScale's parameters, the scale of attention and, for uint8 images, their
    normalisation are folded into weights; the last block computes the tokens that the heads read.

    Args:
        model: a timm VisionTransformer or another model that `accelerate` fuses as a whole, on its device. It is not changed.
        precision: "bf16" or "fp16". Logits are as close to float64 as model's own in that dtype, within a factor of two.
        images: what the result takes: "float", normalised images, or "uint8", raw ones.
        readout: "class" (logits of the class token), "distillation", "mean" (of both, as DeiT predicts) or "softmax_sum" (of both
            heads' probabilities). By default "mean" with a distillation head, else "class".
        mean, std: of a channel in [0, 1], for uint8 images; by default those of timm's configuration of the model.

    Returns:
        An `OptimizedModel`, in evaluation mode on model's device.

    Raises:
        TypeError: model is not a module.
        ValueError: the model is not fused as a whole, with the reason; an argument is none of those allowed, does not fit the model
            or needs a device that model is not on.
    """
    _check_choice("precision", precision, STREAM)
    _check_choice("images", images, IMAGES)
    host = Host(model)
    architecture = host.architecture()
    readout = _readout(readout, host.has_distillation_head())
    levels = normalisation(model, architecture.in_chans, mean, std) if images == "uint8" else None
    if images == "float" and (mean is not None or std is not None):
        raise ValueError("mean, std: expected None with images='float', which are normalised already")
    check_device(precision, host.device)
    options = Options(precision, images, readout, *(levels or ()))
    return OptimizedModel(architecture, options, converted(host, options)).eval()


def normalisation(
    model: nn.Module, channels: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Normalisation:
    """Of the model's images: what is given, else what timm's configuration says.

    Raises:
        ValueError: neither says it, or it does not fit the channels.
    """
    known = getattr(model, "pretrained_cfg", None) or {}
    found = []
    for name, given in (("mean", mean), ("std", std)):
        values = known.get(name) if given is None else given
        if values is None:
            raise ValueError(f"{name}: expected {channels} numbers for images='uint8', since the model does not say")
        values = tuple(float(value) for value in values)
        if len(values) != channels or not all(abs(v) < float("inf") for v in values) or (name == "std" and 0 in values):
            raise ValueError(f"{name}: expected {channels} finite numbers{' above 0' * (name == 'std')}, got {values}")
        found.append(values)
    return Normalisation(*found)


def check_device(precision: str, device: torch.device) -> None:
    """Raises ValueError where a GPU has no arithmetic of a precision. A CPU runs every one, by its reference."""
    if device.type != "cuda":
        return
    capability, least = torch.cuda.get_device_capability(device), (8, 0)
    if capability < least:
        raise ValueError(
            f"precision: {precision!r} needs a GPU of compute capability {least[0]}.{least[1]} or newer, and {device} has "
            f"{capability[0]}.{capability[1]}"
        )


def _readout(readout: str | None, distilled: bool) -> str:
    if readout is None:
        return "mean" if distilled else "class"
    _check_choice("readout", readout, READOUTS)
    if readout != "class" and not distilled:
        raise ValueError(f"readout: expected 'class' for a model without a distillation head, got {readout!r}")
    return readout


def _check_choice(name: str, value: object, allowed) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
