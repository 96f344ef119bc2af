"""Loss and top-1 over a data set, which the processes of a run share among themselves."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fastdeit.train.config import Config
from fastdeit.train.device import autocast
from fastdeit.train.distributed import SINGLE, World
from fastdeit.train.models import head_logits


class EvaluationStopped(Exception):
    """A process was asked to stop in the middle of an evaluation; all processes leave it together."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    config: Config,
    device: torch.device,
    world: World = SINGLE,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Cross-entropy (`loss`) of the model's prediction and top-1 in percent by readout, over every image of all loaders.

    The model's prediction is the last readout: both heads together for a distilled model.

    Args:
        loader: of this process's share of the images. Shares may differ in size: images are counted, none twice.
        stop_requested: whether this process is to stop; asked after each batch.

    Raises:
        EvaluationStopped: one of the processes was to stop.
    """
    was_training = model.training
    model.eval()
    seen, loss = 0, torch.zeros((), dtype=torch.float64, device=device)
    correct: dict[str, Tensor] = {}
    for images, classes in loader:
        images, classes = images.to(device, non_blocking=True), classes.to(device, non_blocking=True)
        with autocast(config, device):
            readouts = head_logits(model, images)
        for name, logits in readouts.items():
            correct[name] = correct.get(name, 0) + (logits.argmax(1) == classes).sum().double()
        loss += F.cross_entropy(logits.float(), classes, reduction="sum").double()
        seen += len(images)
        if stop_requested():
            break
    model.train(was_training)
    if world.sum(torch.tensor(float(stop_requested()), device=device)) > 0:
        raise EvaluationStopped
    if world.size > 1:
        names = world.agreed(list(correct))  # a process without images has counted nothing
        counts = [correct.get(name, torch.zeros_like(loss)) for name in names]
        seen, loss, *counts = world.sum(torch.stack([loss.new_tensor(seen), loss, *counts])).tolist()
        correct = dict(zip(names, counts, strict=True))
    return {"loss": float(loss) / seen, **{name: 100 * float(n) / seen for name, n in correct.items()}}
