"""What the ops cost, as formulas: arithmetic, least memory traffic and launches from shapes alone.

An addition, multiplication, comparison, division, exponential or logarithm counts as one floating-point operation. Bytes are those
that must cross memory: every input read once, every output written once.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """flops: floating-point operations; bytes: least traffic to memory; launches: kernels started."""

    flops: int
    bytes: int
    launches: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.launches + other.launches)


# ---- distillation cross-entropy. Operations per logit, or per class of a target or teacher, as the kernels do them.

_FORWARD_FLOPS = {
    "cross_entropy": 4,  # maximum, difference, exponential, sum
    "binary_cross_entropy": 9,  # exponential, log1p with its correction, products with t and 1 - t, sum
    "soft target": 3,  # product, two sums
    "hard": 4,
    "argmax": 1,
    "soft": 13,  # two softmax sums with their temperature, then difference, product and sum of the divergence
    "none": 0,
}
_BACKWARD_FLOPS = {"cross_entropy": 5, "binary_cross_entropy": 5, "soft target": 1, "hard": 5, "soft": 10, "none": 0}


def distillation_cross_entropy_forward(
    batch: int,
    classes: int,
    *,
    kind: str = "hard",
    base: str = "cross_entropy",
    soft_target: bool = False,
    teacher_labels: bool = False,
    one_head: bool = False,
    reduction: str = "mean",
    logits_bytes: int = 2,
    target_bytes: int = 4,
    teacher_bytes: int = 2,
) -> Cost:
    """The loss of (batch, classes) logits.

    Args:
        kind, base, reduction: the op's options.
        soft_target: the target has a value per class, else it is an index per row.
        teacher_labels: the teacher is an index per row, else it has a logit per class.
        one_head: both terms read the same logits.
        logits_bytes, target_bytes, teacher_bytes: size of one element.
    """
    work = _FORWARD_FLOPS[base] + _FORWARD_FLOPS[kind]
    work += _FORWARD_FLOPS["soft target"] if soft_target and base == "cross_entropy" else 0
    work += _FORWARD_FLOPS["argmax"] if kind == "hard" and not teacher_labels else 0
    traffic = _heads(kind, base, one_head) * batch * classes * logits_bytes
    traffic += _labels_bytes(batch, classes, kind, base, soft_target, teacher_labels, target_bytes, teacher_bytes)
    reduced = reduction != "none"
    traffic += 4 * batch * (2 if reduced else 1)  # each row's loss, written and read again by the sum
    return Cost(work * batch * classes + (batch if reduced else 0), traffic, 2 if reduced else 1)


def distillation_cross_entropy_backward(
    batch: int,
    classes: int,
    *,
    kind: str = "hard",
    base: str = "cross_entropy",
    soft_target: bool = False,
    one_head: bool = False,
    logits_bytes: int = 2,
    target_bytes: int = 4,
    teacher_bytes: int = 2,
) -> Cost:
    """The gradients of that loss: logits, soft targets and a soft teacher are read again, one gradient a head is written.

    Of a hard teacher only each row's index is read.
    """
    work = _BACKWARD_FLOPS[base] + _BACKWARD_FLOPS[kind]
    work += _BACKWARD_FLOPS["soft target"] if soft_target and base == "cross_entropy" else 0
    traffic = 2 * _heads(kind, base, one_head) * batch * classes * logits_bytes
    hard = kind == "hard"
    traffic += _labels_bytes(batch, classes, kind, base, soft_target, hard, target_bytes, 4 if hard else teacher_bytes)
    return Cost(work * batch * classes, traffic, 1)


def _heads(kind: str, base: str, one_head: bool) -> int:
    return 1 if one_head or "none" in (kind, base) else 2


def _labels_bytes(batch, classes, kind, base, soft_target, teacher_labels, target_bytes, teacher_bytes) -> int:
    target = 0 if base == "none" else batch * (classes if soft_target else 1) * target_bytes
    teacher = 0 if kind == "none" else batch * (1 if teacher_labels else classes) * teacher_bytes
    return target + teacher
