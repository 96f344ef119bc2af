"""Calls that launch LayerNorm's kernels, those that fold its parameters into weights, and those of the branches around it.

Every configuration is launched with a few rows. The ragged calls have so many that each loop over rows makes several passes, and
numbers of rows, of hidden channels and of partial sums that end within a tile, so that every mask is needed.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdeit import ops
from fastdeit.kernels.gemm.folded_weights import fold_both_forward
from fastdeit.kernels.norm.subsets import SUBSET_WIDTHS
from fastdeit.kernels.runtime.column_sums import add_partial_sums
from fastdeit.testing.accuracy import Error, assert_as_accurate_as_eager, assert_close_to_oracle, poisoned_memory
from fastdeit.testing.merged_folds import folded_in_one_launch
from fastdeit.testing.ptx.case_inputs import BF16, FP32, mlp_weights, norm_weights, randn, scales, under_autocast

Errors = dict[str, tuple[Error, Error]]
WIDTHS = (192, 384, 768, 1024, 1280, 8192)
_RAGGED = (5, 27)  # samples and tokens: 135 rows
_RAGGED_HIDDEN = 272  # ends within a tile, and is a multiple of 16 as 256 and 32 are, so that the same code runs


def normalisation(arch: int) -> Iterator[tuple[str, Callable[[], Errors]]]:
    """A name and a call for each configuration."""
    for channels in WIDTHS:
        if channels != WIDTHS[-1]:
            yield f"layer_norm C={channels} bf16", functools.partial(_layer_norm, channels)
        yield f"add_layer_norm C={channels} autocast", functools.partial(_add_layer_norm, channels)
        hidden = 256 if channels == 192 else 32
        yield f"add_layer_norm_mlp C={channels} autocast", functools.partial(_add_layer_norm_mlp, channels, hidden)
    folded = functools.partial(functools.partial, _add_layer_norm_mlp, 384)
    yield "add_layer_norm_mlp without LayerScale, autocast", folded(256, scaled=False)
    yield "add_layer_norm_mlp, pre-activation recomputed, autocast", folded(32, lean=True)
    yield "add_layer_norm_mlp, first layer bf16, autocast", folded(256, first=BF16)
    yield "add_layer_norm_mlp bf16", _add_layer_norm_mlp_bf16
    for channels in SUBSET_WIDTHS:
        yield f"add_layer_norm_mlp on subsets, C={channels} autocast", functools.partial(_on_subsets, channels)
    yield "layer_norm_mlp autocast", _layer_norm_mlp
    for scaled in (False, True):
        yield f"folds of two branches, {'with' if scaled else 'without'} LayerScale", functools.partial(_folds, scaled)


def ragged(arch: int) -> Iterator[tuple[str, Callable[[], Errors]]]:
    """The same kernels with sizes that leave a rest everywhere; sm_89 and sm_100 have the code of sm_80 and sm_90 here."""
    if arch not in (80, 90):
        return
    sizes: dict[str, Any] = dict(zip(("samples", "tokens"), _RAGGED, strict=True))
    yield "ragged layer_norm C=384 bf16", functools.partial(_layer_norm, 384, **sizes)
    yield "ragged add_layer_norm C=384 autocast", functools.partial(_add_layer_norm, 384, **sizes)
    folded = functools.partial(functools.partial, _add_layer_norm_mlp, 384, _RAGGED_HIDDEN, **sizes)
    yield "ragged add_layer_norm_mlp C=384 autocast", folded()
    yield "ragged add_layer_norm_mlp without LayerScale, autocast", folded(scaled=False)
    # A first step of columns that ends within the tile: in later ones a register may hold what the step before has loaded.
    yield (
        "ragged add_layer_norm_mlp without LayerScale, narrow, autocast",
        functools.partial(_add_layer_norm_mlp, 192, _RAGGED_HIDDEN, scaled=False),
    )
    yield "ragged add_layer_norm_mlp, pre-activation recomputed, autocast", folded(lean=True)
    yield "ragged add_layer_norm_mlp, first layer bf16, autocast", folded(first=BF16)
    yield "ragged add_layer_norm_mlp bf16", functools.partial(_add_layer_norm_mlp_bf16, _RAGGED_HIDDEN, **sizes)
    yield (
        "ragged add_layer_norm_mlp on subsets, C=768 autocast",
        functools.partial(_on_subsets, 768, _RAGGED_HIDDEN, tokens=_RAGGED[1]),
    )
    # The last program's second step has fewer rows than a step adds, and no third one follows.
    yield "ragged layer_norm_mlp autocast", functools.partial(_layer_norm_mlp, _RAGGED_HIDDEN, samples=3, tokens=13)
    yield "ragged partial sums of layer_norm's gradients", _partial_sums


def _layer_norm(channels: int, samples: int = 2, tokens: int = 9) -> Errors:
    x, weight = randn(samples, tokens, channels), randn(channels, scale=0.3, shift=1)
    bias = randn(channels, scale=0.2)
    return assert_as_accurate_as_eager(ops.layer_norm, ops.layer_norm_reference, x, weight, bias, 1e-6)


def _add_layer_norm(channels: int, samples: int = 4, tokens: int = 5) -> Errors:
    x, branch = randn(samples, tokens, channels, dtype=FP32), randn(samples, tokens, channels)
    weight, bias = randn(channels, dtype=FP32, scale=0.3, shift=1), randn(channels, dtype=FP32, scale=0.2)
    gamma = randn(channels, dtype=FP32, scale=0.2, shift=0.7)
    pair = (
        under_autocast(
            lambda *args, f=f: f(*args[:4], 1e-6, gamma=args[4], drop_path_scale=args[5], out_dtype=_low(args[1]))
        )
        for f in (ops.add_layer_norm, ops.add_layer_norm_reference)
    )
    return assert_as_accurate_as_eager(*pair, x, branch, weight, bias, gamma, scales(samples), frozen=(5,))


def _low(branch: Tensor) -> torch.dtype:
    """The dtype of the norm's output: that of the products, or the oracle's."""
    return torch.float64 if branch.dtype == torch.float64 else BF16


def _add_layer_norm_mlp(
    channels: int,
    hidden: int,
    scaled: bool = True,
    lean: bool = False,
    first: torch.dtype = FP32,
    samples: int = 4,
    tokens: int = 3,
) -> Errors:
    """LayerNorm and LayerScale folded into the weights, behind a branch with a drop-path factor.

    scaled: with LayerScale. lean: backward makes the pre-activation again. first: the first layer's dtype.
    """
    x, branch = randn(samples, tokens, channels, dtype=FP32, scale=2, shift=1), randn(samples, tokens, channels)
    weights = [*norm_weights(first, channels), *mlp_weights(FP32, channels, hidden)]
    weights[2:4] = (weight.to(first) for weight in weights[2:4])
    gamma = randn(channels, dtype=FP32, scale=0.2, shift=0.7) if scaled else None

    def call(
        op: Callable, x: Tensor, branch: Tensor, g: Tensor, b: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        *layers, gamma, scale = rest
        options = dict(recompute="preactivation") if lean and op is ops.add_layer_norm_mlp else {}
        return op(x, branch, g, b, 1e-6, *layers, gamma=gamma, drop_path_scale=scale, **options)

    pair = (
        under_autocast(functools.partial(call, op)) for op in (ops.add_layer_norm_mlp, ops.add_layer_norm_mlp_reference)
    )
    return assert_as_accurate_as_eager(*pair, x, branch, *weights, gamma, scales(samples), frozen=(9,))


def _on_subsets(channels: int, hidden: int = 32, tokens: int = 3) -> Errors:
    """Three of five samples have a branch to add, two enter the next, and one is in neither."""
    x, branch = randn(5, tokens, channels, dtype=FP32, scale=2, shift=1), randn(3, tokens, channels)
    weights = [*norm_weights(FP32, channels), *mlp_weights(FP32, channels, hidden)]
    subsets = dict(branch_slots=torch.tensor([2, 4, 0, 3, 1]), slots=torch.tensor([1, 3, 4, 2, 0]), kept=2)

    def call(op: Callable, x: Tensor, branch: Tensor, g: Tensor, b: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *layers, scale = rest
        return op(x, branch, g, b, 1e-6, *layers, drop_path_scale=scale, **subsets)

    pair = (
        under_autocast(functools.partial(call, op)) for op in (ops.add_layer_norm_mlp, ops.add_layer_norm_mlp_reference)
    )
    return assert_as_accurate_as_eager(*pair, x, branch, *weights, torch.full((5,), 5 / 3), frozen=(8,))


def _add_layer_norm_mlp_bf16(hidden: int = 256, samples: int = 4, tokens: int = 3) -> Errors:
    """The same of a bf16 model, in which nothing is folded."""
    x, branch = randn(samples, tokens, 192), randn(samples, tokens, 192)
    weights = [*norm_weights(BF16, 192), *mlp_weights(BF16, 192, hidden)]
    pair = (
        lambda x, branch, g, b, *layers, op=op: op(x, branch, g, b, 1e-6, *layers)
        for op in (ops.add_layer_norm_mlp, ops.add_layer_norm_mlp_reference)
    )
    return assert_as_accurate_as_eager(*pair, x, branch, *weights)


def _layer_norm_mlp(hidden: int = 256, samples: int = 4, tokens: int = 3) -> Errors:
    """A whole branch: LayerNorm folded into the weights, LayerScale, drop path and residual behind."""
    x = randn(samples, tokens, 192, dtype=FP32, scale=2, shift=1)
    weights = [*norm_weights(FP32, 192), *mlp_weights(FP32, 192, hidden), randn(192, dtype=FP32, scale=0.2, shift=0.7)]
    pair = (
        under_autocast(
            lambda x, g, b, w1, b1, w2, b2, gamma, scale, f=f: f(
                x, g, b, 1e-6, w1, b1, w2, b2, gamma=gamma, drop_path_scale=scale, residual=x
            )
        )
        for f in (ops.layer_norm_mlp, ops.layer_norm_mlp_reference)
    )
    return assert_as_accurate_as_eager(*pair, x, *weights, scales(samples), frozen=(8,))


def _folds(scaled: bool) -> Errors:
    """Of two branches in one launch, with rows and columns that end within a tile, and the bits of two launches."""
    width, branches = 272, []
    for rows, inner in ((76, 256), (60, 304)):
        layers = [randn(*size, dtype=FP32) for size in ((rows, width), (rows,), (width, inner), (width,))]
        branches.append((*layers, *norm_weights(FP32, width), randn(width, dtype=FP32) if scaled else None))
    calls = [functools.partial(_fold, *branch) for branch in branches]
    with poisoned_memory():
        found, apart = folded_in_one_launch(calls), [call() for call in calls]
    errors: dict[str, Any] = {}
    for i, (branch, both, others) in enumerate(zip(branches, found, apart, strict=True)):
        eager, exact = (
            _folded(*(None if t is None else t.to(dtype) for t in branch)) for dtype in (FP32, torch.float64)
        )
        tensors, separate = ([*head, *tail] for head, tail in (both, others))
        for name, a, other, b, c in zip(("W", "b", "P", "p"), tensors, separate, exact, eager, strict=True):
            assert torch.equal(a, other), f"{name} of branch {i} differs between one launch and two"
            errors[f"{name} of branch {i}"] = assert_close_to_oracle(name, a, b, c.to(BF16))
    return errors


def _fold(*branch: Any) -> Any:
    w, b, p, c, scale, shift, gamma = branch
    return fold_both_forward((w, b), (p, c), BF16, column_scale=scale, column_shift=shift, row_scale=gamma)


def _folded(*branch: Any) -> tuple[Tensor, ...]:
    w, b, p, c, scale, shift, gamma = branch
    rows = torch.ones_like(c) if gamma is None else gamma
    return w * scale, b + w @ shift, p * rows[:, None], c * rows


def _partial_sums() -> Errors:
    """Totals of one to four tables. Each is once higher than a pass adds, once of one strip, and once narrower than the grid."""
    outputs = (
        *((FP32,) * tables for tables in (1, 2, 3, 4)),
        *((BF16,) * tables for tables in (4, 1, 2)),
        (BF16, FP32),
    )
    sizes = ((300, 36), (257, 16), (1, 28), (256, 20))  # strips and columns
    errors: dict[str, Any] = {}
    for dtypes, first in itertools.product(outputs, range(4)):
        partials = [randn(*sizes[(first + i) % 4], dtype=FP32) for i in range(len(dtypes))]
        with poisoned_memory():
            totals = [x.new_empty(x.shape[1], dtype=dtype) for x, dtype in zip(partials, dtypes, strict=True)]
            add_partial_sums(*zip(partials, totals, strict=True))
        for i, (x, total) in enumerate(zip(partials, totals, strict=True)):
            name = f"total {i} of {dtypes} from size {first} on"
            largest = x.double().cumsum(0).abs().max().item()
            errors[name] = assert_close_to_oracle(name, total, x.double().sum(0), x.sum(0).to(total.dtype), largest)
    return errors
