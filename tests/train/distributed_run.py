"""A process of several: `torchrun ... distributed_run.py JOBS.json`, a list of [FOLDER, CONFIG, WHAT] done one after another.

WHAT is train; or diverge, gradient or stop, where one process has a loss or a gradient that is not finite, or is asked to stop.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from fastdeit.train import epoch_results, evaluation, run
from fastdeit.train.config import config_from
from fastdeit.train.distributed import World, joined, started_world
from fastdeit.train.engine import Trainer
from fastdeit.train.monitor import NonFiniteLossError
from fastdeit.train.signals import Stopped


def do(folder: Path, config: dict, what: str, world: World) -> str:
    """What became of it: digests of the models that were evaluated, or the error."""
    train_step = Trainer._train_step

    def step(trainer, epoch, images, classes):
        if trainer.step == 4 and trainer.world.rank == 1 and trainer.config.model.startswith("deit"):
            if what == "diverge":
                images = images.float() * float("nan")
            if what == "gradient":
                parameter = next(trainer.model.parameters())
                parameter.register_hook(lambda gradient: gradient * float("inf"))
            if what == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer, epoch, images, classes)

    report, digests = evaluation.evaluate, []

    def evaluate(model, *args):
        digests.append(sum(t.double().sum().item() for t in model.state_dict().values()))
        return report(model, *args)

    Trainer._train_step, run.evaluate, epoch_results.evaluate = step, evaluate, evaluate
    try:
        run.train(config_from(config), folder, resume=True, world=world)
    except (NonFiniteLossError, Stopped) as error:
        return str(error)
    finally:
        Trainer._train_step, run.evaluate, epoch_results.evaluate = train_step, report, report
    return f"trained {digests}"


def main(jobs: str) -> int:
    world = started_world()
    with joined(world, "cpu"):
        for folder, config, what in json.loads(Path(jobs).read_text()):
            Path(folder, f"rank-{world.rank}.txt").write_text(do(Path(folder), config, what, world))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    # Without the interpreter's end, in which threads of a destroyed process group have aborted the process.
    os._exit(code)
