"""DeiT's distillation loss: cross-entropy of the class head, and the distillation head against the teacher, in one pass.

    loss_i = (1 - alpha) * base(logits_i, target_i) + alpha * distillation(dist_logits_i, teacher_i)

(Touvron et al. 2021, eq. 2 and 3.) Labels and teacher are constants: no gradient flows to them.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastdeit import backends
from fastdeit.cost import formulas as costs
from fastdeit.ops import launchers
from fastdeit.ops.distillation_arguments import Options, check_options, check_range, check_tensors
from fastdeit.ops.passed_calls import PassedCalls
from fastdeit.ops.registration import Op
from fastdeit.refusals import or_reference

_passed = PassedCalls(products=False)


@or_reference
def distillation_cross_entropy(
    logits: Tensor | None,
    dist_logits: Tensor | None,
    target: Tensor | None,
    teacher: Tensor | None,
    *,
    kind: str = "hard",
    alpha: float = 0.5,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    base: str = "cross_entropy",
    soft_divisor: str = "numel",
    check_indices: bool = False,
) -> Tensor:
    """The loss of a student with a class head and a distillation head.

    Per sample, the base term is one of
        cross_entropy         -sum_c t_c log softmax(logits)_c; label smoothing makes t_y = 1 - s + s/C and t_c = s/C elsewhere
        binary_cross_entropy  the mean over the classes of -t_c log sigmoid(logits_c) - (1 - t_c) log(1 - sigmoid(logits_c))
    and the distillation term, which is never smoothed, one of
        hard   -log softmax(dist_logits)_k, where k is the teacher's label or the first of its largest logits
        soft   tau^2 / C * KL(softmax(teacher / tau) || softmax(dist_logits / tau)), without the 1/C where soft_divisor is "batch"
    A class masked by a logit of -inf adds nothing where its probability in the target or the teacher is zero.

    Args:
        logits: (B, C), the class head, a float dtype, any strides. None with base "none".
        dist_logits: (B, C), the distillation head; it may be `logits` itself, for distillation without a token. None with kind
            "none".
        target: (B,) class indices of an integer dtype, or (B, C) floats, which need not sum to one. None with base "none".
        teacher: (B, C) logits of any float dtype or, for hard distillation, (B,) class indices. None with kind "none".
        kind: "none", "hard" or "soft".
        alpha: the weight of the distillation term, in [0, 1]. A term of weight zero counts as zero, even if it is not finite.
            With kind or base "none" the other term counts alone, unweighted.
        tau: the temperature of soft distillation, > 0.
        label_smoothing: in [0, 1), only with class indices and cross-entropy.
        reduction: "mean" or "sum" over the batch, or "none". The mean of an empty batch is NaN, as PyTorch's.
        base: "cross_entropy", "binary_cross_entropy" or "none".
        soft_divisor: "numel" divides the soft term by B * C as DeiT's code does, "batch" by B as `kl_div` with batchmean.
        check_indices: raise IndexError for a class index outside [0, C). That waits for the GPU, so it is for debugging. Without
            it such an index, -100 included, makes its sample's loss and gradient NaN; nothing outside the tensors is read. On a
            CPU, where the check costs nothing, it is always made, except in compiled graphs.

    Returns:
        The loss: a scalar, or (B,) for reduction "none". Its dtype is that of the logits and soft targets together, float32
        under autocast; it is computed in float32 at least by the kernels.

    Raises:
        TypeError: an argument is not a tensor of a dtype that is allowed.
        ValueError: shapes or devices disagree, an option is unknown or out of range, an argument is missing or superfluous for
            the kind and base chosen, or target or teacher requires a gradient.
        IndexError: see check_indices.
    """
    options = Options(kind, base, alpha, tau, label_smoothing, soft_divisor, reduction)
    head = dist_logits if logits is None else logits
    given = ((head, logits, dist_logits, target, teacher), *options)
    reason = None
    if not _passed.has(*given):
        check_options(options)
        check_tensors(logits, dist_logits, target, teacher, options)
        reason = why_reference(logits, dist_logits, target, teacher)
        if reason is None:
            _passed.add(*given)
    if check_indices or (reason is not None and head.device.type == "cpu"):
        check_range(head, target, teacher)
    if reason is not None:
        return distillation_cross_entropy_reference(
            logits,
            dist_logits,
            target,
            teacher,
            kind=kind,
            alpha=alpha,
            tau=tau,
            label_smoothing=label_smoothing,
            reduction=reduction,
            base=base,
            soft_divisor=soft_divisor,
        )
    out_dtype = _out_dtype(logits, dist_logits, target, teacher, options)
    if dist_logits is logits:
        dist_logits = None  # to the launchers: the distillation term reads logits
    (loss,) = distillation_cross_entropy_unchecked(logits, dist_logits, target, teacher, *options, out_dtype)
    return loss


def distillation_cross_entropy_reference(
    logits: Tensor | None,
    dist_logits: Tensor | None,
    target: Tensor | None,
    teacher: Tensor | None,
    *,
    kind: str = "hard",
    alpha: float = 0.5,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    base: str = "cross_entropy",
    soft_divisor: str = "numel",
) -> Tensor:
    """Reference of `distillation_cross_entropy` in plain PyTorch. In float64 it is the oracle."""
    logits, dist_logits, target, teacher = (_autocast(t) for t in (logits, dist_logits, target, teacher))
    terms = []
    if base != "none":
        weight = 1.0 if kind == "none" else 1.0 - alpha
        terms.append(
            weight * _base_rows(logits, target, base, label_smoothing) if weight else _zero_rows(logits, target)
        )
    if kind != "none":
        weight = 1.0 if base == "none" else alpha
        terms.append(
            weight * _dist_rows(dist_logits, teacher, kind, tau, soft_divisor)
            if weight
            else _zero_rows(dist_logits, teacher if kind == "soft" else None)
        )
    loss = sum(terms)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def why_reference(*tensors: Tensor | None) -> str | None:
    """None when `distillation_cross_entropy` runs its kernels on these tensors, else why it runs the reference."""
    values = [x for x in tensors if x is not None and x.is_floating_point()]
    deciding = next((x for x in values if x.dtype not in backends.KERNEL_DTYPES), values[0])
    return backends.why_reference(deciding, kernels=("loss",))


def _out_dtype(logits, dist_logits, target, teacher, options: Options) -> torch.dtype:
    """The dtype that PyTorch promotes to, of the inputs whose values enter the loss: the teacher's in soft distillation only."""
    valued = [logits, dist_logits, target, teacher if options.kind == "soft" else None]
    dtypes = [x.dtype for x in valued if x is not None and x.is_floating_point()]
    if torch.is_autocast_enabled(next(x for x in valued if x is not None).device.type):
        return torch.float32
    return functools.reduce(torch.promote_types, dtypes)


