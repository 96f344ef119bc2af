"""Losses as they come: their sum, whether all are finite, and whether any process was asked to stop. No step waits for the GPU."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit.train.distributed import World


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the weights are those before that step."""


class _Noted(NamedTuple):
    step: int
    epoch: int
    values: Tensor  # on the host: 1 + the last process whose loss was bad, or 0; whether to stop; this process's loss
    arrived: "torch.cuda.Event | None"


class LossMonitor:
    """Every process notes its loss of a step, and all see the same verdict: on a CPU at once, on a GPU when the next step is there.

    Args:
        device: of the losses.
        world: the processes.
        deferred: read a verdict one step later. What updates the weights must then heed `note`'s result on the device.
    """

    def __init__(self, device: torch.device, world: World, deferred: bool) -> None:
        self.device = device
        self.world = world
        self.deferred = deferred
        self.last_finite = math.nan
        self.stop = False
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.noted: _Noted | None = None

    def note(self, loss: Tensor, step: int, epoch: int, stop: bool) -> Tensor:
        """Takes down a step's loss; whether any process's is not finite comes back, as a float32 tensor of 0 or 1 on the device.

        Raises:
            NonFiniteLossError: this one's verdict, or if deferred the one before it, is bad.
        """
        if self.deferred:
            self.check()
        loss = loss.detach().double()
        bad = torch.where(torch.isfinite(loss), 0.0, self.world.rank + 1.0)
        flags = self.world.maximum(torch.stack([bad, torch.full_like(bad, float(stop))]))
        self.total += loss
        values = torch.cat([flags, loss[None]])
        arrived = None
        if self.device.type == "cuda":
            values = torch.empty(3, dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.noted = _Noted(step, epoch, values, arrived)
        if not self.deferred:
            self.check()
        return (flags[0] > 0).float()

    def check(self) -> None:
        """Reads what was noted last. Raises NonFiniteLossError if it is bad."""
        if self.noted is None:
            return
        (step, epoch, values, arrived), self.noted = self.noted, None
        if arrived is not None:
            arrived.synchronize()
        bad, stop, loss = values.tolist()
        if bad:
            where = f" on rank {int(bad) - 1}" if self.world.size > 1 else ""
            what = f"{loss}" if not math.isfinite(loss) else "not finite"
            raise NonFiniteLossError(
                f"the loss is {what}{where} at step {step} (epoch {epoch}); the last finite one was {self.last_finite:.6g}. "
                "The update was not made"
            )
        self.last_finite = loss
        self.stop = self.stop or bool(stop)

    def mean(self, steps: int) -> float:
        """Of all processes' losses since the last reset, over so many steps."""
        return float(self.world.sum(self.total.clone())) / (steps * self.world.size)

    def reset(self, total: float = 0.0) -> None:
        self.total.fill_(total)
