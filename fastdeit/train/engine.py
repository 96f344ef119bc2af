"""The training step and the epoch around it."""

import contextlib
import functools
import gc
import sys
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdeit.blocks.subsets import kept_samples
from fastdeit.cost.models import training_flops_per_image
from fastdeit.cost.view import shape_of
from fastdeit.losses import DistillationLoss
from fastdeit.train.augmentation import BatchAugmentation
from fastdeit.train.cached_labels import CachedTeacher
from fastdeit.train.config import Config
from fastdeit.train.device import autocast, create_scaler
from fastdeit.train.distributed import SINGLE, World
from fastdeit.train.graphs import OFF, CapturedStep, CudaRecorder, DeviceRates, masks_updates, why_not_captured
from fastdeit.train.loading import TrainLoader
from fastdeit.train.meter import Meter, peak_flops
from fastdeit.train.monitor import LossMonitor, NonFiniteLossError, all_finite
from fastdeit.train.optimization import Schedule, create_ema, create_optimizer
from fastdeit.train.phases import (
    check_sizes,
    config_at,
    dataset_at,
    enlarged,
    exchange,
    phases,
    set_input_size,
)
from fastdeit.train.sampling import EpochBatches, seed_step
from fastdeit.train.transforms import train_transform

Phase = Literal["between steps", "gradients", "update"]
SMALLEST_SCALE = 2.0**-14  # of fp16's loss: a gradient that overflows there is not finite by any scale


class Progress(Protocol):
    def update(self, n: int = 1) -> Any: ...