# ---- the reference's terms, each (B,)


def _base_rows(logits, target, base, label_smoothing):
    if base == "binary_cross_entropy":
        return _binary_cross_entropy_rows(logits, target)
    return _cross_entropy_rows(logits, target, label_smoothing)


def _dist_rows(dist_logits, teacher, kind, tau, soft_divisor):
    if kind == "soft":
        rows = _soft_rows(dist_logits, teacher, tau)
        return rows / dist_logits.shape[1] if soft_divisor == "numel" else rows
    label = teacher.argmax(dim=1) if teacher.is_floating_point() else teacher
    return _cross_entropy_rows(dist_logits, label, 0.0)


def _zero_rows(logits, labels):
    """Zeros whose gradient for the logits is zero: DDP fails on parameters without a gradient.

    Their dtype is that of the term at any other weight.
    """
    zeros = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool), 0.0).sum(dim=1)
    valued = logits if labels is None or not labels.is_floating_point() else labels
    return zeros.to(torch.promote_types(logits.dtype, valued.dtype))


def _cross_entropy_rows(logits, target, label_smoothing):
    log_probability = logits.log_softmax(dim=1)
    if target.is_floating_point():
        masked = (target == 0) & (log_probability == -math.inf)
        return -torch.where(masked, 0.0, target * log_probability).sum(dim=1)
    index, nan_outside = _index(target, logits)
    rows = -log_probability.gather(1, index)[:, 0] * nan_outside
    if label_smoothing == 0:
        return rows
    return (1 - label_smoothing) * rows - label_smoothing * log_probability.mean(dim=1)


def _binary_cross_entropy_rows(logits, target):
    nan_outside = 1.0
    if not target.is_floating_point():
        index, nan_outside = _index(target, logits)
        target = torch.zeros_like(logits).scatter(1, index, 1.0)
    yes = torch.where(target == 0, 0.0, target * torch.nn.functional.logsigmoid(logits))
    no = torch.where(target == 1, 0.0, (1 - target) * torch.nn.functional.logsigmoid(-logits))
    return -(yes + no).mean(dim=1) * nan_outside


