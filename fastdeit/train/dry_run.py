"""What a run would do, without training or writing anything."""

import torch
import yaml

from fastdeit.train.config import Config
from fastdeit.train.datasets import load_data
from fastdeit.train.device import select_device
from fastdeit.train.device_stage import describe_loader
from fastdeit.train.distributed import SINGLE, World
from fastdeit.train.engine import share_of_batch
from fastdeit.train.estimate import describe_needs
from fastdeit.train.graphs import why_not_captured
from fastdeit.train.levers import describe_levers
from fastdeit.train.models import create_student
from fastdeit.train.optimization import Schedule, create_optimizer, parameter_groups
from fastdeit.train.phases import check_sizes, phases
from fastdeit.train.sampling import EpochBatches
from fastdeit.train.transforms import train_transform


def describe(config: Config, world: World = SINGLE) -> str:
    """The resolved configuration, data, schedule, parameter groups and needs. Raises ValueError as `run.train` would.

    Args:
        world: the processes that would train.
    """
    share_of_batch(config, world)
    data = load_data(config)
    model = create_student(config, len(data.classes), torch.device("cpu"))
    optimizer = create_optimizer(config, model)
    updates = len(EpochBatches(len(data.train), config.batch_size, config.seed, repeats=config.repeated_aug))
    schedule = Schedule(config, optimizer, max(updates, 1))
    lines = [yaml.safe_dump(config.as_dict(), sort_keys=False)]
    lines.append(f"device: {select_device(config, world)}" + (f", {world.size} processes" if world.size > 1 else ""))
    lines.append(describe_loader(config, data.train, select_device(config, world)))
    lines.append(_graphs(config, model, world))
    images = len(data.train), len(data.val)
    lines.append(
        f"data: {images[0]} training and {images[1]} validation images of {len(data.classes)} classes; "
        f"{updates} updates of {config.batch_size} images per epoch, {updates * config.epochs} in all"
    )
    check_sizes(config, model)
    lines += _phases(config)
    lines.append("learning rate at the start of an epoch:")
    shown = sorted({*range(0, config.epochs, max(1, config.epochs // 10)), config.warmup_epochs, config.epochs - 1})
    lines += [f"  {epoch:>4}  {schedule.set(epoch * updates):.4e}" for epoch in shown]
    lines.append("parameter groups:")
    for group in parameter_groups(model, optimizer):
        lines.append(
            f"  weight decay {group.weight_decay:g}: {len(group.names)} tensors, {group.parameters:,} parameters"
        )
        lines += [f"    {name}" for name in group.names]
    total = updates * config.epochs
    lines += describe_needs(config, model, len(data.classes), total)
    lines += describe_levers(config, model, len(data.classes), total, images[1])
    return "\n".join(lines)


def _phases(config: Config) -> list[str]:
    """The phases of a run with schedules, a line each."""
    if config.img_size_schedule is None and config.aa_schedule is None:
        return []
    lines = ["phases:"]
    for first, end, current in phases(config):
        train_transform(current)  # timm knows the policy
        lines.append(
            f"  epochs {first} to {end - 1}: img_size {current.img_size}, grad_accum_steps {current.grad_accum_steps}, "
            f"aa {current.aa}"
        )
    return lines


def _graphs(config: Config, model: torch.nn.Module, world: World) -> str:
    """What cuda_graphs does, or would do if it were on. Where a GPU is merely missing, what it would do on one."""
    gpu = torch.device("cuda")
    device = select_device(config, world) if config.device else gpu
    asked = config.replace(cuda_graphs=True)
    reason = why_not_captured(asked, device, create_optimizer(config, model, device), world)
    state = "on" if config.cuda_graphs else "off"
    where = " on one GPU" if device.type == "cuda" and not torch.cuda.is_available() else ""
    outcome = "steps can be recorded and replayed" if reason is None else f"steps cannot be recorded: {reason}"
    return f"cuda_graphs: {state};{where} {outcome}"
