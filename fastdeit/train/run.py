"""A run from its configuration to its folder: the teacher if it is trained here, then the student."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from fastdeit.train import checkpoints, reporting
from fastdeit.train.config import Config
from fastdeit.train.datasets import Data, load_data
from fastdeit.train.device import reproducible, select_device
from fastdeit.train.engine import Trainer, evaluate
from fastdeit.train.models import create_student, create_teacher
from fastdeit.train.sampling import eval_loader

CURVES_EVERY = 30  # seconds


@dataclass(frozen=True)
class Result:
    """Top-1 and loss as `engine.evaluate` gives them."""

    last: dict[str, float]
    ema: dict[str, float] | None
    best_epoch: int
    best_top1: float
    teacher_top1: float | None


def train(config: Config, folder: Path, resume: bool = False) -> Result:
    """Trains as config says and leaves args.yaml, summary.csv, curves.png and checkpoints in folder.

    Args:
        config: checked.
        folder: of this run; made if need be.
        resume: continue from folder's last.state.pt, and its teacher's, where there is one; the weights at the end are bit for bit
            those of an uninterrupted run.

    Raises:
        ValueError: data, model or checkpoints do not fit config. Raised before anything is trained or written.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    with reproducible(config):
        device = select_device(config)
        data = load_data(config)
        student = create_student(config, len(data.classes), device)
        state = _state_to_resume(config, student, folder) if resume else None
        folder.mkdir(parents=True, exist_ok=True)
        _write_args(folder / "args.yaml", config)
        teacher, teacher_top1 = _teacher(config, data, device, folder / "teacher", resume)
        return _fit(config, data, student, teacher, folder, state, teacher_top1)


