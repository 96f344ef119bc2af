"""The training step and the epoch around it, and evaluation."""

import math
from typing import Any, Protocol

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fastdeit.losses import DistillationLoss
from fastdeit.train.augmentation import BatchAugmentation
from fastdeit.train.cached_labels import CachedTeacher
from fastdeit.train.config import Config
from fastdeit.train.device import autocast
from fastdeit.train.loading import TrainLoader
from fastdeit.train.models import head_logits
from fastdeit.train.optimization import Schedule, create_ema, create_optimizer
from fastdeit.train.sampling import EpochBatches, seed_step


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the weights are those before that step."""


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
    """

    def __init__(
        self, config: Config, model: nn.Module, teacher: nn.Module | None, dataset: Any, num_classes: int
    ) -> None:
        self.config = config
        self.model = model
        self.device = next(model.parameters()).device
        self.batches = EpochBatches(len(dataset), config.batch_size, config.seed, repeats=config.repeated_aug)
        self.loader = TrainLoader(dataset, self.batches, config, self.device)
        self.augment = BatchAugmentation(config, num_classes, self.device)
        self.criterion = create_criterion(config, teacher)
        self.cached_teacher = teacher if isinstance(teacher, CachedTeacher) else None
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
            total += self._train_step(epoch, images, classes)
            progress.update()
        return total / len(self.batches)

    def _train_step(self, epoch: int, images: Tensor, classes: Tensor) -> float:
        seed_step(self.config.seed, self.step)
        self.schedule.set(self.step)
        images, classes = self.augment(images, classes, epoch)
        if self.cached_teacher is not None:
            self.cached_teacher.seek(epoch, self.batches.positions(self.step % self.schedule.updates_per_epoch))
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
