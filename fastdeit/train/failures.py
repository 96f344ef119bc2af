"""The message about a run that ended early: the cause, what is saved, how to continue."""

import contextlib
import traceback
from pathlib import Path
from typing import Any

import torch

from fastdeit.train.distributed import World
from fastdeit.train.transform_errors import TransformError

ERROR = "error.txt"  # in a run's folder: the traceback of an error that nobody expected
_PACKAGE = str(Path(__file__).parent.parent)


class RunFailedError(RuntimeError):
    """A run ended by an error; the message says all that a user needs."""


def cause(error: BaseException) -> str:
    """An error in one line: as it is where fastdeit raised it on purpose, else with its type and the place."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        less = "a smaller batch_size, more grad_accum_steps, memory lean or grad_checkpointing take less"
        return f"the GPU's memory is used up ({text.partition('. ')[0]}); {less}"
    if isinstance(error, MemoryError):
        return f"the memory is used up ({text or 'MemoryError'}); fewer workers and a smaller batch_size take less"
    return text if expected(error) else f"{type(error).__name__}: {text}{_place(error)}"


def expected(error: BaseException) -> bool:
    """Whether fastdeit raised it, so that the message is for people."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_here = not frames or frames[-1].filename.startswith(_PACKAGE)
    kinds = (ValueError, OSError, ArithmeticError, ImportError, TransformError)
    return isinstance(error, RunFailedError) or (raised_here and isinstance(error, kinds))


def patience(error: BaseException) -> float:
    """Seconds to wait for another process to say why it failed: some for an error of what processes do together, else none."""
    words = ("gloo", "nccl", "connection", "peer", "socket", "store", "timed out", "rank")
    together = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return 5.0 if together else 0.0


def known_cause(world: World, error: Exception) -> str:
    """Why a process of world cannot go on, in one line: the cause that another process reported before, else this error, which is
    then reported to the others."""
    known = world.peers.cause_within(patience(error)) if world.peers is not None else None
    text = known or cause(error)
    if world.peers is not None and known is None:
        world.peers.tell(text)
    return text


def write_traceback(folder: Path, error: BaseException) -> str:
    """Keeps the traceback of an error that was not expected in folder; returns where, in words, or nothing."""
    if expected(error):
        return ""
    with contextlib.suppress(OSError):
        (folder / ERROR).write_text("".join(traceback.format_exception(error)))
        return f" (traceback: {folder / ERROR})"
    return ""


def device_failed(device: torch.device) -> bool:
    """Whether a device can no longer be used, so that nothing can be read from it."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _place(error: BaseException) -> str:
    frames: Any = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
