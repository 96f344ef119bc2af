"""A run that is killed at a given point: `python killed_run.py FOLDER CONFIG.json POINT`.

POINT is `step:N`, before the N-th step that this process takes; `write:N`, within the N-th file that it writes, when the new
content is on disk under its temporary name; or `term:N`, asked by SIGTERM to stop before the N-th step.
"""

import json
import os
import signal
import sys
from pathlib import Path

from fastdeit.train import checkpoints, run
from fastdeit.train.config import config_from
from fastdeit.train.engine import Trainer
from fastdeit.train.signals import Stopped


def main(folder: str, config: str, point: str) -> int:
    kind, _, number = point.partition(":")
    counted = 0

    def reached(here: str) -> bool:
        nonlocal counted
        counted += here == kind
        return here == kind and counted == int(number)

    train_step, fsync = Trainer._train_step, os.fsync

    def step(*args):
        if reached("step"):
            os.kill(os.getpid(), signal.SIGKILL)
        if reached("term"):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    def written(descriptor):
        fsync(descriptor)
        if reached("write"):
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._train_step, checkpoints.os.fsync = step, written
    try:
        run.train(config_from(json.loads(Path(config).read_text())), Path(folder), resume=True)
    except Stopped as stopped:
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
