"""DeiT's RandAugment on a batch of photographs: fastdeit's two kernels a layer beside the same in PyTorch."""

import numpy as np
import pytest
import torch

from fastdeit import ops
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.benchmarks.photographs import fitted
from fastdeit.cost import formulas as costs
from fastdeit.kernels.augment.operations import ROW, Operation
from fastdeit.testing import kernel_device

CASES = by_importance([1024, 256], [224, 384], ["randaugment", "bicubic", "none"])
QUICK, TURNS = 1, 1
FILL = (124, 116, 104)
SHARE = 0.5  # of operations that are applied


def plan(batch: int, content: str) -> torch.Tensor:
    """Two layers: RandAugment's choice among its fifteen operations, five of them affine; or one of them for all."""
    generator = np.random.default_rng(0)
    rows = np.zeros((batch, 2, ROW))
    rows[..., 2:] = (
        1.0,
        0.2,
        -3.0,
        -0.1,
        1.0,
        5.0,
    )  # of the affine operations; the others take the first for an argument
    rows[..., 1] = 1.0
    drawn = np.minimum(generator.integers(1, 16, size=(batch, 2)), Operation.AFFINE)
    applied = generator.random((batch, 2)) < SHARE
    rows[..., 0] = {"randaugment": drawn * applied, "bicubic": Operation.AFFINE, "none": 0}[content]
    return torch.from_numpy(rows)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_augment(compare, toy, case):
    batch, side, content = case
    batch, side = (2, 16) if toy else (batch, side)
    photographs = torch.from_numpy(np.stack([np.asarray(image) for image in fitted(side, side)]))
    rows = plan(batch, content)

    def inputs():
        images = photographs[torch.arange(batch) % len(photographs)].to(kernel_device()).permute(0, 3, 1, 2)
        flips = (torch.arange(batch, device=kernel_device()) % 2).to(torch.uint8)
        levels = torch.arange(256.0, device=kernel_device()).sub(120).div(58).expand(3, 256).contiguous()
        return images, rows.to(kernel_device()), flips, levels

    def with_options(function):
        return lambda images, plan, flips, levels: function(images, plan, flips=flips, levels=levels, fill=FILL)

    def expected(images, plan, flips, levels):
        return [with_options(ops.augment_reference)(images[:8], plan[:8], flips[:8], levels).double()]

    kinds = rows[..., 0].int()
    tabled = sum(
        int((kinds == kind).sum()) for kind in (Operation.AUTOCONTRAST, Operation.EQUALIZE, Operation.CONTRAST)
    )
    compare(
        {"fastdeit": with_options(ops.augment), "PyTorch eager": with_options(ops.augment_reference)},
        inputs,
        expected=expected,
        cost=costs.augment(batch, 3, side, side, tabled=tabled, bicubic=int((kinds == Operation.AFFINE).sum())),
        matrix=False,
        images=batch,
        batch=batch,
        side=side,
        content=content,
    )
