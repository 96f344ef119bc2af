"""Effects of distillation on a student: disagreement between its heads and its teacher, and cosine similarity of its two tokens."""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.train.config import Config
from fastdeit.train.device import autocast
from fastdeit.train.models import has_distillation_head, head_logits

TRUTH, TEACHER = "ground truth", "teacher"


@torch.no_grad()
def disagreement(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    config: Config,
    device: torch.device,
) -> dict[tuple[str, str], float]:
    """The share of images, 0 to 1, that two classifiers put into different classes: Table 4 of the DeiT paper.

    Args:
        model: the student; its readouts are classifiers of their own.
        teacher: or None.
        batches: of images (B, C, H, W) and classes (B,).

    Returns:
        For every pair of the ground truth, the teacher and the student's readouts, in that order.
    """
    training = {module: module.training for module in (model, teacher) if module is not None}
    for module in training:
        module.eval()
    different: dict[tuple[str, str], int] = {}
    seen = 0
    for images, classes in batches:
        images = images.to(device)
        with autocast(config, device):
            decisions = {TRUTH: classes.to(device)}
            if teacher is not None:
                decisions[TEACHER] = teacher(images).argmax(1)
            decisions |= {name: logits.argmax(1) for name, logits in head_logits(model, images).items()}
        for pair in combinations(decisions, 2):
            different[pair] = different.get(pair, 0) + int((decisions[pair[0]] != decisions[pair[1]]).sum())
        seen += len(images)
    for module, mode in training.items():
        module.train(mode)
    return {pair: count / seen for pair, count in different.items()}


@torch.no_grad()
def token_cosines(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], config: Config, device: torch.device
) -> list[float]:
    """The cosine between class and distillation token, of the learned ones and then after each block, mean over images.

    The DeiT paper, section 4, reports 0.06 for the learned tokens of DeiT-B, rising through the blocks to 0.93.

    Raises:
        ValueError: the model has no distillation token.
    """
    if not has_distillation_head(model):
        raise ValueError(f"model: {type(model).__name__} has no distillation token to compare with the class token")
    was_training = model.training
    model.eval()
    total, seen = 0.0, 0
    for images, _ in batches:
        images = images.to(device)
        with autocast(config, device):
            blocks = model.forward_intermediates(images, return_prefix_tokens=True, intermediates_only=True)
        # (blocks, B): forward_intermediates gives pairs of spatial tokens and prefix tokens (B, 2, C)
        cosines = torch.stack([F.cosine_similarity(p[:, 0].float(), p[:, 1].float(), dim=-1) for _, p in blocks])
        total = total + cosines.double().sum(1)
        seen += len(images)
    model.train(was_training)
    learned = F.cosine_similarity(model.cls_token.flatten().float(), model.dist_token.flatten().float(), dim=0)
    return [learned.item(), *(total / seen).tolist()]


def matrix(pairs: dict[tuple[str, str], float]) -> tuple[list[str], list[list[float]]]:
    """The names and the symmetric matrix of what `disagreement` returned, zero on the diagonal."""
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    found: dict[Any, float] = {**pairs, **{(b, a): value for (a, b), value in pairs.items()}}
    return names, [[found.get((a, b), 0.0) for b in names] for a in names]
