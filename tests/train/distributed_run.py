"""A process of several: `torchrun ... distributed_run.py FOLDER CONFIG.json WHAT`, WHAT being train, diverge or stop."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from fastdeit.train import run
from fastdeit.train.config import config_from
from fastdeit.train.distributed import joined, started_world
from fastdeit.train.engine import Trainer
from fastdeit.train.monitor import NonFiniteLossError
from fastdeit.train.signals import Stopped


def main(folder: str, config: str, what: str) -> int:
    train_step = Trainer._train_step

    def step(trainer, epoch, images, classes):
        if trainer.step == 4 and trainer.world.rank == 1 and trainer.config.model.startswith("deit"):
            if what == "diverge":
                images = images.float() * float("nan")
            if what == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer, epoch, images, classes)

    report, digests = run.evaluate, []

    def evaluate(model, *args):
        digests.append(sum(t.double().sum().item() for t in model.state_dict().values()))
        return report(model, *args)

    Trainer._train_step, run.evaluate = step, evaluate
    world, outcome = started_world(), ""
    with joined(world, "cpu"):
        try:
            run.train(config_from(json.loads(Path(config).read_text())), Path(folder), resume=True, world=world)
        except (NonFiniteLossError, Stopped) as error:
            outcome = str(error)
    Path(folder, f"rank-{world.rank}.txt").write_text(outcome or f"trained {digests}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(
        code
    )  # without the interpreter's end, in which threads of a destroyed process group have aborted the process
