"""Losses for training DeiT: DistillationLoss as facebookresearch/deit calls it, and DistillationCrossEntropy on given logits."""

from typing import Any

import timm.loss
import torch
from torch import Tensor, nn

from fastdeit.ops.distillation_arguments import KINDS, Options, check_options
from fastdeit.ops.distillation_cross_entropy_op import distillation_cross_entropy

__all__ = ["DistillationCrossEntropy", "DistillationLoss"]


class DistillationCrossEntropy(nn.Module):
    """`fastdeit.ops.distillation_cross_entropy` as a module, for teacher logits or labels already in hand.

    Args:
        kind: as the op's.
        alpha: as the op's.
        tau: as the op's.
        label_smoothing: as the op's.
        reduction: as the op's.
        base: as the op's.
        soft_divisor: as the op's.
        check_indices: as the op's.

    Raises:
        TypeError, ValueError: as the op for its options.
    """

    def __init__(
        self,
        kind: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        *,
        base: str = "cross_entropy",
        soft_divisor: str = "numel",
        check_indices: bool = False,
    ) -> None:
        super().__init__()
        check_options(Options(kind, base, alpha, tau, label_smoothing, soft_divisor, reduction))
        self.kind = kind
        self.alpha = alpha
        self.tau = tau
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.base = base
        self.soft_divisor = soft_divisor
        self.check_indices = check_indices

    def forward(
        self, outputs: Tensor | tuple[Tensor, Tensor], target: Tensor | None, teacher: Tensor | None = None
    ) -> Tensor:
        """The loss of outputs, a (class, distillation) pair of (B, C) logits or one tensor for both.

        Args:
            outputs: the student's. Of a pair, kind "none" takes the first and base "none" the second.
            target: (B,) class indices or (B, C) soft targets; None with base "none".
            teacher: (B, C) logits or (B,) class indices; None with kind "none".
        """
        logits, dist_logits = _pair(outputs, alone_gives_both=True)
        return distillation_cross_entropy(
            None if self.base == "none" else logits,
            None if self.kind == "none" else dist_logits,
            target,
            teacher,
            kind=self.kind,
            alpha=self.alpha,
            tau=self.tau,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            base=self.base,
            soft_divisor=self.soft_divisor,
            check_indices=self.check_indices,
        )

    def extra_repr(self) -> str:
        return (
            f"kind={self.kind!r}, alpha={self.alpha}, tau={self.tau}, label_smoothing={self.label_smoothing}, "
            f"reduction={self.reduction!r}, base={self.base!r}, soft_divisor={self.soft_divisor!r}"
        )


