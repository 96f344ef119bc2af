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


# ---- attention


def attention_forward(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    *,
    element_bytes: int = 2,
    out_bytes: int | None = None,
    keep_lse: bool = True,
) -> Cost:
    """softmax(Q K^T) V from packed (batch, tokens, 3 * heads * head_dim): two products; reads qkv, writes the output (out_bytes an
    element, by default as many as the inputs') and lse."""
    width = batch * tokens * heads * head_dim
    lse = 4 * batch * heads * tokens if keep_lse else 0
    return Cost(4 * width * tokens, width * (3 * element_bytes + (out_bytes or element_bytes)) + lse, 1)


def attention_backward(batch: int, tokens: int, heads: int, head_dim: int, *, element_bytes: int = 2) -> Cost:
    """Attention's gradient: at least five products; reads qkv, output, its gradient and lse, writes the packed gradient.

    Launches are those of the two-kernel form: row sums with dQ, then dK and dV.
    """
    width = batch * tokens * heads * head_dim
    return Cost(10 * width * tokens, 8 * width * element_bytes + 4 * batch * heads * tokens, 2)


# ---- LayerNorm with the residual addition before it


def layer_norm_forward(
    rows: int, channels: int, *, stream_bytes: int = 4, out_bytes: int = 2, branch_bytes: int | None = 2
) -> Cost:
    """Reads the stream (and the branch), writes the stream (if there was one) and the result, one mean and one rstd a row."""
    elements = rows * channels
    per_element = stream_bytes + out_bytes + (0 if branch_bytes is None else branch_bytes + stream_bytes)
    return Cost((8 if branch_bytes is None else 9) * elements, per_element * elements + 8 * rows, 1)


def layer_norm_backward(
    rows: int, channels: int, *, stream_bytes: int = 4, out_bytes: int = 2, branch_bytes: int | None = 2
) -> Cost:
    """Reads the result's and the stream's gradient and the stream, writes the gradients of stream and branch; two kernels."""
    elements = rows * channels
    residual = 0 if branch_bytes is None else stream_bytes + branch_bytes
    per_element = out_bytes + 2 * stream_bytes + residual
    return Cost((13 if branch_bytes is None else 14) * elements, per_element * elements + 8 * rows, 2)


# ---- a linear layer with its epilogue in the product


def linear_forward(
    rows: int,
    channels: int,
    outputs: int,
    *,
    element_bytes: int = 2,
    preactivation: bool = False,
    residual_bytes: int | None = None,
) -> Cost:
    """One product; reads input and weight, writes the result, also before its activation if asked; or adds it to a stream."""
    results = 2 * element_bytes if preactivation else element_bytes
    written = results if residual_bytes is None else 2 * residual_bytes
    traffic = (rows * channels + channels * outputs) * element_bytes + rows * outputs * written
    return Cost(2 * rows * channels * outputs, traffic, 1)


def activation_gradient(rows: int, channels: int, hidden: int, *, element_bytes: int = 2) -> Cost:
    """From the gradient of a layer's (rows, channels) output to that of the pre-activation before its (rows, hidden) input.

    Reads gradient, weight and pre-activation, writes the gradient and the activation again, and sums the columns.
    """
    traffic = rows * channels + channels * hidden + 3 * rows * hidden
    return Cost(2 * rows * channels * hidden, traffic * element_bytes, 2)


# ---- MLP: library products with a pointwise kernel between them


def mlp_forward(rows: int, channels: int, hidden: int, *, element_bytes: int = 2) -> Cost:
    """Two products; reads the input and both weights, writes the pre-activation and the result, and the activation in between."""
    traffic = 2 * rows * channels + 4 * rows * hidden + 2 * channels * hidden
    return Cost(4 * rows * channels * hidden, traffic * element_bytes, 3)


def fused_mlp_forward(
    rows: int, channels: int, hidden: int, *, element_bytes: int = 2, stream_bytes: int | None = None
) -> Cost:
    """The same in one kernel, which leaves nothing between the layers in memory; with a size of the residual stream's elements also
    the addition and LayerNorm in front: reads stream and branch, writes stream and result."""
    in_front = stream_bytes is not None
    traffic = 2 * (element_bytes + (stream_bytes or 0)) * rows * channels
    flops = 4 * rows * channels * hidden + (9 * rows * channels if in_front else 0)
    return Cost(flops, traffic + 2 * channels * hidden * element_bytes, 1)


def mlp_backward(rows: int, channels: int, hidden: int, *, element_bytes: int = 2) -> Cost:
    """Four products, one pointwise kernel, a reduction for each bias's gradient."""
    pointwise = (
        4 * rows * hidden
    )  # reads the pre-activation and its output's gradient, writes both operands of what follows
    products = 2 * (rows * channels + rows * hidden + channels * hidden) * 2
    return Cost(8 * rows * channels * hidden, (pointwise + products) * element_bytes, 7)


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


# ---- 8-bit tensors


def add_layer_norm_quantize(rows: int, channels: int, *, stream_bytes: int = 2, branch: bool = True) -> Cost:
    """Reads the stream and the branch, writes the stream, 8 bits an element and a scale a row."""
    elements, streams = rows * channels, 3 if branch else 1
    return Cost((13 if branch else 12) * elements, (streams * stream_bytes + 1) * elements + 4 * rows, 1)


def rescale(rows: int, columns: int, *, in_bytes: int = 2, out_bytes: int = 1, activation: bool = True) -> Cost:
    """Reads a product, writes it scaled, activated and cast."""
    elements = rows * columns
    return Cost((14 if activation else 4) * elements, (in_bytes + out_bytes) * elements, 1)


def quantized_linear(rows: int, channels: int, outputs: int, *, out_bytes: int = 2) -> Cost:
    """One product of 8-bit operands, its scales and bias in the same kernel."""
    traffic = rows * channels + channels * outputs + rows * outputs * out_bytes + 4 * (rows + outputs)
    return Cost(2 * rows * channels * outputs, traffic, 1)


# ---- augmentation by a plan

_CUBIC = 14  # additions and multiplications of a cubic through four values
_AFFINE = 14  # of a pixel's place in the image that it is taken from


def augment(
    batch: int,
    channels: int,
    height: int,
    width: int,
    *,
    layers: int = 2,
    tabled: int = 0,
    bicubic: int = 0,
    out_bytes: int = 4,
) -> Cost:
    """Layers of operations on (batch, channels, height, width) uint8 images, the last of which writes out_bytes a value.

    Args:
        tabled: operations, over all images and layers, that read their image once more for a histogram or a mean.
        bicubic: operations that resample, whose floating-point operations are float64's; those of others are not counted.
    """
    pixels, passes = height * width, max(layers, 1)
    traffic = batch * channels * pixels * (2 * passes - 1 + out_bytes) + tabled * channels * pixels
    return Cost(bicubic * pixels * (_AFFINE + 5 * _CUBIC * channels), traffic, 2 * passes)
