"""Models and blocks as candidates: fastdeit's and timm's on the same parameters, and what people do to timm's to make it fast."""

import copy
from collections.abc import Callable
from dataclasses import replace

import timm
import torch
from torch import Tensor, nn

import fastdeit
from fastdeit.benchmarks.baselines import op_baselines as baselines
from fastdeit.benchmarks.roofline import Ceilings
from fastdeit.cost import models as model_costs
from fastdeit.cost.models import Shape
from fastdeit.testing import kernel_device

NAMES = {
    "B": "deit_base_distilled_patch16_224",
    "S": "deit_small_distilled_patch16_224",
    "Ti": "deit_tiny_distilled_patch16_224",
    "deit3-B": "deit3_base_patch16_224",
}
# What is run, and in which precision: autocast ("amp" to bf16, "fp16") around fp32 parameters, or everything in bf16.
KINDS = ["train_amp", "inference_bf16", "train_bf16", "inference_amp", "inference_fp16", "train_fp16"]
_TOY = dict(embed_dim=64, num_heads=2, depth=2, num_classes=10)


def create(name: str, img_size: int, kind: str, toy: bool) -> nn.Module:
    """timm's model, initialised at random, on the device, in the mode and dtype of a kind; DeiT's drop path if it trains."""
    training, precision = kind.split("_")
    arguments = dict(img_size=32, **_TOY) if toy else dict(img_size=img_size)
    model = timm.create_model(NAMES[name], drop_path_rate=0.1 if training == "train" else 0.0, **arguments)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(training == "train")
    model = model.to(kernel_device(), torch.bfloat16 if precision == "bf16" else torch.float32)
    return model.train(training == "train")


def accelerated(module: nn.Module) -> nn.Module:
    """A copy on the same parameters and buffers, with fastdeit's forward."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return fastdeit.accelerate(copy.deepcopy(module, memo=shared))


def candidates(module: nn.Module, call: Callable[[Callable, nn.Module], Callable], toy: bool) -> dict[str, Callable]:
    """fastdeit first, timm eager, then timm compiled.

    Args:
        module: timm's.
        call: makes a candidate of a callable that stands for the module, and the module itself.
    """
    found = {"fastdeit": call(accelerated(module), module), "timm eager": call(module, module)}
    if not toy:
        found["timm + torch.compile"] = call(baselines.compiled(module), module)
        found["timm + torch.compile max-autotune"] = call(baselines.autotuned(module), module)
    return found


def autocast(kind: str) -> torch.autocast:
    """The context of a forward pass of a kind."""
    precision = kind.split("_")[1]
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(kernel_device().type, dtype, enabled=precision != "bf16")


def input_dtype(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind.endswith("bf16") else torch.float32


def work(shape: Shape, batch: int, kind: str, block: bool = False):
    """What a case has to do at the least, and a function from ceilings to the floors of fastdeit and of an ideal compiler.

    A block's is what one more of them adds to a model.
    """
    training, precision = kind.split("_")
    precision = "bf16" if precision == "bf16" else "amp"

    def parts(execution: str, depth: int):
        deep = replace(shape, depth=depth)
        return model_costs.parts(deep, batch, execution, precision, training=training == "train")

    depths = (3, 2) if block else (shape.depth,)
    costs = [model_costs.total(parts("epilogues", depth)) for depth in depths]
    cost = costs[0]
    if block:
        cost = type(cost)(*(getattr(costs[0], f) - getattr(costs[1], f) for f in ("flops", "bytes", "launches")))

    def floors(ceilings: Ceilings) -> tuple[float, float]:
        rates = ceilings.tflops * 1e12, ceilings.tb_per_s * 1e12
        times = [
            [model_costs.seconds(parts(execution, depth), *rates) * 1e6 for depth in depths]
            for execution in ("epilogues", "compile")
        ]
        fused, compiled = (t[0] - t[1] if block else t[0] for t in times)
        return fused, compiled

    return cost, floors


def logits(outputs: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
