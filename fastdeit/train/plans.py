"""Records an image's augmentation instead of applying it: the plan that `fastdeit.ops.augment` applies.

timm's and torchvision's transforms run on a `Recorder` in the image's place, so that they draw the random numbers that they would
draw for an image, and their arithmetic, a rotation's matrix say, is theirs. What a plan has no operation for (a blur, resampling
to the nearest pixel) is done at once on the image, after what was noted before it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from timm.data import auto_augment
from torchvision import transforms

from fastdeit.kernels.augment.operations import Operation

Change = Callable[[Image.Image], Image.Image]

_GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")
_BY_NAME = {  # timm's operations that take one argument or none
    "AutoContrast": Operation.AUTOCONTRAST,
    "Equalize": Operation.EQUALIZE,
    "Invert": Operation.INVERT,
    "SolarizeAdd": Operation.SOLARIZE_ADD,
    **dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), Operation.POSTERIZE),
    **dict.fromkeys(("Solarize", "SolarizeIncreasing"), Operation.SOLARIZE),
    **dict.fromkeys(("Color", "ColorIncreasing", "Desaturate"), Operation.COLOR),
    **dict.fromkeys(("Contrast", "ContrastIncreasing"), Operation.CONTRAST),
    **dict.fromkeys(("Brightness", "BrightnessIncreasing"), Operation.BRIGHTNESS),
    **dict.fromkeys(("Sharpness", "SharpnessIncreasing"), Operation.SHARPNESS),
}
_RESAMPLINGS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


class Recorder:
    """Stands for an image in its transforms.

    Args:
        size: width and height.
        render: gives the image, should something have to be done to it at once.

    Attributes:
        rows: the plan so far.
        image: what the plan is to be carried out on, where it is no longer what `render` gives.
    """

    def __init__(self, size: tuple[int, int], render: Callable[[], Image.Image]) -> None:
        self.size = size
        self.rows: list[tuple[float, ...]] = []
        self.image: Image.Image | None = None
        self._render = render
        self._noted: list[Change] = []

    def note(self, row: tuple[float, ...], change: Change) -> None:
        """Adds a row to the plan; change is the same operation on an image."""
        self.rows.append(row)
        self._noted.append(change)

    def run(self, change: Change) -> "Recorder":
        """Does something to the image that a plan has no operation for."""
        image = self._render() if self.image is None else self.image
        for noted in self._noted:
            image = noted(image)
        self.rows, self._noted = [], []
        self.image = change(image)
        return self

    # What timm's geometric operations ask of an image

    def transform(self, size, method, data, resample, fillcolor) -> "Recorder":
        change = functools.partial(
            Image.Image.transform, size=size, method=method, data=data, resample=resample, fillcolor=fillcolor
        )
        if resample not in _RESAMPLINGS:
            return self.run(change)
        bicubic = resample == Image.Resampling.BICUBIC
        self.note((Operation.AFFINE, bicubic, *data), change)
        return self

    def rotate(self, angle, resample, fillcolor) -> "Recorder":
        return Image.Image.rotate(self, angle, resample, fillcolor=fillcolor)  # its matrix

    def transpose(self, method) -> "Recorder":
        return self.run(lambda image: image.transpose(method))

    def copy(self) -> "Recorder":
        return self


class Planner:
    """Plans of images: what transforms would do to them.

    Args:
        steps: (option, transform) as `NamedTransforms` has them, for which `why_not_planned` gives None. Their policies are changed
            to work on recorders; they go on to work on images.

    Attributes:
        layers: the most rows that a plan has.
        fill: levels for what comes in from outside an image.
    """

    def __init__(self, steps: Sequence[tuple[str, Any]]) -> None:
        self.steps = [(option, _recording(step)) for option, step in steps]
        self.layers = sum(_layers(step) for _, step in steps)
        fills = {tuple(op.kwargs["fillcolor"]) for _, step in steps for op in _policy_operations(step)}
        self.fill = fills.pop() if fills else (0, 0, 0)
        assert not fills, "a policy's operations fill alike"

    def write(self, recorder: Recorder, rows: np.ndarray) -> None:
        """Writes the recorder's plan into rows, (layers, ROW) float64."""
        rows[:] = 0
        for layer, row in enumerate(recorder.rows):
            rows[layer, : len(row)] = row