class Trainer:
    """A model with all that changes while it trains, except the history of results.

    Args:
        config: of the run.
        model: on its device; a distilled one returns its pair of outputs in train mode.
        teacher: in eval mode, its cached labels, or None without distillation.
        dataset: of (image, class), map-style.
        num_classes: of the data set.
        world: the processes that share the batches.

    Raises:
        ValueError: the processes and their accumulated parts cannot share a batch evenly, or the model cannot take a size of
            img_size_schedule.

    Attributes:
        current: the configuration of the phase under way, config itself in a run without schedules.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        teacher: nn.Module | None,
        dataset: Any,
        num_classes: int,
        world: World = SINGLE,
    ) -> None:
        self.config = config
        self.model = model
        self.world = world
        self.device = next(model.parameters()).device
        share = share_of_batch(config, world)
        check_sizes(config, model)
        for phase in phases(config):
            train_transform(phase.config)
        self.dataset = dataset
        self.current = config_at(config, 0)
        set_input_size(model, self.current.img_size)
        self.batches = EpochBatches(len(dataset), share, config.seed, world.rank, world.size, config.repeated_aug)
        self.loader = self._loader()
        self.augment = BatchAugmentation(config, num_classes, self.device)
        self.criterion = create_criterion(config, teacher)
        self.cached_teacher = teacher if isinstance(teacher, CachedTeacher) else None
        self.teacher_sees = teacher is not None and self.cached_teacher is None
        if config.grad_checkpointing:
            model.set_grad_checkpointing(True)
        self.optimizer = create_optimizer(config, model)
        self.schedule = Schedule(config, self.optimizer, len(self.batches))
        self.scaler = create_scaler(config, self.device)
        self.ema = create_ema(config, model)
        self.net = self._parallel(model)
        # What the update heeds on the device: a scaler, or the fused optimizers of PyTorch, skip it where a loss was not finite.
        masked = self.scaler is not None or masks_updates(self.optimizer)
        self.monitor = LossMonitor(self.device, world, deferred=self.device.type == "cuda" and masked)
        self.rates = DeviceRates(self.optimizer, self.device)
        reason = why_not_captured(config, self.device, self.optimizer, world)
        self.whole_step = CapturedStep(self._whole_step, reason, functools.partial(CudaRecorder, self.device))
        if reason not in (None, OFF) and world.main:
            print(f"cuda_graphs: {self.whole_step.outcome}", file=sys.stderr, flush=True)
        peak = peak_flops(self.device)
        self.meter = Meter(config.batch_size, _flops_per_image(model), peak and peak * world.size)
        self._carry()
        self.phase: Phase = "between steps"
        self.stop_requested: Callable[[], bool] = lambda: False  # whether this process was asked to stop
        self.after_step: Callable[[], None] = lambda: None
        self.step = 0  # updates so far

    @property
    def last_loss(self) -> float:
        """The last finite one, NaN before there is any."""
        return self.monitor.last_finite

    def _carry(self) -> None:
        """Saves what a step changes before its update, so that a failed step can be undone: for each of the last two steps, since
        the check of a step may finish one step later."""
        self.carried = [*self.model.buffers(), self.monitor.total]
        self.kept = [[tensor.clone() for tensor in self.carried] for _ in range(2)]

    def _loader(self) -> TrainLoader:
        dataset = self.dataset
        if self.current is not self.config:
            dataset = dataset_at(dataset, train_transform, self.current)
        return TrainLoader(dataset, self.batches, self.current, self.device)

    def enter(self, current: Config) -> None:
        """Changes to another phase: model, moving average and optimizer to its image size, and a loader of its images.

        Positions of another size are parameters of their own, whose optimizer state starts anew.
        """
        if current == self.current:
            return
        self.current = current
        replaced = set_input_size(self.model, current.img_size)
        if replaced:
            exchange(self.optimizer, replaced)
            if self.ema is not None:
                set_input_size(self.ema.module, current.img_size)
            del self.net  # a DistributedDataParallel is made for its parameters
            gc.collect()
            self.net = self._parallel(self.model)
            self._carry()
            self.meter.flops_per_image = _flops_per_image(self.model)
        self.loader.close()
        self.loader = self._loader()
        self.whole_step.forget()

    def train_epoch(self, epoch: int, progress: Progress) -> float:
        """Trains on the batches of the epoch that remain and returns the mean loss of all.

        Raises:
            NonFiniteLossError: a loss or a gradient is not finite. The weights are those before that step.
        """
        updates = self.schedule.updates_per_epoch
        self.enter(config_at(self.config, epoch))
        self.model.train()
        done = min(max(self.step - epoch * updates, 0), updates)
        if done == 0:
            self.monitor.reset()
        self.batches.set_epoch(epoch, done)
        for images, classes in self.meter.batches(self.loader) if done < updates else ():
            self._train_step(epoch, images, classes)
            progress.update()
            self.after_step()
        self.monitor.check()
        self.world.same_buffers(self.model)
        return self.monitor.mean(updates)

    def take_back(self, step: int | None = None) -> bool:
        """Makes the state that of before `step`, which was begun (by default the one under way, if any), without its update.

        Returns:
            Whether that is so: not if the update had begun.
        """
        if step is None:
            if self.phase == "between steps":
                return True
            if self.phase == "update":
                return False
            step = self.step
        with torch.no_grad():
            for tensor, kept in zip(self.carried, self.kept[step % 2], strict=True):
                tensor.copy_(kept)
        self.monitor.forget(step)
        self.step, self.phase = step, "between steps"
        return True

    def _train_step(self, epoch: int, images: Tensor, classes: Tensor) -> None:
        with torch.no_grad():
            for tensor, kept in zip(self.carried, self.kept[self.step % 2], strict=True):
                kept.copy_(tensor)
        self.phase = "gradients"
        seed_step(self.config.seed, self.step, self.world.rank)
        self.schedule.set(self.step)
        self.rates.follow()
        images, targets = self.augment(images, classes, epoch)
        if self.cached_teacher is not None:
            self.cached_teacher.seek(epoch, self.batches.positions(self.step % self.schedule.updates_per_epoch))
        self.monitor.ask(self.stop_requested())
        if self.monitor.deferred and self.scaler is None:
            values = self.whole_step(images, targets)
            self.phase = "update"  # for a recording, which is launched as a whole
            self.monitor.note(values, self.step, epoch)
        else:  # a scaler knows of this step's gradients alone, so that the verdict on the one before must be read first
            self.monitor.note(self._gradients(images, targets), self.step, epoch)
            self._update()
        if self.config.model_ema_warmup:
            self._average(self.step + 1)
        self.step, self.phase = self.step + 1, "between steps"

    def _whole_step(self, images: Tensor, targets: Tensor) -> Tensor:
        """All work on the device from augmentation to the next step, except a moving average whose decay changes."""
        values = self._gradients(images, targets)
        self._update()
        return values

    def _gradients(self, images: Tensor, targets: Tensor) -> Tensor:
        """Adds up the gradients of the batch's parts; returns the verdict on their mean loss. Processes exchange gradients with the
        last part."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.current.grad_accum_steps
        size = len(images) // parts
        total = torch.zeros((), device=self.device)
        for part in range(parts):
            chosen = slice(part * size, (part + 1) * size)
            if self.cached_teacher is not None:
                self.cached_teacher.take(chosen)
            last = part == parts - 1
            alone = isinstance(self.net, DistributedDataParallel) and not last
            with self.net.no_sync() if alone else contextlib.nullcontext():
                shown = images[chosen]
                taught = enlarged(shown, self.config.img_size) if self.teacher_sees else shown
                with autocast(self.config, self.device):
                    loss = self.criterion(taught, self.net(shown), targets[chosen]) / parts
                (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
            total += loss.detach()
        if self.scaler is not None:  # which looks itself, and for which an overflow is no fault
            return self.monitor.judge(total)
        return self.monitor.judge(total, [p.grad for p in self.model.parameters() if p.grad is not None])

    def _update(self) -> None:
        self.phase = "update"
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.config.clip_grad:
            agc = self.config.clip_mode == "agc"
            parameters = model_parameters(self.model, exclude_head=agc)
            dispatch_clip_grad(parameters, self.config.clip_grad, mode=self.config.clip_mode)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < SMALLEST_SCALE:
                raise NonFiniteLossError(
                    f"gradients are not finite in fp16 however small the loss is scaled (by {self.scaler.get_scale():.3g}) at step "
                    f"{self.step}; the last finite loss was {self.last_loss:.6g}. The last updates were not made",
                    self.step,
                )
        elif self.monitor.deferred:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, self.monitor.bad
            with self.rates.in_place():
                self.optimizer.step()
        else:
            self.optimizer.step()
        if not self.config.model_ema_warmup:
            self._average(self.step + 1)

    def _average(self, step: int) -> None:
        if self.ema is not None:
            self.ema.update(self.model, step=step)

    def _parallel(self, model: nn.Module) -> nn.Module:
        """The module that a step calls: the model, compiled and wrapped in DDP as the configuration and the world require."""
        net = torch.compile(model) if self.config.compile else model
        if self.world.size == 1:
            return net
        return DistributedDataParallel(net, device_ids=[self.device] if self.device.type == "cuda" else None)

    def bad_gradients(self) -> list[str]:
        """Names of parameters whose gradient, of the last backward pass, is not finite."""
        return [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]

    def not_finite(self) -> list[str]:
        """Names of what a state would hold with NaN or infinity in it: weights, their moving average, the optimizer's state."""
        found = {**self.model.state_dict()}
        if self.ema is not None:
            found |= {f"moving average of {name}": tensor for name, tensor in self.ema.module.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            values = self.optimizer.state.get(parameter, {})
            found |= {f"{key} of {name}": value for key, value in values.items() if isinstance(value, Tensor)}
        floating = {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}
        on_device = [tensor for tensor in floating.values() if tensor.device == self.device]
        on_host = [tensor for tensor in floating.values() if tensor.device != self.device]
        if all_finite(on_device, self.device) and all_finite(on_host, torch.device("cpu")):
            return []
        return [name for name, tensor in floating.items() if not tensor.isfinite().all()]

    def state_dict(self) -> dict[str, Any]:
        """All that training depends on. Reads what is still on its way; raises NonFiniteLossError if that is bad."""
        self.monitor.check()
        return {
            "step": self.step,
            "img_size": self.current.img_size,
            "loss_sum": float(self.monitor.total),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state of the model's image size: see `enter`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.whole_step.forget()
        self.monitor.reset(state["loss_sum"])
        self.step = state["step"]


def share_of_batch(config: Config, world: World) -> int:
    """Images of a batch that one process takes. Raises ValueError unless all processes take as many, in as large parts, in every
    phase."""
    share, left = divmod(config.batch_size, world.size)
    if left:
        raise ValueError(f"batch_size: {config.batch_size} images cannot be shared evenly by {world.size} processes")
    for phase in phases(config):
        parts = phase.config.grad_accum_steps
        if share % parts:
            raise ValueError(f"grad_accum_steps: {share} images of a process cannot be cut into {parts} equal parts")
        if config.drop_path_mode == "skip":
            kept_samples(share // parts, config.drop_path)
    if config.mixes and share % 2:
        raise ValueError(f"batch_size: mixup pairs a process's images, so expected an even number of them, got {share}")
    return share


def _flops_per_image(model: nn.Module) -> float | None:
    try:
        return training_flops_per_image(shape_of(model))
    except ValueError:  # no vision transformer
        return None


def create_criterion(config: Config, teacher: nn.Module | None) -> DistillationLoss:
    """DeiT's loss on (images, outputs, targets), with targets as `BatchAugmentation` gives them."""
    base: nn.Module
    if config.bce_loss:
        base = nn.BCEWithLogitsLoss()
    elif config.mixes:
        base = SoftTargetCrossEntropy()
    elif config.smoothing:
        base = LabelSmoothingCrossEntropy(config.smoothing)
    else:
        base = nn.CrossEntropyLoss()
    kind = ClassTokenDistillationLoss if config.distil_class_token else DistillationLoss
    return kind(base, teacher, config.distillation_type, config.distillation_alpha, config.distillation_tau)


class ClassTokenDistillationLoss(DistillationLoss):
    """Distillation into the class head itself, as Table 3 of the DeiT paper has it beside the distillation token."""

    def forward(self, inputs: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        return super().forward(inputs, (outputs, outputs) if isinstance(outputs, Tensor) else outputs, labels)
