"""Kills training runs until it has killed enough of them, resumes each, and compares what they end with: bit for bit.

    python tests/train/kills.py --kills 100 --seed 0

Runs are small, and complete: a teacher, then a student with hard distillation, mixup, erasing, drop path and a moving average,
on real images, by the command `fastdeit train --resume auto`. In each of the SETUPS an undisturbed run comes first. Then a run is
ended in one of the setup's ways at a random moment, resumed, ended again, until it comes to its end by itself; its weights, moving
average, best weights and the teacher's must be those of the undisturbed run, in every byte of every tensor. After that the next
run begins. A way that ends a run in words must give its exit code and one line on stderr; nothing may print a traceback or hang.
Prints JSON: how often each way ended a run (one that came too late is not counted), and how many runs were compared.

A run is a process forked from this one, which has imported all that it needs. It leads a process group, as under a scheduler.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from fastdeit.commands import cli
from fastdeit.train import evaluation, files, reporting
from fastdeit.train.engine import Trainer

WEIGHTS = ("last.safetensors", "best.safetensors", "ema.safetensors", "teacher/last.safetensors")
PATIENCE = 300.0  # seconds after which a process counts as hanging
CONFIG = """
base: digits
data: {data}
img_size: 16
batch_size: 32
epochs: 3
warmup_epochs: 1
threads: 1
checkpoint_steps: 2
model_kwargs: {{patch_size: 8, embed_dim: 32, num_heads: 1, depth: 2}}
drop_path: 0.2
teacher_model: regnetx_002
teacher_kwargs: {{depth: 8, stem_width: 8}}
teacher_epochs: 2
teacher_lr: 5.0e-3
lr: 5.0e-3
model_ema_decay: 0.9
mixup: 0.8
cutmix: 1.0
reprob: 0.5
workers: {workers}
"""
# By setup: the number of processes, of their workers, and the ways to end a run. `call N` is within a call of that name.
SETUPS = {
    "one process": (
        1,
        0,
        ("any moment", "writing", "syncing", "renaming", "linking", "evaluating", "updating", "SIGTERM"),
    ),
    "workers": (1, 2, ("any moment", "a worker", "SIGTERM to all")),
    "two processes": (2, 0, ("rank 0", "rank 1", "SIGTERM to rank 1", "error in rank 1")),
}
CALLS: dict[str, tuple[object, str]] = {
    "writing": (files._Noting, "write"),
    "syncing": (os, "fsync"),
    "renaming": (os, "replace"),
    "linking": (os, "link"),
    "evaluating": (evaluation, "head_logits"),
    "updating": (Trainer, "_update"),
}
IN_WORDS = {
    "SIGTERM": {143},
    "SIGTERM to all": {143},
    "SIGTERM to rank 1": {143},
    "a worker": {1},
    "error in rank 1": {1},
}


@dataclass
class Outcome:
    codes: list[int]  # of each process; minus the signal that ended it
    errors: str  # stderr of all


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0


def make_images(root: Path) -> None:
    """32 training and 8 validation images of each of the digits 0, 1 and 2."""
    digits = load_digits()
    for digit in range(3):
        for number, image in enumerate(digits.images[digits.target == digit][:40]):
            folder = root / ("train" if number < 32 else "val") / f"digit-{digit}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(folder / f"{number}.png")


def die_in_call(way: str, number: int) -> None:
    """Kills this process in the number-th call: in the middle of what it writes, or when the call is done."""
    owner, name = CALLS[way]
    function, counted = getattr(owner, name), 0

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal counted
        counted += 1
        if counted < number:
            return function(*args, **kwargs)
        if way == "writing":
            target, data = args
            function(target, bytes(data)[: len(bytes(data)) // 2])
            target.flush()
        elif random.random() < 0.5:
            function(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, counting)


def no_picture(path: Path, history: object, teacher_top1: object) -> None:
    """In place of the curves, whose drawing takes as long as the training."""
    files.write_atomically(path, lambda file: file.write(b""))


def fail_in_step(number: int) -> None:
    step, counted = Trainer._gradients, 0

    def failing(*args: object) -> object:
        nonlocal counted
        counted += 1
        if counted == number:
            raise RuntimeError("an error in the middle of a step")
        return step(*args)

    Trainer._gradients = failing


def started(size: int, arguments: list[str], errors: Path, prepare: Callable[[int], None]) -> list[int]:
    """The numbers of `size` processes that train together; `prepare(rank)` is called in each before."""
    port, processes = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child:
            processes.append(child)
            continue
        code = 99
        try:
            os.setpgid(0, 0)
            with errors.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if size > 1:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            prepare(rank)
            code = cli.main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return processes


def ended(processes: list[int]) -> list[int]:
    """Waits for the processes. Their exit codes, 999 for one that hangs."""
    codes, until = [], time.monotonic() + PATIENCE
    for process in processes:
        while (status := os.waitpid(process, os.WNOHANG))[0] == 0 and time.monotonic() < until:
            time.sleep(0.01)
        if status[0] == 0:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        codes.append(os.waitstatus_to_exitcode(status[1]) if status[0] else 999)
    return codes


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def content(weights: Path) -> dict[str, bytes]:
    """Of a safetensors file, by name: every byte of each tensor."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(weights).items()}


