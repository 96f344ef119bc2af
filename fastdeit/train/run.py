"""A run from its configuration to its folder: the teacher if it is trained here, then the student."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastdeit.train import analysis, checkpoints, report, reporting
from fastdeit.train.cached_labels import CachedTeacher
from fastdeit.train.config import Config
from fastdeit.train.datasets import Data, load_data
from fastdeit.train.device import reproducible, select_device
from fastdeit.train.engine import Trainer, evaluate
from fastdeit.train.models import create_student, create_teacher, has_distillation_head
from fastdeit.train.sampling import eval_loader
from fastdeit.train.tracking import Tracker, create_trackers

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
    """Trains as config says and leaves args.yaml, summary.csv, curves.png, report.md and checkpoints in folder.

    Args:
        config: checked.
        folder: of this run; made if need be.
        resume: continue from folder's last.state.pt, and its teacher's, where there is one; the weights at the end are bit for bit
            those of an uninterrupted run.

    Raises:
        ValueError: data, model, teacher or checkpoints do not fit config. Raised before anything is trained or written.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    with reproducible(config):
        device = select_device(config)
        data = load_data(config)
        teacher, labels, teacher_fit = None, None, None
        if config.distillation_type != "none" and config.teacher_epochs:
            own = teacher_config(config)
            teacher = create_student(own, len(data.classes), device)
            teacher_fit = Fit("teacher", own, data, teacher, None, folder / "teacher", resume)
        elif config.teacher_cache is not None:
            labels = CachedTeacher(config, data, device)
        elif config.distillation_type != "none":
            teacher = create_teacher(config, len(data.classes), device)
        student_fit = Fit(
            "student",
            config,
            data,
            create_student(config, len(data.classes), device, initial_weights=True),
            teacher or labels,
            folder,
            resume,
        )

        folder.mkdir(parents=True, exist_ok=True)
        _write_args(folder / "args.yaml", config)
        trackers = create_trackers(config, folder, len(student_fit.history))
        if teacher_fit is not None:
            teacher_fit.run()
            teacher.eval().requires_grad_(False)
        teacher_top1 = None
        if teacher is not None:
            teacher_top1 = evaluate(teacher, student_fit.validation, config, device)["top1"]
        student_fit.run(teacher_top1, trackers)
        result = student_fit.result(teacher_top1)
        _report(student_fit, teacher, result, folder)
        return result


def _report(fit: "Fit", teacher: nn.Module | None, result: Result, folder: Path) -> None:
    """report.md and results.json, of the weights at the end of training."""
    config, model, device = fit.config, fit.trainer.model, fit.trainer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    columns = {"last epoch": result.last, **({"moving average": result.ema} if result.ema else {})}
    different = analysis.disagreement(model, teacher, fit.validation, config, device)
    cosines = None
    if has_distillation_head(model):
        cosines = analysis.token_cosines(model, fit.validation, config, device)
    report.write_results(folder, config.as_dict(), name, columns, result.teacher_top1, different, cosines)