def teacher_config(config: Config) -> Config:
    """The configuration by which config's teacher is trained: the same images and optimizer, no distillation."""
    return config.replace(
        name=f"{config.name}-teacher",
        model=config.teacher_model,
        model_kwargs=config.teacher_kwargs,
        epochs=config.teacher_epochs,
        warmup_epochs=min(config.warmup_epochs, config.teacher_epochs // 5),
        lr=config.teacher_lr,
        drop_path=0.0,
        mixup=0.0,
        cutmix=0.0,
        model_ema_decay=0.0,
        distillation_type="none",
        teacher_model=None,
        teacher_kwargs={},
        teacher_epochs=0,
    )


def _teacher(
    config: Config, data: Data, device: torch.device, folder: Path, resume: bool
) -> tuple[nn.Module | None, float | None]:
    """The teacher, trained first if config says so, and its top-1."""
    if config.distillation_type == "none":
        return None, None
    weights = Path(config.teacher_checkpoint) if config.teacher_checkpoint else None
    if config.teacher_epochs:
        own = teacher_config(config)
        model = create_student(own, len(data.classes), device)
        state = _state_to_resume(own, model, folder) if resume else None
        folder.mkdir(exist_ok=True)
        _fit(own, data, model, None, folder, state, None)
        weights = folder / "last.safetensors"
    teacher = create_teacher(config, len(data.classes), device, weights)
    loader = eval_loader(data.val, config.batch_size, config.workers, pin_memory=device.type == "cuda")
    return teacher, evaluate(teacher, loader, config, device)["top1"]


def _state_to_resume(config: Config, model: nn.Module, folder: Path) -> dict[str, Any] | None:
    path = folder / checkpoints.STATE
    if not path.exists():
        return None
    state = checkpoints.load_state(path)
    checkpoints.check_same_run(state, config, path)
    checkpoints.check_same_tensors(state["model"], model.state_dict(), path)
    return state


def _fit(
    config: Config,
    data: Data,
    model: nn.Module,
    teacher: nn.Module | None,
    folder: Path,
    state: dict[str, Any] | None,
    teacher_top1: float | None,
) -> Result:
    """Trains model from `state` or from the start, and writes folder."""
    trainer = Trainer(config, model, teacher, data.train, len(data.classes))
    validation = eval_loader(data.val, config.batch_size, config.workers, pin_memory=trainer.device.type == "cuda")
    history: list[dict[str, Any]] = []
    best = {"epoch": -1, "top1": -1.0}
    if state is not None:
        trainer.load_state_dict(state)
        history, best = state["history"], state["best"]
    if history:
        _export(folder, trainer, config, data, history)  # a kill may have come between the state and these
    curves_written = time.monotonic()
    updates = len(trainer.batches)
    label = "teacher" if config.name.endswith("-teacher") else "student"
    with tqdm(total=config.epochs * updates, initial=trainer.step, desc=label, unit="step", disable=None) as bar:
        for epoch in range(len(history), config.epochs):
            started = time.monotonic()
            train_loss = trainer.train_epoch(epoch, bar)
            row, top1 = _epoch_results(trainer, validation, config, epoch, train_loss)
            history.append({**row, "seconds": round(time.monotonic() - started, 2)})
            if top1 > best["top1"]:
                best = {"epoch": epoch, "top1": top1}
                _save(folder / "best.safetensors", model, config, data, epoch)
            run_state = dict(
                config=config.as_dict(), classes=list(data.classes), epoch=epoch + 1, history=history, best=best
            )
            checkpoints.save_state(folder / checkpoints.STATE, {**run_state, **trainer.state_dict()})
            _export(folder, trainer, config, data, history)
            if time.monotonic() - curves_written > CURVES_EVERY:
                reporting.write_curves(folder / "curves.png", history, teacher_top1)
                curves_written = time.monotonic()
            bar.write(f"{label} {reporting.epoch_line(row, config.epochs)}")
    reporting.write_curves(folder / "curves.png", history, teacher_top1)
    last = _results_of(history[-1], "")
    ema = _results_of(history[-1], "ema_") if trainer.ema is not None else None
    return Result(last, ema, best["epoch"], best["top1"], teacher_top1)


def _epoch_results(
    trainer: Trainer, validation: Any, config: Config, epoch: int, train_loss: float
) -> tuple[dict[str, Any], float]:
    """The epoch's row of summary.csv, and the top-1 by which the best checkpoint is chosen: the model's own prediction."""
    row: dict[str, Any] = {"epoch": epoch, "lr": trainer.optimizer.param_groups[0]["lr"], "train_loss": train_loss}
    prefixes: dict[str, nn.Module | ModelEmaV3] = {"": trainer.model}
    if trainer.ema is not None:
        prefixes["ema_"] = trainer.ema.module
    for prefix, model in prefixes.items():
        results = evaluate(model, validation, config, trainer.device)
        row[f"{prefix}val_loss"] = results.pop("loss")
        row.update({f"{prefix}top1_{name}": value for name, value in results.items()})
        if not prefix:
            top1 = list(results.values())[-1]
    return row, top1


def _results_of(row: dict[str, Any], prefix: str) -> dict[str, float]:
    readouts = {name: row[f"{prefix}top1_{name}"] for name in reporting.READOUTS if f"{prefix}top1_{name}" in row}
    return {"loss": row[f"{prefix}val_loss"], **readouts}


def _export(folder: Path, trainer: Trainer, config: Config, data: Data, history: list[dict[str, Any]]) -> None:
    """What follows from the training state: weights by themselves, and the summary."""
    epoch = history[-1]["epoch"]
    _save(folder / "last.safetensors", trainer.model, config, data, epoch)
    if trainer.ema is not None:
        _save(folder / "ema.safetensors", trainer.ema.module, config, data, epoch)
    reporting.write_summary(folder / "summary.csv", history)


def _save(path: Path, model: nn.Module, config: Config, data: Data, epoch: int) -> None:
    checkpoints.save_weights(path, model.state_dict(), config, data.classes, epoch=epoch)


def _write_args(path: Path, config: Config) -> None:
    import yaml

    text = yaml.safe_dump(config.as_dict(), sort_keys=False)
    checkpoints.write_atomically(path, lambda file: file.write(text.encode()))
