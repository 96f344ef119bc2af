"""`optimize_for_inference`: from a trained model to a frozen one."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from fastdeit.inference.architecture import FORMATS, IMAGES, RANGES, READOUTS, STREAM, Architecture, Options
from fastdeit.inference.calibration import calibrate
from fastdeit.inference.calls import Calls
from fastdeit.inference.conversion import converted
from fastdeit.inference.device import check_device
from fastdeit.inference.host import Host, Normalisation
from fastdeit.inference.layers import LAYERS
from fastdeit.inference.model import OptimizedModel, Preprocessing


def optimize_for_inference(
    model: nn.Module,
    precision: str = "bf16",
    *,
    calibration: Iterable[Any] | None = None,
    value_range: str | None = None,
    exclude: Iterable[str] = (),
    images: str = "float",
    readout: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    cuda_graphs: str = "auto",
    buckets: Iterable[int] = (),
) -> OptimizedModel:
    """Returns a new module that computes what model computes in evaluation, from frozen weights, with fewer operations.

    Weights are converted once. LayerNorm's and LayerScale's parameters, the scale of attention and, for uint8 images, their
    normalisation are folded into weights; the last block computes only the tokens that the heads read.

    Args:
        model: a timm VisionTransformer or another model that `accelerate` fuses as a whole, on its device. It is not changed.
        precision: "bf16" or "fp16": the logits' error against float64 is at most twice that of model in the same dtype. "fp8" or
            "int8": attention's and the MLPs' projections in 8 bits on a bf16 residual stream, with a scale for each output channel
            of a weight and for each token after a LayerNorm. `OptimizedModel.report` gives the error of quantization.
        calibration: for fp8 and int8, batches of images as the result takes them, or pairs of a batch and labels. They give the
            scales after GELU and attention; 256 images of several classes are enough.
        value_range: the calibration's values that those scales represent without clipping: "maximum", all (the default of fp8),
            or "percentile", 99.99 % (the default of int8, whose steps are even).
        exclude: for fp8 and int8, names of modules that stay in bf16 with all inside them, as in `model.named_modules()`; `*`, `?`
            and `[...]` match as in file names. The patch embedding and the heads always stay in bf16.
        images: input of the result: "float", normalised images, or "uint8", levels from 0 to 255.
        readout: "class" (logits of the class token), "distillation", "mean" (of both, as DeiT predicts) or "softmax_sum" (of both
            heads' probabilities). By default "mean" with a distillation head, else "class".
        mean: of each channel in [0, 1], for uint8 images; by default that of timm's configuration of the model.
        std: the standard deviation of each channel, likewise.
        cuda_graphs: "auto": on a GPU, calls of one batch size on one stream are captured in a CUDA graph if the first of them are
            launch-bound, within the limit of `fastdeit.set_graphs`. "off": no call is captured.
        buckets: batch sizes, such as (1, 8, 64): a batch is padded up to the next of them, if there is one, so that a few graphs
            serve all batch sizes. Each call then takes as long as one with that many images.

    Returns:
        An `OptimizedModel`, in evaluation mode on model's device.

    Raises:
        TypeError: model is not a module, or a bucket is not a whole number.
        ValueError: the model is not fused as a whole (the message has the reason); an argument is not one of those allowed, does
            not fit the model, or needs another device than model's.
    """
    _check_choice("precision", precision, STREAM)
    _check_choice("images", images, IMAGES)
    calls = Calls(cuda_graphs, buckets)
    host = Host(model)
    architecture = host.architecture()
    readout = _readout(readout, host.has_distillation_head())
    levels = normalisation(model, architecture.in_chans, mean, std) if images == "uint8" else None
    if images == "float" and (mean is not None or std is not None):
        raise ValueError("mean, std: expected None with images='float', which are normalised already")
    check_device(precision, host.device)
    options = Options(precision, images, readout, *(levels or ()))
    if precision not in FORMATS:
        for name, given in (
            ("calibration", calibration),
            ("value_range", value_range),
            ("exclude", tuple(exclude) or None),
        ):
            if given is not None:
                raise ValueError(f"{name}: expected nothing for {precision}, in which no layer is quantized")
        return _made(model, architecture, options, converted(host, options), calls)
    value_range = value_range or {"fp8": "maximum", "int8": "percentile"}[precision]
    _check_choice("value_range", value_range, RANGES)
    excluded = excluded_modules(host.model, exclude)
    if calibration is None:
        raise ValueError(f"calibration: expected batches of images, from which {precision} has its scales, got None")
    measured = OptimizedModel(architecture, options._replace(precision="bf16"), converted(host, options)).eval()
    quantized = quantized_layers(measured, excluded)
    scales = calibrate(measured, calibration, quantized, precision, value_range)
    options = options._replace(quantized=quantized)
    return _made(model, architecture, options, converted(host, options, scales), calls)


def _made(
    model: nn.Module, architecture: Architecture, options: Options, weights: dict[str, Tensor], calls: Calls
) -> OptimizedModel:
    optimized = OptimizedModel(architecture, options, weights, preprocessing_of(model), calls).eval()
    optimized.remember(model)
    return optimized


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """Preprocessing by timm's configuration of the model, where that is complete, else nothing."""
    config = getattr(model, "pretrained_cfg", None) or {}
    known: dict[str, Any] = {
        name: config.get(name) for name in ("crop_pct", "interpolation", "crop_mode", "mean", "std")
    }
    if any(value is None for value in known.values()):
        return Preprocessing()
    known |= {name: tuple(known[name]) for name in ("mean", "std")}
    return Preprocessing(**known)


def excluded_modules(model: nn.Module, exclude: Iterable[str]) -> set[str]:
    """Names of the modules that patterns match, and of all inside them.

    Raises:
        TypeError: a pattern is not a string.
        ValueError: one matches nothing.
    """
    names = [name for name, _ in model.named_modules()]
    excluded: set[str] = set()
    for pattern in (exclude,) if isinstance(exclude, str) else exclude:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude: expected names of modules or patterns of them, got {pattern!r}")
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(f"exclude: no module of the model matches {pattern!r}")
        for match in matches:
            excluded.update(name for name in names if match in ("", name) or name.startswith(match + "."))
    return excluded


def quantized_layers(model: OptimizedModel, excluded: set[str]) -> tuple[str, ...]:
    """The layers that `Options` quantizes: sizes are multiples of 16, as 8-bit products need, and they are not excluded.

    Raises:
        ValueError: there are none.
    """
    found = []
    for index, block in enumerate(model.architecture.blocks):
        for layer, name in zip(LAYERS, block.names, strict=True):
            sizes = model.get_buffer(f"blocks.{index}.{layer}.weight").shape
            if name not in excluded and not any(size % 16 for size in sizes):
                found.append(f"blocks.{index}.{layer}")
    if not found:
        raise ValueError(
            "exclude: expected to leave a layer to quantize, of sizes that are multiples of 16; none is left"
        )
    return tuple(found)


def normalisation(
    model: nn.Module, channels: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Normalisation:
    """The normalisation of the model's images: the given one, else that of timm's configuration.

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
