"""Optimizer, learning-rate schedule and moving average of the weights: timm's, from a configuration."""

from typing import Any, NamedTuple

import timm.optim
import timm.scheduler
import torch
from timm.utils import ModelEmaV3
from torch import nn

from fastdeit.train.config import Config
from fastdeit.train.transform_errors import described


class ParameterGroup(NamedTuple):
    weight_decay: float
    names: tuple[str, ...]
    parameters: int  # elements


def create_optimizer(config: Config, model: nn.Module, device: torch.device | None = None) -> torch.optim.Optimizer:
    """timm's optimizer. Matrices decay; biases, norms, LayerScale, tokens and positions do not.

    Args:
        device: where it is to run, if that is not where the model is.

    Raises:
        ValueError: timm has no such optimizer, or it takes no such arguments.
    """
    kwargs: dict[str, Any] = dict(eps=config.opt_eps, betas=tuple(config.opt_betas))
    if "sgd" in config.opt or config.opt in ("momentum", "nesterov"):
        kwargs = dict(momentum=config.opt_betas[0])
    if config.opt in ("adam", "adamw") and (device or next(model.parameters()).device).type == "cuda":
        kwargs["fused"] = True  # one kernel for all parameters, which can be told on the device to leave them alone
    try:
        optimizer = timm.optim.create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.scaled_lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **kwargs,
        )
    except Exception as error:  # which one depends on the optimizer
        raise ValueError(f"opt: timm cannot make {config.opt!r} with {kwargs}: {described(error)}") from error
    if getattr(optimizer, "is_second_order", False) or config.opt.endswith("lbfgs"):
        raise ValueError(f"opt: {config.opt} needs more of a step than gradients; expected an optimizer that does not")
    return optimizer


def parameter_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[ParameterGroup]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        ParameterGroup(
            group["weight_decay"],
            tuple(names[id(p)] for p in group["params"]),
            sum(p.numel() for p in group["params"]),
        )
        for group in optimizer.param_groups
    ]


class Schedule:
    """The learning rate as a function of the update's number: nothing to save, nothing to resume.

    timm's schedule, evaluated at the start of the update or of its epoch. (facebookresearch/deit advances it after an epoch by that
    epoch's number, so that there epochs 0 and 1 both run at the warm-up's first value.)
    """

    def __init__(self, config: Config, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> None:
        self.optimizer = optimizer
        self.updates_per_epoch = updates_per_epoch
        options = dict(
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            noise_seed=config.seed,
            step_on_epochs=not config.sched_on_updates,
            updates_per_epoch=updates_per_epoch,
        )
        try:
            self.scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, sched=config.sched, **options)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"sched: timm cannot make {config.sched!r}: {error}") from error

    def set(self, step: int) -> float:
        """Gives the optimizer the learning rate of update `step`, counted from 0, and returns it."""
        if self.scheduler is not None:
            self.scheduler.step(step // self.updates_per_epoch)
            self.scheduler.step_update(step)
        return self.optimizer.param_groups[0]["lr"]


def create_ema(config: Config, model: nn.Module) -> ModelEmaV3 | None:
    if not config.model_ema_decay:
        return None
    return ModelEmaV3(model, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
