"""Runs that are killed at a given point, each a process forked from this one, which has imported all that they need.

Reads lines of JSON, [FOLDER, CONFIG, POINT], and answers each with a line: the exit code, or minus the signal that ended the run.
POINT is `step:N`, before the N-th step that this process takes; `write:N`, within the N-th file that it writes, when the new
content is on disk under its temporary name; or `term:N`, asked by SIGTERM to stop before the N-th step.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from fastdeit.train import run
from fastdeit.train.config import config_from
from fastdeit.train.engine import Trainer
from fastdeit.train.signals import Stopped


def killed(folder: str, config: dict, point: str) -> int:
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

    Trainer._train_step, os.fsync = step, written
    try:
        run.train(config_from(config), Path(folder), resume=True)
    except Stopped as stopped:
        return stopped.exit_code
    return 0


def forked(*job) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(2, 1)  # what a run prints is no answer
            code = killed(*job)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)  # a child has no thread but the one that forked it
    for line in sys.stdin:
        print(forked(*json.loads(line)), flush=True)
