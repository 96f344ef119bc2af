"""Trains one model into its folder: epochs, when to save, and the messages where training ends early."""

import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from fastdeit.train import checkpoints, failures, reporting
from fastdeit.train.class_names import class_difference
from fastdeit.train.config import Config
from fastdeit.train.data_identity import difference
from fastdeit.train.datasets import Data
from fastdeit.train.distributed import World
from fastdeit.train.engine import Trainer
from fastdeit.train.epoch_results import EpochResults
from fastdeit.train.evaluation import EvaluationStopped
from fastdeit.train.failures import RunFailedError
from fastdeit.train.files import WriteError, remove_temporaries, why
from fastdeit.train.locks import Lock, LockedError
from fastdeit.train.meter import postfix
from fastdeit.train.monitor import NonFiniteLossError, NonFiniteWeightsError
from fastdeit.train.phases import exported, phase_of_state
from fastdeit.train.signals import Stopped, StopRequest
from fastdeit.train.tracking import Tracker
from fastdeit.train.transform_errors import described

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


class Fit:
    """The training of one model into its folder: its trainer, its history, its best epoch.

    Args:
        label: `teacher` or `student`, for the progress bar.
        folder: where checkpoints and reports go; made when `run` starts.
        data_identity: by split, as `data_identity.identity` gives it; needed in the process that writes.
        resume: take up the state that folder holds, if any.
        world: the processes that share the work.
        stop: where a signal is noted.
        lock: of the run's folder, in the process that writes there.

    Raises:
        ValueError: config does not fit the model or the data, or the state is not this run's.
    """

    def __init__(
        self,
        label: str,
        config: Config,
        model: nn.Module,
        teacher: nn.Module | None,
        folder: Path,
        *,
        data: Data,
        data_identity: dict[str, Any],
        resume: bool,
        world: World,
        stop: StopRequest,
        lock: Lock | None,
    ) -> None:
        self.label = label
        self.world = world
        self.stop = stop
        self.lock = lock
        self.config = config
        self.classes = data.classes
        self.folder = folder
        self.trainer = Trainer(config, model, teacher, data.train, len(data.classes), world)
        self.trainer.stop_requested = self.stop_requested
        self.trainer.after_step = self._between_steps
        self.results = EpochResults(config, data.val, self.trainer.device, world, self.stop_requested)
        self.data = data_identity
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"epoch": -1, "top1": -1.0}
        self.saved = self.shown = time.monotonic()
        self.saved_step: int | None = None
        self.damaged = False  # whether the last state is, so that the one before it was taken up
        if resume:
            self._load_state()

    def stop_requested(self) -> bool:
        return self.stop.number is not None

    def stands(self) -> str:
        """What is there to go on from, in words."""
        if self.saved_step is None:
            return f"No state of the {self.label} was saved yet; --resume auto starts its training anew"
        if not checkpoints.has_state(self.folder):
            return f"No state is left in {self.folder}"
        return f"The state at step {self.saved_step} is saved in {self.folder / checkpoints.STATE}; --resume auto goes on from it"

    def run(self, teacher_top1: float | None = None, trackers: Sequence[Tracker] = ()) -> None:
        """Trains the epochs that remain. teacher_top1 is a line in the curves; trackers are told of each epoch, then closed.

        Raises:
            Stopped: a signal asked for it.
            NonFiniteLossError: a loss, a gradient or a weight is not finite. All processes raise it.
            RunFailedError: anything else ended the run.
        """
        with self.ending_in_words():
            if self.world.peers is not None:
                self.world.peers.stands = self.stands
            if self.world.main:
                self._begin()
            self._run(teacher_top1, trackers)

    def _begin(self) -> None:
        """Brings the folder's files into line with the resumed state: a stop may have come before they were written."""
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"{self.folder}: cannot be made: {why(error)}") from error
        remove_temporaries(self.folder)
        if self.damaged:
            checkpoints.put_aside(self.folder)
        if self.history and self.trainer.step == len(self.history) * self.trainer.schedule.updates_per_epoch:
            self._export()

    def _run(self, teacher_top1: float | None, trackers: Sequence[Tracker]) -> None:
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
                loss = self.trainer.train_epoch(epoch, bar)
                rates = dict.fromkeys(RATES) | {name: round(rate, 4) for name, rate in meter.reading().items()}
                self._check_weights()
                if self.world.main and self.saved_step != self.trainer.step:
                    self._save_state()  # so that nothing which evaluation meets costs the epoch
                row, top1 = self.results.row(self.trainer, epoch, loss)
                seconds = round(time.monotonic() - started, 2)
                self.history.append({**row, "seconds": seconds, **rates})
                improved = top1 is not None and top1 > self.best["top1"]
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

    @contextmanager
    def ending_in_words(self) -> Iterator[None]:
        """Saves what can be saved where training ends early, and raises one error that says all of it."""
        try:
            yield
        except (Stopped, RunFailedError):
            raise
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT, f"at once. {self.stands()}") from None
        except EvaluationStopped:
            raise Stopped(self.stop.number or signal.SIGTERM, self.stands()) from None
        except NonFiniteLossError as error:
            raise self._not_finite(error) from None
        except Exception as error:
            raise self._failed(error) from error

    def _not_finite(self, error: NonFiniteLossError) -> NonFiniteLossError:
        """The error about values that are not finite, with advice. Such values never overwrite a good state."""
        if not self.world.main:
            return error
        text, before = str(error), "before it"
        if isinstance(error, NonFiniteWeightsError):
            before = "with them"
        else:
            blamed = [] if self.trainer.monitor.deferred else self.trainer.bad_gradients()
            if blamed:
                text += f" (gradient of {_some(blamed)})"
            self.trainer.take_back(error.step)  # a verdict may come when the next step is under way
            if wrong := self.trainer.not_finite():
                text += f", but {_some(wrong)} became so before"
        path = self.folder / checkpoints.BAD_STATE
        try:
            self._save_state(checkpoints.BAD_STATE)
            text += f". The state {before} is in {path}"
        except Exception as failure:  # of the disk, say, which must not hide what happened
            text += f". The state {before} could not be saved: {failures.cause(failure)}"
        return type(error)(f"{text}. {self.stands()}", error.step)

    def _failed(self, error: Exception) -> RunFailedError:
        text = failures.known_cause(self.world, error)
        if not self.world.main:
            return RunFailedError(text)
        note = failures.write_traceback(self.folder, error) if text == failures.cause(error) else ""
        return RunFailedError(f"{text}{note}. {self._saved_after(error)}")

    def _saved_after(self, error: Exception) -> str:
        """Saves the state after an error, if there is an unsaved one; returns a sentence on what a run can resume from."""
        if isinstance(error, WriteError | LockedError):
            return self.stands()
        if failures.device_failed(self.trainer.device):
            return f"The device can no longer be read. {self.stands()}"
        if not self.trainer.take_back():
            return f"That was in the middle of an update. {self.stands()}"
        updates = self.trainer.schedule.updates_per_epoch
        if self.saved_step == self.trainer.step or (self.trainer.loader.streams and self.trainer.step % updates):
            return self.stands()
        try:
            self.trainer.monitor.check()
            self._check_weights()
            self._save_state()
        except Exception as failure:
            return (
                f"The state at step {self.trainer.step} could not be saved: {failures.cause(failure)}. {self.stands()}"
            )
        return self.stands()

    def _check_weights(self) -> None:
        if wrong := self.trainer.not_finite():
            raise NonFiniteWeightsError(
                f"not finite after step {self.trainer.step}: {_some(wrong)}. All losses were finite, so an update overflowed: the "
                "learning rate may be too high",
                self.trainer.step,
            )

    def _between_steps(self) -> None:
        """Stops if any process was asked to, and saves if it is time. A stream of data can be taken up at an epoch's start only."""
        now = time.monotonic()
        if self.world.main and now - self.shown > SHOWN_EVERY:
            self.bar.set_postfix_str(postfix(self.trainer.meter.reading()))
            self.shown = now
        streams = self.trainer.loader.streams
        if self.trainer.monitor.stop:
            if self.world.main and not streams:
                self._check_weights()
                self._save_state()
            raise Stopped(self.stop.number or signal.SIGTERM, self.stands())
        if not self.world.main or streams:
            return
        minutes, steps = self.config.checkpoint_minutes, self.config.checkpoint_steps
        due = (minutes and now - self.saved >= 60 * minutes) or (steps and self.trainer.step % steps == 0)
        # Weights that are not finite are left to the next loss, which all processes see.
        if due and self.trainer.monitor.clean() and not self.trainer.not_finite():
            self._save_state()

    def _keep_best(self) -> None:
        """With keep_best over one, the weights of so many best epochs, each in a file of its own."""
        if self.config.keep_best == 1:
            return
        evaluated = [row for row in self.history if "val_loss" in row]
        if not evaluated:
            return
        own = "top1_both" if "top1_both" in evaluated[0] else "top1_top1"
        ranked = sorted(evaluated, key=lambda row: (-row[own], row["epoch"]))[: self.config.keep_best]
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

    def _load_state(self) -> None:
        """Loads the state in the folder, if there is one, the same in all processes."""
        if not self.world.agreed(checkpoints.has_state(self.folder)):
            return
        found = self.world.on_main(lambda: checkpoints.newest_state(self.folder))
        path, problem = self.world.agreed(found and found[1:])
        state = found[0] if found else checkpoints.load_state(path)
        checkpoints.check_same_run(state, self.config, path)
        self.trainer.enter(phase_of_state(self.config, state, path))
        checkpoints.check_same_tensors(state["model"], self.trainer.model.state_dict(), path)
        self.world.on_main(lambda: self._check_same_data(state, path))
        self._check_progress(state, path)
        try:
            self.trainer.load_state_dict(state)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: its state does not fit this run: {described(error)}") from error
        self.history, self.best, self.saved_step = state["history"], state["best"], state["step"]
        self.damaged = problem is not None
        if problem is not None and self.world.main:
            print(f"{problem}; going on from {path}, step {self.saved_step}", file=sys.stderr, flush=True)

    def _check_same_data(self, state: dict[str, Any], path: Path) -> None:
        """Raises ValueError that says what changed in the data since the state was written."""
        classes = class_difference(self.classes, state["classes"])
        if classes is not None:
            raise ValueError(f"data: {path} was trained on other classes: beside them {self.config.data} {classes}")
        for split, now in self.data.items():
            changed = difference(state["data"][split], now)
            if changed is not None:
                raise ValueError(
                    f"data: the images in {self.config.data}, {split}, are not those that {path} was trained on: {changed}. "
                    "Give the former ones, or start another run"
                )

    def _check_progress(self, state: dict[str, Any], path: Path) -> None:
        """Raises ValueError unless step, epochs and sum of losses of a state can be of one run of this length."""
        updates, epoch, step = self.trainer.schedule.updates_per_epoch, len(state["history"]), state["step"]
        if state["epoch"] != epoch or not epoch * updates <= step <= (epoch + 1) * updates:
            raise ValueError(
                f"{path}: damaged: step {step} and epoch {state['epoch']} with {epoch} rows of history; an epoch has {updates}"
            )
        if not math.isfinite(state["loss_sum"]):
            raise ValueError(f"{path}: damaged: loss_sum is {state['loss_sum']}, expected a finite number")

    def _save_state(self, name: str = checkpoints.STATE) -> None:
        about = dict(
            config=self.config.as_dict(),
            classes=list(self.classes),
            data=self.data,
            history=self.history,
            best=self.best,
        )
        state = {**about, "epoch": len(self.history), **self.trainer.state_dict()}
        self._check_lock()
        checkpoints.save_state(self.folder / name, state)
        self.saved = time.monotonic()
        if name == checkpoints.STATE:
            self.saved_step = self.trainer.step

    def _check_lock(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def _export(self) -> None:
        """Writes what derives from the training state: weights alone, and the summary."""
        self._save_weights("last.safetensors", self.trainer.model)
        if self.trainer.ema is not None:
            self._save_weights("ema.safetensors", self.trainer.ema.module)
        reporting.write_summary(self.folder / "summary.csv", self.history)

    def _save_weights(self, name: str, model: nn.Module) -> None:
        self._check_lock()
        epoch = self.history[-1]["epoch"]
        config = exported(self.config, self.trainer.current)
        checkpoints.save_weights(self.folder / name, model.state_dict(), config, self.classes, epoch=epoch)


def _epoch_file(epoch: int | str) -> str:
    return f"epoch-{epoch}.safetensors"


def _results_of(row: dict[str, Any], prefix: str) -> dict[str, float]:
    readouts = {name: row[f"{prefix}top1_{name}"] for name in reporting.READOUTS if f"{prefix}top1_{name}" in row}
    return {"loss": row[f"{prefix}val_loss"], **readouts}


def _some(names: Sequence[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