def children_of(process: int) -> list[int]:
    try:
        return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


class Setup:
    """The runs of one of SETUPS, in folders below root."""

    def __init__(self, name: str, root: Path, data: Path) -> None:
        self.name = name
        self.size, workers, self.ways = SETUPS[name]
        self.root = root / name.replace(" ", "-")
        self.root.mkdir()
        self.config = self.root / "small.yaml"
        self.config.write_text(CONFIG.format(data=data, workers=workers))
        self.runs = 0
        begun = time.monotonic()
        self.whole = self.root / "whole"
        outcome = self.attempt(self.whole, "none", 1.0)
        assert outcome.codes == [0] * self.size, outcome.errors
        self.seconds = time.monotonic() - begun
        print(f"{name}: {self.seconds:.1f} seconds", file=sys.stderr, flush=True)

    def attempt(self, folder: Path, way: str, moment: float) -> Outcome:
        """Starts or resumes the run in folder, and ends it in that way: at that share of its time, or of its calls."""
        errors = self.root / "errors.txt"
        errors.write_text("")

        def prepare(rank: int) -> None:
            reporting.write_curves = no_picture
            random.seed(moment)
            if way in CALLS:
                die_in_call(way, 1 + int(moment * 40))
            if way == "error in rank 1" and rank == 1:
                fail_in_step(1 + int(moment * 15))

        arguments = ["train", "--config", str(self.config), "--output", str(folder), "--resume", "auto"]
        processes = started(self.size, arguments, errors, prepare)
        if way not in (*CALLS, "none", "error in rank 1"):
            if self.size > 1:  # before they are connected, one that is lost is the launcher's to tell of
                until = time.monotonic() + PATIENCE
                while "run folder" not in errors.read_text() and time.monotonic() < until:
                    time.sleep(0.01)
            time.sleep(moment * self.seconds)
            self.strike(processes, way)
        return Outcome(ended(processes), errors.read_text())

    def strike(self, processes: list[int], way: str) -> None:
        number = signal.SIGTERM if way.startswith("SIGTERM") else signal.SIGKILL
        try:
            if way == "SIGTERM to all":
                for _ in range(2):  # as `timeout` does: to the process, then to its group
                    os.killpg(processes[0], number)
            elif way == "a worker":
                workers = children_of(processes[0])
                if workers:
                    os.kill(random.choice(workers), number)
            else:
                os.kill(processes[1 if way.endswith("rank 1") else 0], number)
        except ProcessLookupError:
            pass

    def run(self, ways: list[tuple[str, float]], tally: Tally) -> None:
        """Takes ways from the list until the run comes to its end; then compares. Raises AssertionError."""
        self.runs += 1
        folder = self.root / f"run-{self.runs}"
        outcome = Outcome([1], "")
        while any(outcome.codes):
            way, moment = ways.pop() if ways else ("none", 1.0)
            outcome = self.attempt(folder, way, moment)
            told = f"{self.name}, {way} at {moment:.3f}: {outcome.codes}\n{outcome.errors}"
            assert "Traceback" not in outcome.errors and 999 not in outcome.codes, told
            if not any(outcome.codes):
                break
            tally.kills[f"{self.name}: {way}"] += 1
            print(f"{tally.kills.total()} {self.name}: {way} at {moment:.3f}", file=sys.stderr, flush=True)
            self.check_words(way, outcome, told)
        for name in WEIGHTS:
            assert content(folder / name) == content(self.whole / name), f"{self.name}: {name} differs"
        assert not list(folder.rglob("*.tmp")) and not (folder / "run.lock").exists(), list(folder.rglob("*"))
        tally.runs += 1

    def check_words(self, way: str, outcome: Outcome, told: str) -> None:
        said = [line for line in outcome.errors.splitlines() if line.startswith("fastdeit train: ")]
        if -signal.SIGTERM in outcome.codes and way.startswith("SIGTERM"):  # before it began to train
            assert self.size == 1 or (len(said) == 1 and "is gone" in said[0]), told
        elif way in IN_WORDS:
            assert set(outcome.codes) == IN_WORDS[way] and len(said) == 1, told
        elif self.size > 1:  # the one that is left
            assert sorted(outcome.codes) == [-signal.SIGKILL, 1] and len(said) == 1 and "is gone" in said[0], told
        else:
            assert outcome.codes == [-signal.SIGKILL] and not said, told


def main(kills: int, seed: int, folder: Path) -> Tally:
    make_images(folder / "images")
    setups = [Setup(name, folder, folder / "images") for name in SETUPS]
    tally, generator = Tally(), random.Random(seed)
    while tally.kills.total() < kills:
        for setup in setups:  # three ways at a time, so that few of them show something of every setup
            chosen = generator.sample(setup.ways, 3)
            moments = [generator.random() ** 1.5 for _ in chosen]  # rather early, so that a run is ended several times
            setup.run([*zip(chosen, moments, strict=True)], tally)
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a child has no thread but the one that forked it
    with tempfile.TemporaryDirectory() as place:
        found = main(options.kills, options.seed, Path(place))
    print(
        json.dumps(
            {"kills": found.kills.total(), "runs": found.runs, "ways": dict(sorted(found.kills.items()))}, indent=1
        )
    )
