"""Estimated memory and GPU-hours of a run, computed from the shapes of model and batch before it starts."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdeit.cost.models import Part, Shape, parts, seconds
from fastdeit.cost.subsets import block_rates, parts_on_subsets
from fastdeit.cost.view import shape_of
from fastdeit.train.config import Config
from fastdeit.train.models import create_timm_model
from fastdeit.train.optimization import create_optimizer
from fastdeit.train.phases import phases

# What a large GPU reaches in matrix products of these sizes and in a copy: the rates of docs/performance.md.
FLOPS_PER_SECOND, BYTES_PER_SECOND = 600e12, 4.3e12
KEPT_BYTES = 36  # for backward, a token, channel and block, by PyTorch's own layers under autocast
STREAM_BYTES = 4
GB = 1e9


def plain_shape(model: nn.Module) -> Shape | None:
    """The sizes that costs are a function of; None of a model that is no plain vision transformer."""
    try:
        return shape_of(model)
    except ValueError:
        return None


def execution_of(config: Config) -> str:
    """How the student runs, one of `cost.models.EXECUTIONS`."""
    return "fastdeit" if config.accelerate else "eager"


def memory(config: Config, model: nn.Module) -> dict[str, float]:
    """Bytes by use, for one process that computes the whole batch at once; activations of a vision transformer alone."""
    weights = 4 * sum(p.numel() for p in model.parameters())
    found = {
        "weights": weights,
        "gradients": weights,
        f"state of {config.opt}": weights * _state_per_parameter(config),
    }
    if config.model_ema_decay:
        found["moving average"] = weights
    shape = plain_shape(model)
    if shape is not None:
        kept = KEPT_BYTES * shape.depth
        if config.grad_checkpointing:  # the stream at each block, and all of the one that is made again
            kept = STREAM_BYTES * shape.depth + KEPT_BYTES
        rows = (
            shape.at(phase.config.img_size).tokens * config.batch_size // phase.config.grad_accum_steps
            for phase in phases(config)
        )
        found["activations"] = kept * max(rows) * shape.channels
    return found


def gpu_hours(config: Config, model: nn.Module, updates: int) -> float | None:
    """The roofline of forward and backward of the student in `updates` updates; None of a model without costs."""
    shape = plain_shape(model)
    if shape is None:
        return None
    execution, hours = execution_of(config), 0.0
    for phase in phases(config):
        work = _step(shape.at(phase.config.img_size), config, execution)
        share = (phase.end - phase.first) / config.epochs
        hours += share * updates * seconds(work, FLOPS_PER_SECOND, BYTES_PER_SECOND) / 3600
    return hours


def _step(shape: Shape, config: Config, execution: str) -> list[Part]:
    if config.drop_path_mode == "skip":
        rates = block_rates(config.drop_path, shape.depth, config.drop_path_uniform)
        return parts_on_subsets(shape, config.batch_size, execution, rates=rates)
    return parts(shape, config.batch_size, execution, "amp", training=True)


def teacher_gpu_hours(config: Config, num_classes: int, updates: int) -> float:
    """GPU-hours of the teacher's forward passes at the full rate of GEMMs, which a convnet does not reach."""
    with torch.device("meta"):
        teacher = create_timm_model(
            "teacher_model", config.teacher_model, num_classes, config.in_chans, config.teacher_kwargs
        ).eval()
        image = torch.empty(1, config.in_chans, config.img_size, config.img_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            teacher(image)
    return updates * config.batch_size * counter.get_total_flops() / FLOPS_PER_SECOND / 3600


def describe_needs(config: Config, model: nn.Module, num_classes: int, updates: int) -> list[str]:
    """Lines of text: memory by use, and hours.

    Args:
        updates: of the whole run.
    """
    uses = memory(config, model)
    lines = ["memory, estimated, for the whole batch on one GPU:"]
    lines += [f"  {size / GB:9.3g} GB  {name}" for name, size in uses.items()]
    if "activations" in uses:
        lines.append(
            f"  {sum(uses.values()) / GB:9.3g} GB  in all; activations are those of PyTorch's own layers under autocast, and are "
            "divided by the number of GPUs"
        )
    hours = gpu_hours(config, model, updates)
    rates = f"{FLOPS_PER_SECOND / 1e12:g} TFLOP/s and {BYTES_PER_SECOND / 1e12:g} TB/s"
    if hours is None:
        lines.append(f"time: no estimate for a {type(model).__name__}")
    else:
        lines.append(
            f"time: at least {hours:.3g} GPU-hours for the student, by arithmetic, on a GPU that reaches {rates}"
        )
    if config.distillation_type != "none" and config.teacher_cache is None:
        teacher = teacher_gpu_hours(config, num_classes, updates)
        lines.append(
            f"      and {teacher:.3g} for the teacher, which fastdeit cache-teacher spends once for all students"
        )
    return lines


def _state_per_parameter(config: Config) -> float:
    """Numbers that the optimizer keeps for each weight, found by one update of a small layer."""
    layer = nn.Linear(64, 64)
    optimizer = create_optimizer(config, layer)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = sum(
        t.numel() for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.dim()
    )
    return kept / sum(p.numel() for p in layer.parameters())
