"""From images to the tokens of a distilled model: fastdeit's product of gathered patches beside PyTorch's convolution."""

from dataclasses import replace

import pytest
import torch

from fastdeit import ops
from fastdeit.benchmarks.baselines import op_baselines as baselines
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.benchmarks.roofline import one_after_another
from fastdeit.cost import formulas as costs
from fastdeit.cost.models import DEIT, parts
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device

CASES = by_importance(
    [224, 384], ["B", "S", "Ti"], [256, 64, 1024, 1], ["amp", "bf16"], ["both", "forward", "backward"]
)
QUICK, TURNS = 1, 1
NOTHING = costs.Cost(0, 0, 0)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_embedding(compare, toy, case):
    side, size, batch, precision, direction = case
    batch, side = (min(batch, 2), 32) if toy else (batch, side)
    shape = DEIT[size].at(side)
    low = torch.float32 if toy else torch.bfloat16
    wide = torch.float32 if precision == "amp" else low
    patch, channels = shape.patch_size, shape.channels

    def inputs(size=batch):
        shapes = (size, 3, side, side), (channels, 3, patch, patch), (channels,), (1, shape.tokens, channels)
        shapes += (1, 1, channels), (1, 1, channels), (size, shape.tokens, channels)
        images, weight, *rest = (torch.randn(s, device=kernel_device(), dtype=wide) for s in shapes)
        return (
            images.view(torch.int32 if wide.itemsize == 4 else torch.int16),
            weight * weight[0].numel() ** -0.5,
            *rest,
        )

    def on_images(function):
        """Takes images in the guise of integers: nobody asks for their gradient."""

        def run(pixels, weight, *rest):
            images = pixels.view(wide)
            exact = weight.dtype == torch.float64
            with torch.autocast(images.device.type, low, enabled=not exact and low != wide):
                return function(images.double() if exact else images, weight, *rest)

        return run

    def embedding(execution):
        found = parts(shape, batch, execution, precision, training=direction != "forward")
        left_out = {"forward": dict(backward=NOTHING), "backward": dict(forward=NOTHING), "both": {}}[direction]
        return [replace(part, **left_out) for part in found if part.name == "patch embedding"]

    op, reference = on_images(ops.patch_embedding), on_images(ops.patch_embedding_reference)
    assert_as_accurate_as_eager(op, reference, *inputs(min(batch, 2))[:6], backend="auto")
    candidates = {"fastdeit": op, "PyTorch eager": reference}
    if not toy:
        candidates["torch.compile"] = baselines.compiled(reference)
        candidates["torch.compile max-autotune"] = baselines.autotuned(reference)
    (least,) = embedding("epilogues")
    compare(
        {name: baselines.DIRECTIONS[direction](function, 6) for name, function in candidates.items()},
        inputs,
        expected=baselines.oracle(direction, reference, 6, shared=range(1, 6)),
        cost=least.forward + least.backward,
        matrix=True,
        floors=one_after_another(embedding),
        direction=direction,
        batch=batch,
        side=side,
        model=size,
        precision=precision,
    )
