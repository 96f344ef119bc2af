"""vit-pytorch's wrapper for distillation, its loss in one pass over the logits."""

from typing import Any

import torch
from torch import Tensor
from vit_pytorch import distill

from fastdeit import ops
from fastdeit.blocks.call_rules import why_global_hook, why_not_plain_call
from fastdeit.blocks.checklist import why_replaced
from fastdeit.blocks.fused_module import FusedModule
from fastdeit.blocks.snapshot import register_methods
from fastdeit.ops.distillation_cross_entropy_op import why_reference

register_methods(distill.DistillWrapper, "forward", host=True)


class DistillWrapper(FusedModule, distill.DistillWrapper, source=distill.DistillWrapper):
    """vit_pytorch.distill.DistillWrapper with vit-pytorch's constructor.

        (1 - alpha) * CE(class head, labels) + alpha * (CE(distillation head, argmax(teacher)) or T^2 KL(teacher || student))

    by `ops.distillation_cross_entropy`, with labels as class indices or as probabilities. A label outside the classes, -100
    included, makes the loss NaN. Teacher, student and heads are called as they are. `forward` returns the mean over the batch.
    """

    def why_not_fused(self, img: Tensor, *_: Any) -> str | None:
        """Why `forward` would run vit-pytorch's loss, None if it would run the kernel."""
        reason = why_replaced(distill.DistillWrapper) or why_not_plain_call(img) or why_global_hook()
        return reason or why_reference(img)

    def forward(
        self, img: Tensor, labels: Tensor, temperature: float | None = None, alpha: float | None = None, **kwargs: Any
    ) -> Tensor:
        weight = self.alpha if alpha is None else alpha
        tau = self.temperature if temperature is None else temperature
        if not isinstance(self, DistillWrapper) or self.why_not_fused(img) or not (0 <= weight <= 1 and tau > 0):
            return distill.DistillWrapper.forward(self, img, labels, temperature, alpha, **kwargs)
        with torch.no_grad():
            teacher = self.teacher(img)
        logits, token = self.student(img, distill_token=self.distillation_token, **kwargs)
        other, kind = self.distill_mlp(token), "hard" if self.hard else "soft"
        return ops.distillation_cross_entropy(
            logits, other, labels, teacher, kind=kind, alpha=weight, tau=tau, soft_divisor="batch"
        )
