"""Runs whose image size or augmentation changes at given epochs: the settings of each phase, and the change between phases."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdeit.train.config import Config


class Phase(NamedTuple):
    """Epochs from `first` up to and without `end`, which train as `config` says."""

    first: int
    end: int
    config: Config


def phases(config: Config) -> list[Phase]:
    """The phases of a run in their order; one for a run without schedules."""
    schedules = (config.img_size_schedule, config.aa_schedule)
    starts = sorted({0, *(entry[0] for schedule in schedules for entry in schedule or ())})
    ends = [*starts[1:], config.epochs]
    return [Phase(first, end, config_at(config, first)) for first, end in zip(starts, ends, strict=True)]


def config_at(config: Config, epoch: int) -> Config:
    """The configuration by which an epoch trains: `img_size`, `grad_accum_steps` and `aa` as the schedules have them there."""
    changes: dict[str, Any] = {}
    if config.img_size_schedule is not None:
        _, size, *parts = _entry_at(config.img_size_schedule, epoch)
        changes["img_size"] = size
        if parts:
            changes["grad_accum_steps"] = parts[0]
    if config.aa_schedule is not None:
        changes["aa"] = _entry_at(config.aa_schedule, epoch)[1]
    return config.replace(**changes) if changes else config


def phase_of_state(config: Config, state: Mapping[str, Any], path: Path) -> Config:
    """The phase that a state was written in: at an epoch's end the one before the next epoch's may still hold.

    Raises:
        ValueError: neither has the size of the state's images.
    """
    size, epoch = state["img_size"], len(state["history"])
    for candidate in (config_at(config, epoch), config_at(config, max(epoch - 1, 0))):
        if candidate.img_size == size:
            return candidate
    raise ValueError(
        f"{path}: damaged: images of {size} pixels at epoch {epoch}, which img_size_schedule does not have there"
    )


def exported(config: Config, current: Config) -> Config:
    """The configuration to be stored with weights of the phase `current`: it makes the model that they fit."""
    if current.img_size == config.img_size:
        return config
    return config.replace(img_size=current.img_size, img_size_schedule=None)


def set_input_size(model: nn.Module, size: int) -> dict[nn.Parameter, nn.Parameter]:
    """Makes a model take images of another size; timm interpolates the positions. A convolutional network takes any size.

    Returns:
        The parameters that others took the place of, with those.

    Raises:
        ValueError: the patches do not divide the size, or timm cannot change that of this model.
    """
    embedding = getattr(model, "patch_embed", None)
    known = getattr(embedding, "img_size", None)
    if known is None or tuple(known) == (size, size):
        return {}
    _check_divisible(model, size)
    change = getattr(model, "set_input_size", None)
    if change is None:
        raise ValueError(
            f"img_size_schedule: timm cannot change the input size of a {type(model).__name__}; expected a model with "
            "set_input_size, such as a vision transformer"
        )
    before = dict(model.named_parameters())
    change(img_size=(size, size))
    after = dict(model.named_parameters())
    return {parameter: after[name] for name, parameter in before.items() if after[name] is not parameter}


def check_sizes(config: Config, model: nn.Module) -> None:
    """Raises ValueError for a size of the schedule that the model's patches do not divide."""
    for _, size, *_ in config.img_size_schedule or ():
        _check_divisible(model, size)


def _check_divisible(model: nn.Module, size: int) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None and any(size % side for side in patch):
        raise ValueError(
            f"img_size_schedule: expected multiples of the model's patch size, {max(patch)} pixels, got {size}"
        )


def exchange(optimizer: torch.optim.Optimizer, replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Lets the optimizer update the parameters that took the place of others. Its state of those starts anew."""
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
    for parameter in replaced:
        optimizer.state.pop(parameter, None)


def dataset_at(dataset: Any, transform: Callable[[Config], Any], config: Config) -> Any:
    """The same images with the transform that config asks for, `train_transform` or `eval_transform` of it."""
    if not hasattr(dataset, "transform"):
        return dataset
    changed = copy.copy(dataset)
    changed.transform = transform(config)
    return changed


def enlarged(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) as a teacher takes them that was trained on size x size pixels."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic")


def _entry_at(schedule: list[list[Any]], epoch: int) -> list[Any]:
    return [entry for entry in schedule if entry[0] <= epoch][-1]