def teacher_config(config: Config) -> Config:
    """The configuration by which config's teacher is trained: the same images and optimizer, no distillation."""
    return config.replace(
        name=f"{config.name}-teacher",
        model=config.teacher_model,
        model_kwargs=config.teacher_kwargs,
        epochs=config.teacher_epochs,
        warmup_epochs=min(config.warmup_epochs, config.teacher_epochs // 5),
        lr=config.teacher_lr,
        pretrained=False,
        finetune=None,
        drop=0.0,
        drop_path=0.0,
        drop_path_uniform=False,
        mixup=0.0,
        cutmix=0.0,
        cutmix_minmax=None,
        mixup_off_epoch=0,
        bce_loss=False,
        bce_target_thresh=None,
        distil_class_token=False,
        model_ema_decay=0.0,
        distillation_type="none",
        teacher_model=None,
        teacher_kwargs={},
        teacher_epochs=0,
    )


class Fit:
    """The training of one model into its folder: its trainer, its history, its best epoch.

    Args:
        label: `teacher` or `student`, for the progress bar.
        folder: where checkpoints and reports go; made when `run` starts.
        resume: take up the state that folder holds, if any.

    Raises:
        ValueError: config does not fit the model or the data, or the state is not this run's.
    """

    def __init__(
        self,
        label: str,
        config: Config,
        data: Data,
        model: nn.Module,
        teacher: nn.Module | None,
        folder: Path,
        resume: bool,
    ) -> None:
        self.label = label
        self.config = config
        self.classes = data.classes
        self.folder = folder
        self.trainer = Trainer(config, model, teacher, data.train, len(data.classes))
        pin_memory = self.trainer.device.type == "cuda"
        self.validation = eval_loader(data.val, config.batch_size, config.workers, pin_memory)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"epoch": -1, "top1": -1.0}
        if resume and (folder / checkpoints.STATE).exists():
            self._load_state(folder / checkpoints.STATE)

    def run(self, teacher_top1: float | None = None, trackers: Sequence[Tracker] = ()) -> None:
        """Trains the epochs that remain. teacher_top1 is a line in the curves; trackers are told of each epoch, then closed."""
        self.folder.mkdir(exist_ok=True)
        if self.history:
            self._export()  # a kill may have come between the state and what follows from it
        epochs, updates = self.config.epochs, len(self.trainer.batches)
        curves_written = time.monotonic()
        with tqdm(total=epochs * updates, initial=self.trainer.step, desc=self.label, unit="step", disable=None) as bar:
            for epoch in range(len(self.history), epochs):
                started = time.monotonic()
                row, top1 = self._results(epoch, self.trainer.train_epoch(epoch, bar))
                self.history.append({**row, "seconds": round(time.monotonic() - started, 2)})
                if top1 > self.best["top1"]:
                    self.best = {"epoch": epoch, "top1": top1}
                    self._save_weights("best.safetensors", self.trainer.model)
                self._save_state()
                self._export()
                for tracker in trackers:
                    tracker.log(self.history[-1])
                if time.monotonic() - curves_written > CURVES_EVERY:
                    reporting.write_curves(self.folder / "curves.png", self.history, teacher_top1)
                    curves_written = time.monotonic()
                bar.write(f"{self.label} {reporting.epoch_line(row, epochs)}")
        reporting.write_curves(self.folder / "curves.png", self.history, teacher_top1)
        for tracker in trackers:
            tracker.close()

    def result(self, teacher_top1: float | None) -> Result:
        last = _results_of(self.history[-1], "")
        ema = _results_of(self.history[-1], "ema_") if self.trainer.ema is not None else None
        return Result(last, ema, self.best["epoch"], self.best["top1"], teacher_top1)

    def _results(self, epoch: int, train_loss: float) -> tuple[dict[str, Any], float]:
        """The epoch's row of summary.csv, and the top-1 that chooses the best checkpoint: the model's own prediction."""
        row: dict[str, Any] = {
            "epoch": epoch,
            "lr": self.trainer.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
        }
        models = {"": self.trainer.model}
        if self.trainer.ema is not None:
            models["ema_"] = self.trainer.ema.module
        for prefix, model in models.items():
            results = evaluate(model, self.validation, self.config, self.trainer.device)
            row[f"{prefix}val_loss"] = results.pop("loss")
            row.update({f"{prefix}top1_{name}": value for name, value in results.items()})
            if not prefix:
                top1 = list(results.values())[-1]
        return row, top1

    def _load_state(self, path: Path) -> None:
        state = checkpoints.load_state(path)
        checkpoints.check_same_run(state, self.config, path)
        checkpoints.check_same_tensors(state["model"], self.trainer.model.state_dict(), path)
        self.trainer.load_state_dict(state)
        self.history, self.best = state["history"], state["best"]

    def _save_state(self) -> None:
        about = dict(config=self.config.as_dict(), classes=list(self.classes), history=self.history, best=self.best)
        state = {**about, "epoch": len(self.history), **self.trainer.state_dict()}
        checkpoints.save_state(self.folder / checkpoints.STATE, state)

    def _export(self) -> None:
        """What follows from the training state: weights by themselves, and the summary."""
        self._save_weights("last.safetensors", self.trainer.model)
        if self.trainer.ema is not None:
            self._save_weights("ema.safetensors", self.trainer.ema.module)
        reporting.write_summary(self.folder / "summary.csv", self.history)

    def _save_weights(self, name: str, model: nn.Module) -> None:
        epoch = self.history[-1]["epoch"]
        checkpoints.save_weights(self.folder / name, model.state_dict(), self.config, self.classes, epoch=epoch)


def _results_of(row: dict[str, Any], prefix: str) -> dict[str, float]:
    readouts = {name: row[f"{prefix}top1_{name}"] for name in reporting.READOUTS if f"{prefix}top1_{name}" in row}
    return {"loss": row[f"{prefix}val_loss"], **readouts}


def _write_args(path: Path, config: Config) -> None:
    import yaml

    text = yaml.safe_dump(config.as_dict(), sort_keys=False)
    checkpoints.write_atomically(path, lambda file: file.write(text.encode()))
