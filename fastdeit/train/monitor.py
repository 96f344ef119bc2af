"""Monitors losses: their sum, whether all and their gradients are finite, and whether any process was asked to stop.

No step waits for the GPU.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit.train.distributed import World


class NonFiniteLossError(ArithmeticError):
    """The loss of update `step` or its gradient became NaN or infinite; that update was not made."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class NonFiniteWeightsError(NonFiniteLossError):
    """After `step` updates a weight, its moving average or its optimizer's state is not finite, though all losses were."""


LOSS, GRADIENT = 1, 2  # what of a process is not finite


class _Noted(NamedTuple):
    step: int
    epoch: int
    values: Tensor  # on the host: of each process 0, LOSS or GRADIENT; how many are to stop; the mean loss of all
    arrived: "torch.cuda.Event | None"


class LossMonitor:
    """Every process notes its loss of a step, and all see the same verdict: on a CPU at once, on a GPU when the next step is there.

    Args:
        device: of the losses.
        world: the processes.
        deferred: read a verdict one step later. What updates the weights must then heed `bad` on the device.

    Attributes:
        bad: float32, on the device: 1 from the first loss or gradient on that was not finite in any process, so that steps which
            are already under way when the host learns of it change nothing; 0 before.
    """

    def __init__(self, device: torch.device, world: World, deferred: bool) -> None:
        self.device = device
        self.world = world
        self.deferred = deferred
        self.last_finite = math.nan
        self.stop = False
        self.bad = torch.zeros((), device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.asked = torch.zeros((), dtype=torch.float64, device=device)
        self.noted: _Noted | None = None

    def ask(self, stop: bool) -> None:
        """Whether this process is to stop goes round with its next loss."""
        self.asked.fill_(float(stop))

    def judge(self, loss: Tensor, gradients: Sequence[Tensor] = ()) -> Tensor:
        """What `note` takes down of a step's loss and its gradients, the same in all processes. Never waits for the device."""
        loss = loss.detach().double()
        values = torch.zeros(self.world.size + 2, dtype=torch.float64, device=self.device)
        values[self.world.rank] = torch.where(
            torch.isfinite(loss), GRADIENT * (1 - all_finite(gradients, self.device)), LOSS
        )
        values[-2] = self.asked
        values[-1] = loss / self.world.size
        self.world.sum(values)
        self.bad.copy_(torch.maximum(self.bad, (values[:-2].sum() > 0).float()))
        self.total += torch.where(self.bad > 0, 0.0, values[-1])  # as if the step had not been
        return values

    def note(self, values: Tensor, step: int, epoch: int) -> None:
        """Takes down what `judge` gave.

        Raises:
            NonFiniteLossError: this one's verdict, or if deferred the one before it, is bad.
        """
        if self.deferred:
            self.check()
        arrived = None
        if self.device.type == "cuda":
            values = torch.empty(len(values), dtype=torch.float64, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.noted = _Noted(step, epoch, values, arrived)
        if not self.deferred:
            self.check()

    def clean(self) -> bool:
        """Whether what was noted last is finite. A process that asks this alone leaves the verdict for all to see together."""
        if self.noted is None:
            return True
        if self.noted.arrived is not None:
            self.noted.arrived.synchronize()
        return not any(self.noted.values[:-2].tolist())

    def check(self) -> None:
        """Reads what was noted last. Raises NonFiniteLossError that says what is bad, and in which process."""
        if self.noted is None:
            return
        (step, epoch, values, arrived), self.noted = self.noted, None
        if arrived is not None:
            arrived.synchronize()
        *bad, stop, loss = values.tolist()
        if any(bad):
            what, kind = f"the loss is {loss}", LOSS
            if (
                LOSS not in bad
            ):  # processes have exchanged gradients, so that one process's bad loss makes those of all bad
                what, kind = f"the loss is {loss:.6g}, but its gradient is not finite", GRADIENT
            ranks = ", ".join(str(rank) for rank, flag in enumerate(bad) if flag == kind)
            where = f" on rank {ranks}" if self.world.size > 1 else ""
            raise NonFiniteLossError(
                f"{what}{where} at step {step} (epoch {epoch}); the last finite one was {self.last_finite:.6g}. The update was "
                "not made",
                step,
            )
        self.last_finite = loss
        self.stop = self.stop or bool(stop)

    def forget(self, step: int) -> None:
        """Drops the record of a step that is undone."""
        if self.noted is not None and self.noted.step >= step:
            self.noted = None

    def mean(self, steps: int) -> float:
        """The mean of all processes' losses since the last reset, over so many steps."""
        return float(self.total) / steps

    def reset(self, total: float = 0.0) -> None:
        self.total.fill_(total)
        self.bad.zero_()


def all_finite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """float64, on the device: 1 if there is neither NaN nor infinity in any of the tensors, else 0. Never waits for the device.

    That is asked of the sum of each tensor; on a GPU of the sum of magnitudes in fp32, which takes two launches for them all.
    """
    if not tensors:
        return torch.ones((), dtype=torch.float64, device=device)
    if device.type == "cpu":
        sums = [tensor.sum(dtype=torch.float64) for tensor in tensors]
    else:
        sums = torch._foreach_norm(list(tensors), 1, dtype=torch.float32)
    return torch.stack(sums).isfinite().all().double()