class DistillationLoss(nn.Module):
    """A criterion on the class head plus distillation from a teacher: facebookresearch/deit's class, fused.

        loss = (1 - alpha) * base_criterion(class output, labels) + alpha * distillation(distillation output, teacher(inputs))

    The criteria of DeiT training (timm's SoftTargetCrossEntropy, LabelSmoothingCrossEntropy and BinaryCrossEntropy, PyTorch's
    CrossEntropyLoss and BCEWithLogitsLoss) run inside the fused loss where their options allow. Any other criterion, or one with
    class weights, a positive weight, ignore_index, another reduction, a threshold or hooks, is called as it is; then the
    distillation term alone is fused.

    A class index out of range makes a fused loss NaN on a GPU and raises IndexError on a CPU. So does -100, which CrossEntropyLoss
    ignores by default: labels that use it need a criterion called as it is, for which a function around CrossEntropyLoss will do.

    The teacher is kept in eval mode and runs without gradient, under the autocast of the caller.

    Args:
        base_criterion: called as (class output, labels).
        teacher_model: called as (inputs); returns (B, C) logits. May be None with distillation_type "none".
        distillation_type: "none", "soft" or "hard".
        alpha: the weight of the distillation term, in [0, 1].
        tau: the temperature of soft distillation, > 0.
        check_indices: raise IndexError for labels out of range on a GPU too, which makes each call wait for it.

    Raises:
        TypeError: the criterion or the teacher cannot be called, or alpha or tau is no number.
        ValueError: distillation_type is unknown, alpha or tau is out of range, or the teacher is missing.
    """

    def __init__(
        self,
        base_criterion: nn.Module,
        teacher_model: nn.Module | None,
        distillation_type: str,
        alpha: float,
        tau: float,
        *,
        check_indices: bool = False,
    ) -> None:
        super().__init__()
        if distillation_type not in KINDS:
            raise ValueError(f"distillation_type: expected one of {', '.join(KINDS)}, got {distillation_type!r}")
        if distillation_type != "none" and teacher_model is None:
            raise ValueError(f"teacher_model: expected a model with distillation_type {distillation_type!r}, got None")
        for name, called in (("base_criterion", base_criterion), ("teacher_model", teacher_model)):
            if not callable(called) and not (name == "teacher_model" and called is None):
                raise TypeError(f"{name}: expected a module or function, got {type(called).__name__}")
        check_options(Options("hard", "cross_entropy", alpha, tau, 0.0, "numel", "mean"))
        self.base_criterion = base_criterion
        self.teacher_model = teacher_model
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau
        self.check_indices = check_indices
        self.train(self.training)

    def train(self, mode: bool = True) -> "DistillationLoss":
        super().train(mode)
        if isinstance(self.teacher_model, nn.Module):
            self.teacher_model.eval()
        return self

    def forward(self, inputs: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            inputs: what the teacher sees: the student's own images, after augmentation and mixup.
            outputs: (B, C) logits, or a (class, distillation) pair of them.
            labels: what the base criterion takes: (B,) class indices or (B, C) soft targets.

        Raises:
            TypeError: outputs is neither a tensor nor a pair of tensors.
            ValueError: outputs is a single tensor and distillation is on, or has not two parts.
        """
        outputs, dist_outputs = _pair(outputs)
        distils = self.distillation_type != "none"
        if distils and dist_outputs is None:
            raise ValueError(
                "outputs: with knowledge distillation on, the model must return a pair, the outputs of the class token and of the "
                "distillation token; got one tensor (timm: model.set_distilled_training(True), and train mode)"
            )
        base = _fusible_base(self.base_criterion, outputs, labels)
        if not distils and base is None:
            return self.base_criterion(outputs, labels)

        options: dict[str, Any] = dict(kind=self.distillation_type, tau=self.tau, check_indices=self.check_indices)
        if not distils:
            return distillation_cross_entropy(outputs, None, labels, None, **options, **base)
        if base is not None:
            teacher = self._teach(inputs)
            return distillation_cross_entropy(
                outputs, dist_outputs, labels, teacher, alpha=self.alpha, **options, **base
            )
        base_loss = self.base_criterion(outputs, labels)
        dist_loss = distillation_cross_entropy(None, dist_outputs, None, self._teach(inputs), base="none", **options)
        return base_loss * (1 - self.alpha) + dist_loss * self.alpha

    @torch.no_grad()
    def _teach(self, inputs: Tensor) -> Tensor:
        return self.teacher_model(inputs)

    def extra_repr(self) -> str:
        return f"distillation_type={self.distillation_type!r}, alpha={self.alpha}, tau={self.tau}"


def _pair(outputs: Any, alone_gives_both: bool = False) -> tuple[Tensor, Tensor | None]:
    """The two tensors of outputs; for a single tensor the pair of it and None, or it twice."""
    if isinstance(outputs, Tensor):
        return outputs, outputs if alone_gives_both else None
    expected = "expected a (B, C) tensor or a pair of them, of the class token and of the distillation token"
    if not isinstance(outputs, tuple | list):
        raise TypeError(f"outputs: {expected}, got {type(outputs).__name__}")
    if len(outputs) != 2:
        raise ValueError(f"outputs: {expected}, got {len(outputs)} outputs")
    for output, allowed in zip(outputs, (Tensor, Tensor | None), strict=True):
        if not isinstance(output, allowed):
            raise TypeError(f"outputs: {expected}, got a pair with {type(output).__name__}")
    return outputs[0], outputs[1]


def _fusible_base(criterion: nn.Module, outputs: Tensor, labels: Tensor) -> dict[str, Any] | None:
    """The op's options that mean what criterion(outputs, labels) computes, or None where criterion itself must be called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if (
        not isinstance(criterion, nn.Module)
        or "forward" in vars(criterion)
        or any(getattr(criterion, h) for h in hooks)
    ):
        return None
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):  # a criterion's own kind of labels
        return None
    if outputs.dim() != 2 or labels.requires_grad:
        return None
    soft = labels.is_floating_point() and labels.shape == outputs.shape
    indices = labels.dtype == torch.int64 and labels.shape == outputs.shape[:1]
    if not (soft or indices):
        return None
    cross_entropy = dict(base="cross_entropy")
    binary = dict(base="binary_cross_entropy")
    kind = type(criterion)
    if kind is timm.loss.SoftTargetCrossEntropy:
        return cross_entropy if soft else None
    if kind is timm.loss.LabelSmoothingCrossEntropy:
        return dict(cross_entropy, label_smoothing=criterion.smoothing) if indices else None
    if kind is nn.CrossEntropyLoss:
        plain = criterion.weight is None and criterion.ignore_index == -100 and criterion.reduction == "mean"
        if not plain or (soft and criterion.label_smoothing):
            return None
        return dict(cross_entropy, label_smoothing=criterion.label_smoothing) if criterion.label_smoothing < 1 else None
    if kind is nn.BCEWithLogitsLoss:
        plain = criterion.weight is None and criterion.pos_weight is None and criterion.reduction == "mean"
        return binary if plain and soft else None
    if kind is timm.loss.BinaryCrossEntropy:
        plain = criterion.weight is None and criterion.pos_weight is None and criterion.reduction == "mean"
        smooths = criterion.smoothing > 0 and (indices or criterion.smooth_dense)
        return binary if plain and criterion.target_threshold is None and not smooths else None
    return None