def _soft_rows(dist_logits, teacher, tau):
    log_student = (dist_logits / tau).log_softmax(dim=1)
    log_teacher = (teacher / tau).log_softmax(dim=1)
    probability = log_teacher.exp()
    return torch.where(probability == 0, 0.0, probability * (log_teacher - log_student)).sum(dim=1) * tau**2


def _index(label, logits):
    """Class indices as (B, 1) that are safe to gather with, and a factor (B,), NaN where the index given was not."""
    label = label.long()
    inside = (label >= 0) & (label < logits.shape[1])
    return torch.where(inside, label, 0)[:, None], torch.where(inside, 1.0, math.nan).to(logits.dtype)


def _autocast(t):
    """The logits in float32 under autocast, which computes losses in it."""
    if t is None or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.float() if torch.is_autocast_enabled(t.device.type) else t


# ---- the op


class Saved(NamedTuple):
    """Saved for backward, which needs only the label of a hard teacher."""

    logits: Tensor | None  # (B, C)
    dist_logits: Tensor | None  # (B, C)
    target: Tensor | None
    teacher: Tensor | None  # (B, C), for soft distillation
    statistics: Tensor  # (B, STATISTICS) fp32
    labels: Tensor | None  # (B,) int32, for hard distillation


def _forward(
    logits: Tensor | None,
    dist_logits: Tensor | None,
    target: Tensor | None,
    teacher: Tensor | None,
    kind: str,
    base: str,
    alpha: float,
    tau: float,
    label_smoothing: float,
    soft_divisor: str,
    reduction: str,
    out_dtype: torch.dtype,
    *,
    saves,
):
    options = (kind, base, alpha, tau, label_smoothing, soft_divisor, reduction)
    tensors = (logits, dist_logits, target, teacher)
    loss, statistics, labels = launchers.distillation_cross_entropy_forward(*tensors, *options, out_dtype, keep=saves)
    return (loss,), (statistics, labels)


def _save(inputs, outputs, made, needs):
    logits, dist_logits, target, teacher, kind, *_ = inputs
    return Saved(logits, dist_logits, target, teacher if kind == "soft" else None, *made)


def _backward(grads, saved, options, grad_dtypes):
    needs = dict(need_logits=grad_dtypes[0] is not None, need_dist=grad_dtypes[1] is not None)
    return *launchers.distillation_cross_entropy_backward(*grads, *saved, *options[:-1], **needs), None, None


def _fake(logits, dist_logits, target, teacher, kind, *options):
    from fastdeit.kernels.loss.distillation_cross_entropy_kernels import STATISTICS

    *_, reduction, out_dtype = options
    head = dist_logits if logits is None else logits
    batch = head.shape[0]
    labels = head.new_empty(batch, dtype=torch.int32) if kind == "hard" else None
    loss = head.new_empty((batch,) if reduction == "none" else (), dtype=out_dtype)
    return (loss,), (head.new_empty((batch, STATISTICS.value), dtype=torch.float32), labels)


distillation_cross_entropy_unchecked = Op(
    "distillation_cross_entropy",
    outputs=("loss",),
    made=("statistics", "labels"),
    saved=Saved,
    forward=_forward,
    save=_save,
    backward=_backward,
    fake=_fake,
)


# ---- what PyTorch's FlopCounterMode counts


@register_flop_formula(torch.ops.fastdeit.distillation_cross_entropy_forward)
def _forward_flops(logits, dist_logits, target, teacher, kind, base, *args, **kwargs) -> int:
    return costs.distillation_cross_entropy_forward(
        *(dist_logits if logits is None else logits),
        kind=kind,
        base=base,
        soft_target=target is not None and len(target) == 2,
        teacher_labels=teacher is not None and len(teacher) == 1,
        reduction=args[4],
    ).flops


@register_flop_formula(torch.ops.fastdeit.distillation_cross_entropy_backward)
def _backward_flops(dloss, logits, dist_logits, target, teacher, statistics, labels, *arguments, **kwargs) -> int:
    dtypes, (kind, base, *_) = arguments[:4], arguments[8:]  # between them, the shapes of the tensors
    need_logits, need_dist = (dtype is not None for dtype in dtypes[:2])
    one_head = dist_logits is None
    return costs.distillation_cross_entropy_backward(
        *(dist_logits if logits is None else logits),
        kind=kind if need_dist or one_head else "none",
        base=base if need_logits else "none",
        soft_target=target is not None and len(target) == 2,
    ).flops
