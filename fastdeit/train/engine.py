"""The training step and the epoch around it, and evaluation."""

import math
from typing import Any, Protocol

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fastdeit.losses import DistillationLoss
from fastdeit.train.config import Config
from fastdeit.train.device import autocast
from fastdeit.train.models import head_logits
from fastdeit.train.optimization import Schedule, create_ema, create_optimizer
from fastdeit.train.sampling import EpochBatches, seed_step, train_loader


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the weights are those before that step."""


class Progress(Protocol):
    def update(self, n: int = 1) -> Any: ...


class Trainer:
    """A model with all that changes while it trains, except the history of results.

    Args:
        config: of the run.
        model: on its device; a distilled one returns its pair of outputs in train mode.
        teacher: in eval mode, or None without distillation.
        dataset: of (image, class), map-style.
        num_classes: of the data set.
    """

    def __init__(
        self, config: Config, model: nn.Module, teacher: nn.Module | None, dataset: Any, num_classes: int
    ) -> None:
        self.config = config
        self.model = model
        self.device = next(model.parameters()).device
        self.batches = EpochBatches(len(dataset), config.batch_size, config.seed)
        self.loader = train_loader(dataset, self.batches, config.workers, pin_memory=self.device.type == "cuda")
        self.mixup = create_mixup(config, num_classes)
        self.criterion = create_criterion(config, teacher)
        self.optimizer = create_optimizer(config, model)
        self.schedule = Schedule(config, self.optimizer, len(self.batches))
        self.ema = create_ema(config, model)
        self.step = 0  # updates so far
        self.last_loss = math.nan

    def train_epoch(self, epoch: int, progress: Progress) -> float:
        """Trains on every batch of the epoch and returns the mean loss. Raises NonFiniteLossError before a bad update."""
        self.model.train()
        self.batches.set_epoch(epoch)
        total = 0.0
        for images, classes in self.loader:
            images = images.to(self.device, non_blocking=True)
            classes = classes.to(self.device, non_blocking=True)
            total += self._train_step(epoch, images, classes)
            progress.update()
        return total / len(self.batches)

    def _train_step(self, epoch: int, images: Tensor, classes: Tensor) -> float:
        seed_step(self.config.seed, self.step)
        self.schedule.set(self.step)
        if self.mixup is not None:
            images, classes = self.mixup(images, classes)
        with autocast(self.config, self.device):
            loss = self.criterion(images, self.model(images), classes)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the loss is {value} at step {self.step} (epoch {epoch}); the last finite one was {self.last_loss:.6g}. "
                "The update was not made and no checkpoint was written since the last epoch"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.step += 1
        self.last_loss = value
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        return value

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.step = state["step"]


def create_mixup(config: Config, num_classes: int) -> Mixup | None:
    if not config.mixes:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def create_criterion(config: Config, teacher: nn.Module | None) -> DistillationLoss:
    """DeiT's loss on (images, outputs, classes), where classes are soft if images are mixed."""
    base: nn.Module
    if config.mixes:
        base = SoftTargetCrossEntropy()
    elif config.smoothing:
        base = LabelSmoothingCrossEntropy(config.smoothing)
    else:
        base = nn.CrossEntropyLoss()
    return DistillationLoss(base, teacher, config.distillation_type, config.distillation_alpha, config.distillation_tau)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[Any], config: Config, device: torch.device) -> dict[str, float]:
    """Cross-entropy (`loss`) of the model's prediction and top-1 in percent by readout, over every image of loader.

    The model's prediction is the last readout: both heads together for a distilled model.
    """
    was_training = model.training
    model.eval()
    images_seen = 0
    total_loss = 0.0
    correct: dict[str, int] = {}
    for images, classes in loader:
        images, classes = images.to(device), classes.to(device)
        with autocast(config, device):
            readouts = head_logits(model, images)
        for name, logits in readouts.items():
            correct[name] = correct.get(name, 0) + int((logits.argmax(1) == classes).sum())
        total_loss += float(F.cross_entropy(logits.float(), classes, reduction="sum"))
        images_seen += len(images)
    model.train(was_training)
    return {"loss": total_loss / images_seen, **{name: 100 * n / images_seen for name, n in correct.items()}}
