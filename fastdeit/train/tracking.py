"""Results of each epoch to TensorBoard and Weights & Biases, for those who have them installed."""

import hashlib
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fastdeit.train.config import Config


class Tracker(Protocol):
    def log(self, row: Mapping[str, Any]) -> None:
        """One epoch's row of summary.csv."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in FOLDER/tensorboard. `first_epoch` on are written anew: a resumed run replaces what it repeats."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "epoch" and value is not None:
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A W&B run named as the configuration is. Its id follows from the folder, so that a resumed run goes on in it."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self.run = wandb.init(
            project=config.wandb,
            name=config.name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=config.as_dict(),
        )

    def log(self, row: Mapping[str, Any]) -> None:
        values = {name: value for name, value in row.items() if name != "epoch" and value is not None}
        self.run.log(values, step=row["epoch"])

    def close(self) -> None:
        self.run.finish()


def check_packages(config: Config) -> None:
    """Raises ImportError that names the package of a tracker that config asks for, and how to install it."""
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) and sys.modules.get(name) is None and find_spec(name) is None:
            raise ImportError(f"{name}: needs the package {name}: pip install {name}")


def create_trackers(config: Config, folder: Path, first_epoch: int) -> list[Tracker]:
    """What config asks for, after `check_packages`."""
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(folder, first_epoch))
    if config.wandb:
        trackers.append(WeightsAndBiases(config, folder))
    return trackers
