"""Losses as they come: their sum, whether all are finite, and whether any process was asked to stop. No step waits for the GPU."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit.train.distributed import World


class NonFiniteLossError(ArithmeticError):
    """The loss of update `step` became NaN or infinite; the weights are those before that step."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class _Noted(NamedTuple):
    step: int
    epoch: int
    values: Tensor  # on the host: of each process whether its loss was bad; how many are to stop; the mean loss of all
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
        values = torch.zeros(self.world.size + 2, dtype=torch.float64, device=self.device)
        values[self.world.rank] = ~torch.isfinite(loss)
        values[-2].fill_(float(stop))
        values[-1] = loss / self.world.size
        self.world.sum(values)
        bad = values[:-2].sum() > 0
        self.total += torch.where(bad, 0.0, values[-1])  # as if the step had not been
        arrived = None
        if self.device.type == "cuda":
            values = torch.empty(len(values), dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.noted = _Noted(step, epoch, values, arrived)
        if not self.deferred:
            self.check()
        return bad.float()

    def clean(self) -> bool:
        """Whether what was noted last is finite. A process that asks this alone leaves the verdict for all to see together."""
        if self.noted is None:
            return True
        if self.noted.arrived is not None:
            self.noted.arrived.synchronize()
        return not any(self.noted.values[:-2].tolist())

    def check(self) -> None:
        """Reads what was noted last. Raises NonFiniteLossError if it is bad."""
        if self.noted is None:
            return
        (step, epoch, values, arrived), self.noted = self.noted, None
        if arrived is not None:
            arrived.synchronize()
        *bad, stop, loss = values.tolist()
        if any(bad):
            ranks = ", ".join(str(rank) for rank, flag in enumerate(bad) if flag)
            where = f" on rank {ranks}" if self.world.size > 1 else ""
            raise NonFiniteLossError(
                f"the loss is {loss}{where} at step {step} (epoch {epoch}); the last finite one was {self.last_finite:.6g}. "
                "The update was not made",
                step,
            )
        self.last_finite = loss
        self.stop = self.stop or bool(stop)

    def mean(self, steps: int) -> float:
        """Of all processes' losses since the last reset, over so many steps."""
        return float(self.total) / steps

    def reset(self, total: float = 0.0) -> None:
        self.total.fill_(total)
