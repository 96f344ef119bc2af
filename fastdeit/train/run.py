"""A run from its configuration to its folder: the teacher if it is trained here, then the student."""

import signal
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
from fastdeit.train.distributed import SINGLE, World
from fastdeit.train.engine import Trainer
from fastdeit.train.evaluation import evaluate
from fastdeit.train.meter import postfix
from fastdeit.train.models import create_student, create_teacher, has_distillation_head, quickened
from fastdeit.train.monitor import NonFiniteLossError
from fastdeit.train.sampling import eval_loader
from fastdeit.train.signals import Stopped, StopRequest
from fastdeit.train.tracking import Tracker, check_packages, create_trackers

RATES = ("images_per_second", "data_wait", "mfu")  # of an epoch's training; None where not known
CURVES_EVERY, SHOWN_EVERY = 30, 2  # seconds: the picture, and the rates in the progress bar


@dataclass(frozen=True)
class Result:
    """Top-1 and loss as `engine.evaluate` gives them."""

    last: dict[str, float]
    ema: dict[str, float] | None
    best_epoch: int
    best_top1: float
    teacher_top1: float | None


def train(config: Config, folder: Path, resume: bool = False, world: World = SINGLE) -> Result:
    """Trains as config says and leaves args.yaml, summary.csv, curves.png, report.md and checkpoints in folder.

    Args:
        config: checked.
        folder: of this run; made if need be.
        resume: continue from folder's last.state.pt, and its teacher's, where there is one, at the step where it was written; the
            weights at the end are bit for bit those of an uninterrupted run, on as many processes.
        world: the processes that share the work, this one among them, already joined. One of them writes.

    Raises:
        ImportError: a package that config asks for is not installed.
        ValueError: data, model, teacher or checkpoints do not fit config. Raised before anything is trained or written.
        NonFiniteLossError: the loss became NaN or infinite. The state before that step is in nonfinite.state.pt.
        Stopped: a signal asked for it. The state is saved.
    """
    with reproducible(config), StopRequest().listening() as stop:
        check_packages(config)
        device = select_device(config, world)
        data = load_data(config)
        teacher, labels, teacher_fit = None, None, None
        if config.distillation_type != "none" and config.teacher_epochs:
            own = teacher_config(config)
            teacher = create_student(own, len(data.classes), device, field="teacher_model")
            teacher_fit = Fit("teacher", own, data, teacher, None, folder / "teacher", resume, world, stop)
        elif config.teacher_cache is not None:
            labels = CachedTeacher(config, data, device, world.size)
        elif config.distillation_type != "none":
            teacher = quickened(create_teacher(config, len(data.classes), device), device)
        student_fit = Fit(
            "student",
            config,
            data,
            create_student(config, len(data.classes), device, initial_weights=True),
            teacher or labels,
            folder,
            resume,
            world,
            stop,
        )

        trackers: list[Tracker] = []
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            _write_args(folder / "args.yaml", config)
            trackers = create_trackers(config, folder, len(student_fit.history))
        world.barrier()
        if teacher_fit is not None:
            teacher_fit.run()
            teacher.eval().requires_grad_(False)
        teacher_top1 = None
        if teacher is not None:
            teacher_top1 = evaluate(teacher, student_fit.validation, config, device, world)["top1"]
        student_fit.run(teacher_top1, trackers)
        result = student_fit.result(teacher_top1)
        if world.main:
            _report(student_fit, data, teacher, result, folder)
        world.barrier()
        return result


