"""The confusion matrix of a model, and its most confident mistakes."""

import heapq
import io
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdeit.train.config import Config
from fastdeit.train.device import autocast
from fastdeit.train.models import head_logits


class Mistake(NamedTuple):
    """An image that was put into a wrong class."""

    confidence: float  # the probability of the wrong class
    position: int  # of the image in the data
    truth: int
    predicted: int
    image: Tensor  # (C, H, W), normalised, as the model got it


@torch.no_grad()
def confusion(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    config: Config,
    device: torch.device,
    keep: int = 24,
) -> tuple[Tensor, list[Mistake]]:
    """Counts of (true class, predicted class), and the most confident mistakes, the surest first.

    Args:
        model: its last readout is judged: of a distilled model both heads together.
        batches: of normalised images (B, C, H, W) and classes (B,).
        keep: how many mistakes.

    Returns:
        An int64 tensor (num_classes, num_classes) on the CPU, and at most keep mistakes.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    surest: list[Mistake] = []
    seen = 0
    for images, classes in batches:
        with autocast(config, device):
            logits = list(head_logits(model, images.to(device)).values())[-1]
        confidences, predicted = (t.cpu() for t in logits.float().softmax(1).max(1))
        counts.index_put_((classes, predicted), torch.ones_like(classes), accumulate=True)
        for i in (predicted != classes).nonzero().flatten().tolist():
            entry = (confidences[i].item(), seen + i, int(classes[i]), int(predicted[i]))
            surest.append(Mistake(*entry, images[i]))
        surest = heapq.nlargest(keep, surest, key=lambda mistake: (mistake.confidence, -mistake.position))
        seen += len(images)
    model.train(was_training)
    return counts, surest


def thumbnail(image: Tensor, config: Config) -> bytes:
    """A normalised image (C, H, W) of one or three channels as PNG, at most 160 pixels a side."""
    import numpy as np
    from PIL import Image

    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    levels = ((image.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    pixels = np.asarray(levels.permute(1, 2, 0).squeeze(2) if len(levels) == 1 else levels.permute(1, 2, 0))
    picture = Image.fromarray(pixels)
    picture.thumbnail((160, 160))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