def why_not_planned(steps: Sequence[tuple[str, Any]]) -> str | None:
    """None where `Planner` can plan the transforms, else which one it cannot and why."""
    for option, step in steps:
        inner = step.transforms[0] if isinstance(step, transforms.RandomApply) else step
        if isinstance(inner, auto_augment.AugMixAugment):
            return f"{option}: AugMix mixes images that were augmented in several ways, which no plan can say"
        if isinstance(inner, transforms.ColorJitter) and inner.hue is not None:
            return f"{option}: a change of hue has no operation in a plan"
        known = (
            auto_augment.RandAugment,
            auto_augment.AutoAugment,
            transforms.ColorJitter,
            transforms.RandomGrayscale,
            transforms.GaussianBlur,
        )
        if not isinstance(inner, known):
            return f"{option}: {type(inner).__name__} has no operation in a plan"
    return None


def _recording(step: Any) -> Callable[[Recorder], Recorder]:
    """The transform of a recorder."""
    if isinstance(step, transforms.RandomApply):
        return functools.partial(_applied, step.p, _recording(step.transforms[0]))
    if isinstance(step, transforms.ColorJitter):
        return functools.partial(_jittered, step)
    if isinstance(step, transforms.RandomGrayscale):
        return functools.partial(_greyed, step)
    if isinstance(step, transforms.GaussianBlur):
        return functools.partial(_run, step)
    for operation in _policy_operations(step):
        if not isinstance(operation.aug_fn, _Recorded):
            operation.aug_fn = _Recorded(operation.name, operation.aug_fn)
    if isinstance(step, auto_augment.RandAugment) and step.choice_weights is None:
        return functools.partial(_chosen, list(step.ops), step.num_layers)
    return step


class _Recorded:
    """timm's function of an operation, for recorders as well as images."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function

    def __call__(self, image: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(image, Recorder):
            return self.function(image, *arguments, **options)
        if self.name in _GEOMETRIC:
            return self.function(image, *arguments, **options)  # calls transform or rotate
        change = functools.partial(_call, self.function, arguments, options)
        if self.name not in _BY_NAME:
            return image.run(change)
        if self.name == "Desaturate":
            arguments = (min(1.0, max(0.0, 1.0 - arguments[0])),)
        image.note((_BY_NAME[self.name], 0.0, *arguments), change)
        return image


def _chosen(operations: list[auto_augment.AugmentOp], layers: int, recorder: Recorder) -> Recorder:
    """timm's RandAugment without weights. The numbers are those by which numpy's choice, in more time, takes from a list."""
    for number in np.random.randint(0, len(operations), layers).tolist():
        recorder = operations[number](recorder)
    return recorder


def _call(function, arguments, options, image):
    return function(image, *arguments, **options)


def _run(step: Change, recorder: Recorder) -> Recorder:
    return recorder.run(step)


def _applied(probability: float, step: Callable[[Recorder], Recorder], recorder: Recorder) -> Recorder:
    """torchvision's RandomApply."""
    return recorder if probability < torch.rand(1) else step(recorder)


def _greyed(step: transforms.RandomGrayscale, recorder: Recorder) -> Recorder:
    """torchvision's RandomGrayscale."""
    if torch.rand(1) < step.p:
        _enhance(recorder, Operation.COLOR, 0.0)
    return recorder


def _jittered(step: transforms.ColorJitter, recorder: Recorder) -> Recorder:
    """torchvision's ColorJitter without hue."""
    order, *factors, _ = step.get_params(step.brightness, step.contrast, step.saturation, step.hue)
    for number in order.tolist():
        if number < 3 and factors[number] is not None:
            _enhance(recorder, (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR)[number], factors[number])
    return recorder


_ENHANCERS = {
    Operation.BRIGHTNESS: ImageEnhance.Brightness,
    Operation.CONTRAST: ImageEnhance.Contrast,
    Operation.COLOR: ImageEnhance.Color,
}


def _enhance(recorder: Recorder, operation: Operation, factor: float) -> None:
    recorder.note((operation, 0.0, factor), lambda image: _ENHANCERS[operation](image).enhance(factor))


def _policy_operations(step: Any) -> list[auto_augment.AugmentOp]:
    if isinstance(step, auto_augment.AutoAugment):
        return [operation for operations in step.policy for operation in operations]
    return list(step.ops) if isinstance(step, auto_augment.RandAugment) else []


def _layers(step: Any) -> int:
    if isinstance(step, transforms.RandomApply):
        return _layers(step.transforms[0])
    if isinstance(step, auto_augment.RandAugment):
        return step.num_layers
    if isinstance(step, auto_augment.AutoAugment):
        return max(len(operations) for operations in step.policy)
    if isinstance(step, transforms.ColorJitter):
        return sum(part is not None for part in (step.brightness, step.contrast, step.saturation))
    return 1 if isinstance(step, transforms.RandomGrayscale) else 0