def _report(fit: "Fit", data: Data, teacher: nn.Module | None, result: Result, folder: Path) -> None:
    """report.md and results.json, of the weights at the end of training."""
    config, model, device = fit.config, fit.trainer.model, fit.trainer.device
    validation = eval_loader(data.val, config.batch_size, config.workers, device.type == "cuda")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    columns = {"last epoch": result.last, **({"moving average": result.ema} if result.ema else {})}
    different = analysis.disagreement(model, teacher, validation, config, device)
    cosines = None
    if has_distillation_head(model):
        cosines = analysis.token_cosines(model, validation, config, device)
    graphs = fit.trainer.whole_step.outcome
    report.write_results(folder, config.as_dict(), name, columns, result.teacher_top1, different, cosines, graphs)


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
        world: the processes that share the work.
        stop: where a signal is noted.

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
        world: World,
        stop: StopRequest,
    ) -> None:
        self.label = label
        self.world = world
        self.stop = stop
        self.config = config
        self.classes = data.classes
        self.folder = folder
        self.trainer = Trainer(config, model, teacher, data.train, len(data.classes), world)
        self.trainer.stop_requested = lambda: stop.number is not None
        self.trainer.after_step = self._between_steps
        pin_memory = self.trainer.device.type == "cuda"
        share = (world.rank, world.size)
        self.validation = eval_loader(data.val, config.batch_size, config.workers, pin_memory, *share)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"epoch": -1, "top1": -1.0}
        self.saved = self.shown = time.monotonic()
        if resume and (folder / checkpoints.STATE).exists():
            self._load_state(folder / checkpoints.STATE)

    def run(self, teacher_top1: float | None = None, trackers: Sequence[Tracker] = ()) -> None:
        """Trains the epochs that remain. teacher_top1 is a line in the curves; trackers are told of each epoch, then closed."""
        if self.world.main:
            self.folder.mkdir(exist_ok=True)
            if self.history:
                self._export()  # a kill may have come between the state and what follows from it
        epochs, updates, meter = self.config.epochs, self.trainer.schedule.updates_per_epoch, self.trainer.meter
        curves_written = self.saved = time.monotonic()
        hidden = None if self.world.main else True
        with tqdm(
            total=epochs * updates, initial=self.trainer.step, desc=self.label, unit="step", disable=hidden
        ) as bar:
            self.bar = bar
            for epoch in range(len(self.history), epochs):
                started = time.monotonic()
                meter.restart()
                loss = self._train_epoch(epoch, bar)
                rates = dict.fromkeys(RATES) | {name: round(rate, 4) for name, rate in meter.reading().items()}
                row, top1 = self._results(epoch, loss)
                seconds = round(time.monotonic() - started, 2)
                self.history.append({**row, "seconds": seconds, **rates})
                improved = top1 > self.best["top1"]
                if improved:
                    self.best = {"epoch": epoch, "top1": top1}
                if not self.world.main:
                    continue
                if improved:
                    self._save_weights("best.safetensors", self.trainer.model)
                self._keep_best()
                self._save_state()
                self._export()
                for tracker in trackers:
                    tracker.log(self.history[-1])
                if time.monotonic() - curves_written > CURVES_EVERY:
                    reporting.write_curves(self.folder / "curves.png", self.history, teacher_top1)
                    curves_written = time.monotonic()
                bar.write(f"{self.label} {reporting.epoch_line(row, epochs)}")
        if self.world.main:
            reporting.write_curves(self.folder / "curves.png", self.history, teacher_top1)
        for tracker in trackers:
            tracker.close()

    def _train_epoch(self, epoch: int, bar: "tqdm[Any]") -> float:
        try:
            return self.trainer.train_epoch(epoch, bar)
        except NonFiniteLossError as error:
            if not self.world.main:
                raise
            self.trainer.step = error.step  # a verdict that comes late comes after the step was counted
            self._save_state(checkpoints.BAD_STATE)
            raise NonFiniteLossError(
                f"{error}; the state before it is in {self.folder / checkpoints.BAD_STATE}", error.step
            ) from None

    def _between_steps(self) -> None:
        """Stops if any process was asked to, and saves if it is time. A stream of data can be taken up at an epoch's start only."""
        now = time.monotonic()
        if self.world.main and now - self.shown > SHOWN_EVERY:
            self.bar.set_postfix_str(postfix(self.trainer.meter.reading()))
            self.shown = now
        streams = self.trainer.loader.streams
        if self.trainer.monitor.stop:
            if self.world.main and not streams:
                self._save_state()
            saved = "the last epoch's state is saved" if streams else f"the state at step {self.trainer.step} is saved"
            raise Stopped(self.stop.number or signal.SIGTERM, f"{saved} in {self.folder}; --resume auto goes on")
        if not self.world.main or streams:
            return
        minutes, steps = self.config.checkpoint_minutes, self.config.checkpoint_steps
        due = (minutes and now - self.saved >= 60 * minutes) or (steps and self.trainer.step % steps == 0)
        if due and self.trainer.monitor.clean():
            self._save_state()

    def _keep_best(self) -> None:
        """With keep_best over one, the weights of so many best epochs, each in a file of its own."""
        if self.config.keep_best == 1:
            return
        own = "top1_both" if "top1_both" in self.history[0] else "top1_top1"
        ranked = sorted(self.history, key=lambda row: (-row[own], row["epoch"]))[: self.config.keep_best]
        kept = {_epoch_file(row["epoch"]) for row in ranked}
        name = _epoch_file(self.history[-1]["epoch"])
        if name in kept:
            self._save_weights(name, self.trainer.model)
        for path in self.folder.glob(_epoch_file("*")):
            if path.name not in kept:
                path.unlink()

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
            results = evaluate(model, self.validation, self.config, self.trainer.device, self.world)
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

    def _save_state(self, name: str = checkpoints.STATE) -> None:
        about = dict(config=self.config.as_dict(), classes=list(self.classes), history=self.history, best=self.best)
        state = {**about, "epoch": len(self.history), **self.trainer.state_dict()}
        checkpoints.save_state(self.folder / name, state)
        self.saved = time.monotonic()

    def _export(self) -> None:
        """What follows from the training state: weights by themselves, and the summary."""
        self._save_weights("last.safetensors", self.trainer.model)
        if self.trainer.ema is not None:
            self._save_weights("ema.safetensors", self.trainer.ema.module)
        reporting.write_summary(self.folder / "summary.csv", self.history)

    def _save_weights(self, name: str, model: nn.Module) -> None:
        epoch = self.history[-1]["epoch"]
        checkpoints.save_weights(self.folder / name, model.state_dict(), self.config, self.classes, epoch=epoch)


def _epoch_file(epoch: int | str) -> str:
    return f"epoch-{epoch}.safetensors"


def _results_of(row: dict[str, Any], prefix: str) -> dict[str, float]:
    readouts = {name: row[f"{prefix}top1_{name}"] for name in reporting.READOUTS if f"{prefix}top1_{name}" in row}
    return {"loss": row[f"{prefix}val_loss"], **readouts}


def _write_args(path: Path, config: Config) -> None:
    import yaml

    text = yaml.safe_dump(config.as_dict(), sort_keys=False)
    checkpoints.write_atomically(path, lambda file: file.write(text.encode()))
