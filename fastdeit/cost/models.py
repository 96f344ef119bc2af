"""What a whole DeiT costs, part by part, for the ways in which it can be run: arithmetic, least memory traffic, launches.

Matrix products are the same for all; what differs is the pointwise work between them. In the tables below bytes are per element of
one (batch, tokens, channels) activation. "amp" has an fp32 residual stream and 2-byte products, as autocast; "bf16" has 2 bytes
throughout. Casts of weights and of their gradients, optimizer and teacher are not counted, neither in bytes nor in launches: they
do not grow with the batch, and `fastdeit bench evidence` counts a block's launches with them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fastdeit.cost.formulas import Cost

EXECUTIONS = {
    "eager": "timm in PyTorch, operation by operation",
    "compile": "an ideal torch.compile: pointwise operations between two products are one kernel",
    "fastdeit": "this package with the libraries' matrix products, as it ships",
    "epilogues": "the same with everything fused: activation and its derivative, column sums and embedding in products of its own, "
    "attention's gradient in one pass",
}
PRECISIONS = ("amp", "bf16")
LAST_BLOCK = "last block: "  # before the names of its parts, where that computes the prefix tokens alone
PREFIX_ONLY = ("fastdeit", "epilogues")  # executions that compute the last block's prefix tokens alone


@dataclass(frozen=True)
class Shape:
    """A vision transformer's sizes."""

    channels: int
    heads: int
    depth: int
    tokens: int  # prefix tokens included
    prefix_tokens: int = 2
    patch_size: int = 16
    hidden: int = 0  # of the MLP; 0 is four times the channels
    classes: int = 1000
    classifiers: int = 2  # tokens, or means of tokens, that have one

    @property
    def mlp(self) -> int:
        return self.hidden or 4 * self.channels

    def at(self, img_size: int) -> "Shape":
        """The same model on images of img_size pixels a side."""
        return replace(self, tokens=(img_size // self.patch_size) ** 2 + self.prefix_tokens)


def _deit(channels: int, heads: int, depth: int = 12) -> Shape:
    return Shape(channels, heads, depth, tokens=198)


DEIT = {"Ti": _deit(192, 3), "S": _deit(384, 6), "B": _deit(768, 12), "L": _deit(1024, 16, 24)}  # distilled, 224 pixels


@dataclass(frozen=True)
class Part:
    """One kind of work in a model: forward and backward, `count` times. FLOPs are those of the matrix units alone."""

    name: str
    forward: Cost
    backward: Cost
    count: int = 1


# Pointwise work: (forward bytes, forward launches, backward bytes, backward launches) of one block, for precision and execution.
# The two additions and norms of a block:
#   eager, amp   cast to 2 bytes after the norm (6), the norm (8), drop path (4), addition (10); backward the casts, two passes of
#                the norm, the addition of two gradients
#   compile      one kernel of addition, norm and cast (12), backward one and a second for the norm's parameters
#   fastdeit     one kernel each way: stream and branch in, stream and normalised out; with "amp" backward reads the 2 bytes of the
#                normalised tokens, with "bf16" it normalises again (4), which epilogues could spare
_NORMS_AND_ADDITIONS = {
    ("amp", "eager"): (2 * (14 + 4 + 10), 2 * 4, 2 * (26 + 10 + 12), 2 * 8),
    ("bf16", "eager"): (2 * (4 + 4 + 6), 2 * 3, 2 * (10 + 4 + 6), 2 * 5),
    ("amp", "compile"): (2 * 12, 2, 2 * (16 + 6), 2 * 2),
    ("bf16", "compile"): (2 * 8, 2, 2 * (10 + 4), 2 * 2),
    ("amp", "fastdeit"): (2 * 12, 2, 2 * 14, 2 * 2),
    ("bf16", "fastdeit"): (2 * 8, 2, 2 * 14, 2 * 3),
    ("amp", "epilogues"): (2 * 12, 2, 2 * 14, 2 * 2),
    ("bf16", "epilogues"): (2 * 8, 2, 2 * 10, 2 * 2),
}
_DROP_PATH = {"amp": (2 * 4, 2), "bf16": (2 * 4, 2)}  # of eager, in training alone: forward bytes and launches
# Attention's gradient, (products, bytes, launches): PyTorch's kernels (26 bytes) and the stacking of three gradients into one (12);
# here two kernels, each with scores of its own, that read q, k, v and the output's gradient twice; at best one pass.
_ATTENTION_BACKWARD = {"eager": (5, 38, 4), "compile": (5, 38, 4), "fastdeit": (7, 24, 2), "epilogues": (5, 16, 1)}
# Patches to tokens beside the product, (forward bytes, forward launches, backward bytes, backward launches):
#   eager        the image's cast, the convolution, the prefix tokens' concatenation, the positions' addition
#   fastdeit     the image's copy to patches, which casts it, the product, one kernel for the rest; backward one that sums over
#                samples and casts for the weight's product, and small ones over its sums
_EMBEDDING = {
    ("amp", "eager"): (14, 4, 6, 4),
    ("bf16", "eager"): (8, 4, 4, 4),
    ("amp", "compile"): (6, 2, 6, 3),
    ("bf16", "compile"): (4, 2, 4, 3),
    ("amp", "fastdeit"): (6, 3, 6, 7),
    ("bf16", "fastdeit"): (4, 3, 4, 7),
    ("amp", "epilogues"): (2, 2, 0, 2),
    ("bf16", "epilogues"): (0, 2, 0, 2),
}
_PATCH_COPY = {("bf16", "fastdeit"): 4}  # bytes a pixel beyond the cast of the image, which all make under autocast


def parts(shape: Shape, batch: int, execution: str, precision: str = "amp", *, training: bool) -> list[Part]:
    """The work of one forward pass, or of one training step's forward and backward.

    Args:
        execution: one of EXECUTIONS.
        precision: one of PRECISIONS.
        training: drop path runs, and what backward needs is written.

    Raises:
        ValueError: an execution or precision that is not there.
    """
    _check(execution, precision)
    found = [_embedding(shape, batch, execution, precision)]
    pruned = execution in PREFIX_ONLY and shape.prefix_tokens > 0
    whole = shape.depth - 1 if pruned else shape.depth
    found += [replace(part, count=whole) for part in _block(shape, batch, execution, precision, training)]
    if pruned:
        found += _last_block(shape, batch, execution, precision, training)
    found += _heads(shape, batch, execution, training)
    return found if training else _forward_only(found)


def total(found: list[Part]) -> Cost:
    """The sum of all parts, forward and backward, each as often as it occurs."""
    result = Cost(0, 0, 0)
    for part in found:
        both = part.forward + part.backward
        result += Cost(part.count * both.flops, part.count * both.bytes, part.count * both.launches)
    return result


def seconds(found: list[Part], flops_per_second: float, bytes_per_second: float) -> float:
    """The roofline: a part, forward and backward apart, takes as long as its arithmetic or its traffic, whichever is longer."""
    return sum(part_seconds(part, flops_per_second, bytes_per_second) for part in found)


def part_seconds(part: Part, flops_per_second: float, bytes_per_second: float) -> float:
    """One part's share of `seconds`."""
    times = (
        max(cost.flops / flops_per_second, cost.bytes / bytes_per_second) for cost in (part.forward, part.backward)
    )
    return part.count * sum(times)


def training_flops_per_image(shape: Shape) -> float:
    """Matrix arithmetic of forward and backward for one image, all tokens counted: the F of MFU (three times a forward pass)."""
    forward = sum(p.count * p.forward.flops for p in parts(shape, 1, "eager", training=False))
    return 3.0 * forward


def _check(execution: str, precision: str) -> None:
    for name, value, allowed in (("execution", execution, EXECUTIONS), ("precision", precision, PRECISIONS)):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _forward_only(found: list[Part]) -> list[Part]:
    return [replace(part, backward=Cost(0, 0, 0)) for part in found]


def _embedding(shape: Shape, batch: int, execution: str, precision: str) -> Part:
    """Patches to tokens, with bias, positions and prefix tokens."""
    patches = batch * (shape.tokens - shape.prefix_tokens)
    elements = batch * shape.tokens * shape.channels
    pixels = 3 * shape.patch_size**2
    flops = 2 * patches * shape.channels * pixels
    traffic = 2 * patches * (pixels + shape.channels)
    forward, launches, backward, backward_launches = _EMBEDDING[precision, execution]
    copied = patches * pixels * _PATCH_COPY.get((precision, execution), 0)
    return Part(
        "patch embedding",
        Cost(flops, traffic + copied + forward * elements, launches),
        Cost(flops, traffic + backward * elements, backward_launches),
    )


def _block(
    shape: Shape, batch: int, execution: str, precision: str, training: bool, queries: int | None = None
) -> Iterator[Part]:
    """One block. What follows the first norm, keys and values is computed for `queries` tokens, None for all."""
    queries = shape.tokens if queries is None else queries
    elements = batch * shape.tokens * shape.channels
    few = batch * queries * shape.channels
    rows = batch * queries
    family = "fastdeit" if execution in PREFIX_ONLY else execution
    ideal = execution == "epilogues"

    forward, launches, backward, backward_launches = _NORMS_AND_ADDITIONS[precision, execution]
    if family == "eager" and not training:
        dropped, fewer = _DROP_PATH[precision]
        forward, launches = forward - dropped, launches - fewer
    yield Part(
        "norms and additions",
        Cost(0, forward * (elements + few) // 2, launches),
        Cost(0, backward * (elements + few) // 2, backward_launches),
    )
    qkv = _product("qkv", batch * shape.tokens, 3 * shape.channels, shape.channels, not ideal)
    if queries < shape.tokens:  # two products
        keys_values = _product("qkv", batch * shape.tokens, 2 * shape.channels, shape.channels, not ideal)
        query = _product("qkv", rows, shape.channels, shape.channels, not ideal)
        qkv = replace(qkv, forward=keys_values.forward + query.forward, backward=keys_values.backward + query.backward)
    yield qkv
    product = 2 * batch * shape.heads * queries * shape.tokens * (shape.channels // shape.heads)
    lse = 4 * batch * shape.heads * queries if training else 0
    products, moved, launched = _ATTENTION_BACKWARD[execution]
    # Half of what moves, forward and backward, belongs to queries and outputs, half to keys and values.
    yield Part(
        "attention",
        Cost(2 * product, 4 * (elements + few) + lse, 1),
        Cost(products * product, moved * (elements + few) // 2 + lse, launched),
    )
    yield _product("proj", rows, shape.channels, shape.channels, not ideal)
    yield from mlp_parts(rows, shape.channels, shape.mlp, execution, training=training)


def mlp_parts(rows: int, channels: int, hidden: int, execution: str, *, training: bool) -> list[Part]:
    """The two layers of (rows, channels) tokens and what is between them, in 2 bytes; `training`: what backward needs is written.

    Raises:
        ValueError: an execution that is not there.
    """
    _check(execution, PRECISIONS[0])
    hidden_bytes = 2 * rows * hidden
    ships, ideal = execution == "fastdeit", execution == "epilogues"
    fc1 = _product("fc1", rows, hidden, channels, not (ships or ideal))
    fc2 = _product("fc2", rows, channels, hidden, not ideal)
    if ideal:  # fc1 also writes its pre-activation, the gradient through fc2 reads it and writes the activation again
        return [
            replace(fc1, forward=fc1.forward + Cost(0, hidden_bytes if training else 0, 0)),
            replace(fc2, backward=fc2.backward + Cost(0, 2 * hidden_bytes, 0)),
        ]
    # Backward reads pre-activation and gradient, writes the gradient; here also the activation, which was not kept, and a bias'.
    written, launches = (4, 2) if ships else (3, 1)
    between = Cost(0, 2 * hidden_bytes, 1), Cost(0, written * hidden_bytes, launches)
    return [fc1, Part("activation", *between), fc2]


def _product(name: str, rows: int, outputs: int, inputs: int, bias_sum: bool) -> Part:
    """A linear layer: backward is two products, whose weights and their gradients have 2 and 4 bytes, and the bias's gradient."""
    flops = 2 * rows * outputs * inputs
    traffic = 2 * rows * (outputs + inputs)
    weights = outputs * inputs
    bias = 2 * rows * outputs if bias_sum else 0
    return Part(
        name,
        Cost(flops, traffic + 2 * weights, 1),
        Cost(2 * flops, 2 * traffic + 8 * weights + bias, 3 if bias_sum else 2),
    )


# What joins the gradients of the last block's few and many tokens as it ships: the stream's, padded with zeros (4 or 2 bytes), the
# normalised tokens', padded and added (8), those of keys and values, stacked (8).
_JOINS = {"amp": (4 + 8 + 8, 6), "bf16": (2 + 8 + 8, 6)}


def _last_block(shape: Shape, batch: int, execution: str, precision: str, training: bool) -> Iterator[Part]:
    """The last block: first norm, keys and values for all tokens, the rest for the prefix tokens alone."""
    for part in _block(shape, batch, execution, precision, training, queries=shape.prefix_tokens):
        if execution == "fastdeit" and part.name == "norms and additions":
            moved, launches = _JOINS[precision]
            joins = Cost(0, moved * batch * shape.tokens * shape.channels, launches)
            part = replace(part, backward=part.backward + joins)
        yield replace(part, name=LAST_BLOCK + part.name)


def _heads(shape: Shape, batch: int, execution: str, training: bool) -> Iterator[Part]:
    """The classifiers, each of one token, and in training the loss on their logits."""
    heads = shape.classifiers
    rows = heads * batch
    flops = 2 * rows * shape.classes * shape.channels
    weights = 2 * heads * shape.classes * shape.channels
    logits = 4 * rows * shape.classes
    passes, forward, backward = (20, 10, 10) if execution == "eager" else (2, 2, 1)  # over the logits; launches
    if not training:
        passes, forward = 0, 0
    yield Part(
        "heads and loss",
        Cost(flops, weights + (1 + passes) * logits, heads + forward),
        Cost(2 * flops, 3 * (weights + logits), 3 * heads + backward),
    )
