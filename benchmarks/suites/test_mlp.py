"""The MLP of a block: its whole branch under autocast, the two layers alone, and each product with what follows it in one kernel or
in two. Which of the two fastdeit takes is its table's choice."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import ops
from fastdeit.benchmarks.baselines import op_baselines as baselines
from fastdeit.benchmarks.cases import by_importance, label
from fastdeit.benchmarks.roofline import Ceilings, after_product, beside_compile, one_after_another
from fastdeit.cost import formulas as costs
from fastdeit.cost.formulas import Cost
from fastdeit.cost.models import mlp_parts
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device

WORKS = ["branch-both", "mlp-both", "activation_z-forward", "derivative-backward", "branch-forward", "branch-backward"]
WORKS += ["activation-forward", "residual-forward", "mlp-forward", "mlp-backward"]
CASES = by_importance([198, 578], [768, 384, 192], [256, 64, 1024, 1], WORKS)
QUICK, TURNS = 2, 2
NOTHING = Cost(0, 0, 0)


@dataclass(frozen=True)
class Work:
    op: Callable
    reference: Callable
    inputs: Callable[[int], tuple[Tensor, ...]]  # of a batch size, upstream gradients last
    given: int  # arguments before those
    shared: tuple[int, ...]  # of them, those that all samples have in common
    cost: Cost
    floors: Callable[[Ceilings], tuple[float, float]]
    passes: str = "forward"  # of autograd
    sums: int = 0  # how many results at the end are sums over samples


@dataclass(frozen=True)
class Sizes:
    batch: int
    tokens: int
    channels: int
    low: torch.dtype

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def hidden(self) -> int:
        return 4 * self.channels

    def stream(self, size: int, channels: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        shape = size, self.tokens, channels or self.channels
        return torch.randn(shape, device=kernel_device()).to(dtype or self.low)

    def layers(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """w1, b1, w2, b2."""
        shapes = (self.hidden, self.channels), (self.hidden,), (self.channels, self.hidden), (self.channels,)
        random = [torch.randn(shape, device=kernel_device()) for shape in shapes]
        return tuple((t * t.shape[-1] ** -0.5 if t.dim() == 2 else t).to(dtype) for t in random)


def in_direction(direction: str, forward: Cost, backward: Cost) -> Cost:
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def mlp(sizes: Sizes, direction: str) -> Work:
    def inputs(size):
        return sizes.stream(size), *sizes.layers(sizes.low), sizes.stream(size)

    measures = sizes.rows, sizes.channels, sizes.hidden

    def parts(execution):
        both = mlp_parts(*measures, execution, training=direction != "forward")
        left_out = {"forward": dict(backward=NOTHING), "backward": dict(forward=NOTHING), "both": {}}[direction]
        return [replace(part, **left_out) for part in both]

    cost = in_direction(direction, costs.mlp_forward(*measures), costs.mlp_backward(*measures))
    facts = dict(cost=cost, passes=direction, floors=one_after_another(parts))
    return Work(ops.mlp, ops.mlp_reference, inputs, given=5, shared=(1, 2, 3, 4), **facts)


def branch(sizes: Sizes, direction: str) -> Work:
    """From the residual addition before it: fp32 stream and parameters, products and branch in bf16."""

    def under(function):
        def run(x, branch, weight, bias, *layers):
            with torch.autocast(x.device.type, sizes.low, enabled=sizes.low != x.dtype != torch.float64):
                return function(x, branch, weight, bias, 1e-6, *layers)

        return run

    def inputs(size):
        def streams():
            return sizes.stream(size, dtype=torch.float32), sizes.stream(size)

        norm = (torch.randn(sizes.channels, device=kernel_device()) for _ in range(2))
        return *streams(), *norm, *sizes.layers(torch.float32), *streams()

    layers, measures = mlp(sizes, direction), (sizes.rows, sizes.channels)
    norm = in_direction(direction, costs.layer_norm_forward(*measures), costs.layer_norm_backward(*measures))
    # A compiler reads stream and gradient once more for the norm's weight and bias.
    more = 0 if direction == "forward" else 6 * sizes.rows * sizes.channels

    def floors(ceilings):
        norms = beside_compile(norm, more, matrix=False)(ceilings)
        return tuple(map(operator.add, layers.floors(ceilings), norms))

    pair = (under(f) for f in (ops.add_layer_norm_mlp, ops.add_layer_norm_mlp_reference))
    shared = tuple(range(2, 8))
    return Work(*pair, inputs, given=8, shared=shared, cost=norm + layers.cost, passes=direction, floors=floors)


def first_layer(sizes: Sizes, preactivation: bool) -> Work:
    options = dict(activation="gelu", save_preactivation=preactivation)

    def inputs(size):
        return sizes.stream(size), *sizes.layers(sizes.low)[:2]

    cost = costs.linear_forward(sizes.rows, sizes.channels, sizes.hidden, preactivation=preactivation)
    product = costs.linear_forward(sizes.rows, sizes.channels, sizes.hidden)
    floors = after_product(cost, product, 4 * sizes.rows * sizes.hidden)  # reads its result, writes the activation
    pair = ((lambda *given, f=f: f(*given, **options)) for f in (ops.linear, ops.linear_reference))
    return Work(*pair, inputs, given=3, shared=(1, 2), cost=cost, floors=floors)


def activation(sizes: Sizes, _) -> Work:
    return first_layer(sizes, preactivation=False)


def activation_z(sizes: Sizes, _) -> Work:
    return first_layer(sizes, preactivation=True)


def residual(sizes: Sizes, _) -> Work:
    """The second layer and the addition to an fp32 stream."""

    def inputs(size):
        hidden = sizes.stream(size, sizes.hidden)
        return hidden, *sizes.layers(sizes.low)[2:], sizes.stream(size, dtype=torch.float32)

    cost = costs.linear_forward(sizes.rows, sizes.hidden, sizes.channels, residual_bytes=4)
    product = costs.linear_forward(sizes.rows, sizes.hidden, sizes.channels)
    # Reads its result and the stream, writes the stream.
    floors = after_product(cost, product, 10 * sizes.rows * sizes.channels)
    pair = ((lambda *given, f=f: f(*given[:3], residual=given[3])) for f in (ops.linear, ops.linear_reference))
    return Work(*pair, inputs, given=4, shared=(1, 2), cost=cost, floors=floors)


def derivative(sizes: Sizes, _) -> Work:
    """The gradient through the second layer and GELU, GELU once more for the weight's gradient, and the first bias's gradient."""

    def reference(dy, weight, z):
        dz = torch.ops.aten.gelu_backward(dy @ weight, z)
        return dz, F.gelu(z), dz.flatten(0, -2).sum(0)

    def op(dy, weight, z):
        from fastdeit.kernels.gemm.linear import activation_gradient

        rows = dy.flatten(0, -2), weight, z.flatten(0, -2)
        dz, h, dbias = activation_gradient(*rows, "gelu", dbias_dtype=z.dtype)
        return dz.view(z.shape), h.view(z.shape), dbias

    def inputs(size):
        return sizes.stream(size), sizes.layers(sizes.low)[2], sizes.stream(size, sizes.hidden)

    cost = costs.activation_gradient(sizes.rows, sizes.channels, sizes.hidden)
    ours = op if kernel_device().type == "cuda" else reference
    product = costs.linear_forward(sizes.rows, sizes.channels, sizes.hidden)
    # Reads its result and the pre-activation, writes the gradient and the activation, and reads the gradient again for its sums.
    floors = after_product(cost, product, 10 * sizes.rows * sizes.hidden)
    return Work(ours, reference, inputs, given=3, shared=(1,), cost=cost, sums=1, floors=floors)


def in_one_kernel(work: Work, sizes: Sizes) -> Work:
    """The same forward, whatever the table says; its floor beside the one of a compiler, which takes the library's products."""
    from fastdeit.kernels.gemm.fused_mlp import candidates, use_fused_mlp
    from fastdeit.kernels.runtime.architecture import architecture

    config = candidates(architecture(torch.empty(0, device=kernel_device())))[0]
    stream_bytes = None if work.op is ops.mlp else 4  # of what a branch starts with
    cost = costs.fused_mlp_forward(sizes.rows, sizes.channels, sizes.hidden, stream_bytes=stream_bytes)

    def op(*given):
        with use_fused_mlp(config):
            return work.op(*given)

    def floors(ceilings):
        return ceilings.floor_us(cost, matrix=True), work.floors(ceilings)[1]

    return replace(work, op=op, floors=floors)


