"""The evaluation after an epoch, where the configuration asks for one: a row of summary.csv."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from fastdeit.train.config import Config
from fastdeit.train.distributed import World
from fastdeit.train.engine import Trainer
from fastdeit.train.error_passing import ErrorPassingLoader
from fastdeit.train.evaluation import evaluate
from fastdeit.train.phases import dataset_at
from fastdeit.train.sampling import eval_loader
from fastdeit.train.transforms import eval_transform


class EpochResults:
    """Evaluates a model, and its moving average, on the validation images of a run.

    Args:
        config: of the run: `eval_every` and `eval_ema` say when.
        images: to evaluate on.
        device: of the model.
        world: the processes that share the images.
        stop_requested: whether this process is to stop.
    """

    def __init__(
        self, config: Config, images: Dataset, device: torch.device, world: World, stop_requested: Callable[[], bool]
    ) -> None:
        self.config = config
        self.images = images
        self.device = device
        self.world = world
        self.stop_requested = stop_requested

    def loader(self, current: Config) -> ErrorPassingLoader:
        """The images of this process, in the size of a phase."""
        images = self.images
        if current.img_size != self.config.img_size:
            images = dataset_at(images, eval_transform, current)
        pinned = self.device.type == "cuda"
        return eval_loader(images, current.batch_size, current.workers, pinned, self.world.rank, self.world.size)

    def row(self, trainer: Trainer, epoch: int, train_loss: float) -> tuple[dict[str, Any], float | None]:
        """The row, and the top-1 that chooses the best checkpoint, the model's own prediction. None without an evaluation.

        Raises:
            EvaluationStopped: one of the processes was to stop.
        """
        row: dict[str, Any] = {"epoch": epoch, "lr": trainer.optimizer.param_groups[0]["lr"], "train_loss": train_loss}
        if self.config.img_size_schedule is not None:
            row["img_size"] = trainer.current.img_size
        last = epoch == self.config.epochs - 1
        if not last and (epoch + 1) % self.config.eval_every:
            return row, None
        loader, top1 = self.loader(trainer.current), None
        models = {"": trainer.model}
        if trainer.ema is not None and (last or self.config.eval_ema == "each"):
            models["ema_"] = trainer.ema.module
        for prefix, model in models.items():
            results = evaluate(model, loader, self.config, self.device, self.world, self.stop_requested)
            row[f"{prefix}val_loss"] = results.pop("loss")
            row.update({f"{prefix}top1_{name}": value for name, value in results.items()})
            if not prefix:
                top1 = list(results.values())[-1]
        if trainer.ema is not None and "ema_" not in models:
            # The columns of a run are the same from its first evaluation on.
            row |= {f"ema_{name}": None for name in row if name == "val_loss" or name.startswith("top1_")}
        return row, top1
