"""Small accelerated models on the fake device, and their plans."""

import copy
import functools

import pytest
import timm
import torch

import fastdeit
from fastdeit.blocks.snapshot import KEY
from fastdeit.kernels.runtime.raw_launch import WHY_NO_RAW_LAUNCHES
from fastdeit.plan.planned import Plan
from fastdeit.plan.training import TrainingPlan
from fastdeit.plan.workspace import Allocation

MODEL = "deit_tiny_distilled_patch16_224"
PLAIN = "deit_tiny_patch16_224"
SMALL = dict(depth=2, img_size=64)
USUAL = "usual", "mask"

needs_plans = pytest.mark.skipif(WHY_NO_RAW_LAUNCHES is not None, reason=str(WHY_NO_RAW_LAUNCHES))


@functools.cache
def _built(name, **options):
    with torch.device("cuda"):
        return fastdeit.accelerate(timm.create_model(name, **SMALL | options).eval())


def build(name=MODEL, dtype=None, memory="usual", drop_path="mask", **options):
    model = copy.deepcopy(_built(name, **options)).to(dtype)
    return fastdeit.accelerate(model, memory=memory, drop_path=drop_path) if (memory, drop_path) != USUAL else model


def images(model, batch=2):
    return torch.zeros(batch, 3, 64, 64, device="cuda", dtype=model.cls_token.dtype)


def plans(model):
    """Its plans, where others stand the reason in words."""
    record = model.__dict__[KEY]
    return [] if record.made is None else [kind.entry for _, kind in record.made[1].kinds]


def only_plan(model):
    """The plan, of which there is one."""
    assert [type(entry) for entry in plans(model)] in ([Plan], [TrainingPlan]), plans(model)
    return plans(model)[0]


def plan_it(call):
    for _ in range(3):
        call()


def apart(lives):
    """As `packed`, but no two buffers share memory."""
    offsets, total = {}, 0
    for buffer in lives:
        offsets[buffer] = total
        total += -(-buffer.nbytes // 512) * 512 + 512
    return Allocation(offsets, total)