WORK = dict(
    branch=branch, mlp=mlp, activation=activation, activation_z=activation_z, residual=residual, derivative=derivative
)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_mlp(compare, toy, case):
    tokens, channels, batch, (name, _, direction) = *case[:3], case[3].partition("-")
    low = torch.float32 if toy else torch.bfloat16
    sizes = Sizes(min(batch, 2), 5, channels // 12, low) if toy else Sizes(batch, tokens, channels, low)
    work = WORK[name](sizes, direction)
    frozen = range(work.given) if work.passes == "forward" else ()
    samples = work.inputs(min(sizes.batch, baselines.COMPARED_SAMPLES))[: work.given]
    assert_as_accurate_as_eager(work.op, work.reference, *samples, frozen=frozen, backend="auto")
    candidates = {"fastdeit": work.op, "PyTorch eager": work.reference}
    if not toy:
        candidates["torch.compile"] = baselines.compiled(work.reference)
        candidates["torch.compile max-autotune"] = baselines.autotuned(work.reference)
    if channels == 192 and case[3] in ("mlp-forward", "branch-forward"):
        one_kernel = in_one_kernel(work, sizes)
        candidates["fastdeit, one kernel"], work = one_kernel.op, one_kernel
    oracle = baselines.oracle(work.passes, work.reference, work.given, shared=work.shared)

    def expected(*arguments):
        results = oracle(*arguments)
        whole = sizes.batch <= baselines.COMPARED_SAMPLES
        return results if whole or not work.sums else [*results[: -work.sums], *[None] * work.sums]

    compare(
        {name: baselines.DIRECTIONS[work.passes](function, work.given) for name, function in candidates.items()},
        lambda: work.inputs(sizes.batch),
        expected=expected,
        cost=work.cost,
        matrix=True,
        floors=work.floors,
        work=name,
        direction=direction,
        batch=sizes.batch,
        tokens=sizes.tokens,
        channels=sizes.channels,
    )
