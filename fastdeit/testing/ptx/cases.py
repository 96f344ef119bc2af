"""Calls of the ops that between them launch every configuration that ships for an architecture, each held to the numerics contract.

A case fixes what the tables would choose from sizes that a CPU cannot run (attention's tiles, a GEMM's backend), and calls the op
through its public function in the dtypes of its rows.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fastdeit import ops
from fastdeit.kernels.attention import config as attention_config
from fastdeit.kernels.attention import forward as attention
from fastdeit.kernels.gemm.config import EPILOGUES, candidates, use_gemm
from fastdeit.kernels.gemm.fused_mlp import candidates as fused_mlp_candidates
from fastdeit.kernels.gemm.fused_mlp import use_fused_mlp
from fastdeit.kernels.runtime import column_sums
from fastdeit.kernels.runtime.architecture import has_descriptors
from fastdeit.testing.accuracy import Error, assert_as_accurate_as_eager, assert_close_to_oracle, poisoned_memory
from fastdeit.testing.ptx.augmentation_cases import augmentation
from fastdeit.testing.ptx.case_inputs import BF16, FP16, FP32, mlp_weights, norm_weights, randn, scales, under_autocast
from fastdeit.testing.ptx.norm_cases import normalisation, ragged
from fastdeit.testing.ptx.quantization_cases import eight_bit
from fastdeit.testing.ptx.tf32 import in_tf32_products, tf32

Errors = Mapping[str, tuple[Error, Error]]  # of outputs and gradients: maximum, RMS
TOKENS = 134  # two blocks of 64, or four of 32, and a tail of 6


class Case(NamedTuple):
    name: str
    run: Callable[[], Errors]

    @property
    def thin(self) -> bool:
        """Whether it belongs to the set that leaves out widths, head dimensions, tails and dtypes of kernels that it has."""
        return not any(re.search(pattern, self.name) for pattern in _LEFT_OUT)


_LEFT_OUT = (
    r"on subsets, C=1024",
    r"layer_norm(_mlp)? C=(192|768|1024|1280|8192)",
    r"D=(32|48|72|88|96|104|128)",
    r"tail=(32|64)",
    r"fp16|\bfloat16",
    r"mlp (gelu_tanh|quick)",
    r"augment 224",
    r"distillation C=1000 (float32|\w+ \w+ none|bfloat16 cross_entropy soft)",
)


def cases(arch: int) -> Iterator[Case]:
    """Every case for an architecture; to be run under `harness.executing(arch)`, with a seed set."""
    groups = (normalisation, _residual_linears, _attention, _losses, _gemms, _mlps, _fused_mlps, _embedding)
    for group in (*groups, augmentation, eight_bit, _column_sums, ragged):
        for name, function in group(arch):
            yield Case(name, function)


# ---- linear layers with a residual


def _residual_linears(arch: int) -> Iterator[tuple[str, Callable[[], Errors]]]:
    yield "linear, residual branch, bf16", functools.partial(_residual_linear, BF16)
    yield "linear, residual branch, autocast", functools.partial(_residual_linear, FP32)


def _linear(function: Callable, autocast: bool, activation: str | None = None, residual: bool = True) -> Callable:
    def call(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, stream: Tensor, scale: Tensor) -> Tensor:
        rest = dict(gamma=gamma, residual=stream, drop_path_scale=scale) if residual else {}
        return function(x, weight, bias, activation=activation, **rest)

    return under_autocast(call, autocast)


def _linear_inputs(dtype: torch.dtype, channels: int = 64, out: int = 272) -> list[Tensor]:
    return [
        randn(6, 33, channels, dtype=dtype),
        randn(out, channels, dtype=dtype, scale=channels**-0.5),
        randn(out, dtype=dtype, scale=0.1),
        randn(out, dtype=FP32 if dtype == FP32 else dtype, scale=0.2, shift=0.7),
        randn(6, 33, out, dtype=dtype),
        scales(6),
    ]


def _residual_linear(dtype: torch.dtype) -> Errors:
    pair = (_linear(f, dtype == FP32) for f in (ops.linear, ops.linear_reference))
    return assert_as_accurate_as_eager(*pair, *_linear_inputs(dtype), frozen=(5,))


# ---- attention


def _attention(arch: int) -> Iterator[tuple[str, Callable[[], Errors]]]:
    yield "add_layer_norm_attention autocast", _add_layer_norm_attention
    for case in attention_config.aot_cases(arch):
        yield f"attention {case.label}", functools.partial(_attend, case)
        if case.head_dim in (64, 80) and case.dtype == "bf16" and case.tail == 16:
            yield f"attention {case.label}, scores far below 0", functools.partial(_attend_below, case)
        wide = (case.head_dim > 64 and case.head_dim != 80) or case.dtype == "fp32"  # a pass of loads covers 8 rows
        if wide and case.tail == 16 and not case.config.descriptors:
            yield f"attention {case.label}, a tail of 11", functools.partial(_attend, case, tokens=64 + 11)
    if has_descriptors(arch):
        home = next(c for c in attention_config.aot_cases(arch) if c.config.descriptors and c.head_dim == 64)
        for keys in (128, 256):
            tiles = attention_config.one_program_tiles(keys)
            yield f"attention, one program, {keys} keys", functools.partial(_attend, home, tiles, keys - 3)


def _add_layer_norm_attention() -> Errors:
    """The attention branch of a block, whose bias gradients are column sums of attention's two biases."""
    x, branch = randn(2, TOKENS, 64, dtype=FP32), randn(2, TOKENS, 64)
    weights = [
        *norm_weights(FP32, 64),
        randn(192, 64, dtype=FP32, scale=0.1),
        randn(192, dtype=FP32, scale=0.1),
        randn(64, 64, dtype=FP32, scale=0.1),
        randn(64, dtype=FP32, scale=0.1),
    ]
    pair = (
        under_autocast(lambda x, branch, g, b, wq, bq, wp, bp, f=f: f(x, branch, g, b, 1e-6, wq, bq, wp, bp, 1))
        for f in (ops.add_layer_norm_attention, ops.add_layer_norm_attention_reference)
    )
    return assert_as_accurate_as_eager(*pair, x, branch, *weights)


def _attend(case: attention_config.Case, whole: Any = None, tokens: int = 0, below: bool = False) -> Errors:
    """whole: tiles of the backward in one program. below: scores of about -200, far below the zeros of keys past the end."""
    ragged = TOKENS + 5 if case.head_dim == 80 else TOKENS  # a tail of 11: more than one instruction's 8
    tokens = tokens or {16: ragged, 32: 128 + 20, 64: 192 - 3}[case.tail]
    config = case.config
    config = attention_config.Config(config.descriptors, config.forward, config.dq, config.dkv, whole)
    dtype = {"bf16": BF16, "fp16": FP16, "fp32": FP32}[case.dtype]
    heads = 2 if case.config.forward.owned == 64 and case.head_dim == 64 else 1
    qkv = randn(1, tokens, 3 * heads * case.head_dim, dtype=dtype)
    if below:
        qkv += torch.tensor([5, -5, 0], dtype=dtype).repeat_interleave(heads * case.head_dim)
    eager = in_tf32_products if dtype == FP32 else None
    with mock.patch.object(attention, "select_config", lambda *_: config), tf32(dtype == FP32):
        return assert_as_accurate_as_eager(ops.attention, ops.attention_reference, qkv, heads, eager=eager)


def _attend_below(case: attention_config.Case) -> Errors:
    """Scores far below 0 and three tails: with that of `_attend` each of a thread's four columns is the first past the end."""
    tails = (3, 9, 12) if case.head_dim == 64 else (3, 6, 12)
    calls = {tail: _attend(case, tokens=64 + tail, below=True) for tail in tails}
    return {f"{name}, tail of {tail}": errors for tail, found in calls.items() for name, errors in found.items()}


# ---- losses


def _losses(arch: int) -> Iterator[tuple[str, Callable[[], Errors]]]:
    for classes, dtype, base, kind, soft_target, labels in (
        (1000, BF16, "cross_entropy", "hard", True, False),
        (1000, BF16, "cross_entropy", "hard", False, True),
        (1000, BF16, "cross_entropy", "soft", True, False),
        (1000, BF16, "binary_cross_entropy", "hard", True, False),
        (1000, BF16, "cross_entropy", "none", True, False),
        (1000, FP32, "cross_entropy", "hard", True, False),
        (21841, BF16, "cross_entropy", "soft", True, False),
    ):
        name = f"distillation C={classes} {str(dtype)[6:]} {base} {kind} {'soft target' if soft_target else 'labels'}"
        yield name, functools.partial(_distil, classes, dtype, base, kind, soft_target, labels)
    rows = 1031  # ends within the second step of the sum over rows
    few_classes = functools.partial(_distil, 16, BF16, "cross_entropy", "none", True, False, batch=rows)
    yield f"distillation of {rows} rows", few_classes


def _distil(
    classes: int, dtype: torch.dtype, base: str, kind: str, soft_target: bool, labels: bool, batch: int = 6
) -> Errors:
    logits, dist = (randn(batch, classes, dtype=dtype, scale=3) for _ in range(2))
    target = torch.randint(classes, (batch,))
    if soft_target:
        target = torch.full((batch, classes), 0.1 / classes).scatter_(1, target[:, None], 0.9)
    teacher = (
        torch.randint(classes, (batch,), dtype=torch.int16) if labels else randn(batch, classes, dtype=dtype, scale=3)
    )
    options = dict(
        kind=kind, base=base, alpha=0.4, tau=3.0 if kind == "soft" else 1.0, label_smoothing=0.1 * (not soft_target)
    )
    given = (logits, None if kind == "none" else dist, target, None if kind == "none" else teacher)
    pair = (
        under_autocast(functools.partial(f, **options), dtype == BF16)
        for f in (ops.distillation_cross_entropy, ops.distillation_cross_entropy_reference)
    )
    return assert_as_accurate_as_eager(*pair, *given, frozen=(2, 3))


# ---- products with epilogues


def _gemms(arch: int) -> Iterator[tuple[str, Callable[[], Errors]]]:
    for epilogue in EPILOGUES:
        for gemm in candidates(arch, epilogue):
            name = f"linear {epilogue} {gemm.backend} {gemm.tile.rows}x{gemm.tile.columns}"
            yield f"{name} bf16", functools.partial(_gemm, gemm, epilogue, BF16)
    if arch in (80, 90):
        yield "linear activation fp16", functools.partial(_gemm, candidates(arch, "activation")[0], "activation", FP16)


def _gemm(gemm, epilogue: str, dtype: torch.dtype) -> Errors:
    activation, residual = EPILOGUES[epilogue], epilogue == "residual"
    given = _linear_inputs(FP32 if residual else dtype)
    frozen = (0, 1, 2, 3, 4, 5) if epilogue == "activation" else (5,)
    with use_gemm(gemm.backend, gemm.tile):
        if epilogue == "derivative":
            x, w1, b1, *_ = given
            w2, b2 = randn(48, 272, dtype=dtype, scale=272**-0.5), randn(48, dtype=dtype, scale=0.1)
            return assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, x, w1, b1, w2, b2)
        pair = (_linear(f, residual, activation, residual) for f in (ops.linear, ops.linear_reference))
        return assert_as_accurate_as_eager(*pair, *given, frozen=frozen)


def _mlps(arch: int) -> Iterator[tuple[str, Callable[[], Errors]]]:
    for activation, dtype in (("gelu", BF16), ("gelu_tanh", BF16), ("quick_gelu", BF16), ("gelu", FP16)):
        yield f"mlp {activation} {str(dtype)[6:]}", functools.partial(_mlp, activation, dtype)


def _mlp(activation: str, dtype: torch.dtype) -> Errors:
    x = randn(3, 21, 48, dtype=dtype)
    w1, b1 = randn(272, 48, dtype=dtype, scale=48**-0.5), randn(272, dtype=dtype, scale=0.1)
    w2, b2 = randn(48, 272, dtype=dtype, scale=272**-0.5), randn(48, dtype=dtype, scale=0.1)
    return assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, x, w1, b1, w2, b2, activation=activation)


def _fused_mlps(arch: int) -> Iterator[tuple[str, Callable[[], Errors]]]:
    for config in fused_mlp_candidates(arch):
        tile = f"{config.backend} {config.rows}x{config.hidden}"
        yield f"fused mlp {tile} bf16", functools.partial(_fused_mlp, config)
        for dtype in (FP32, BF16):
            name = f"fused add_layer_norm_mlp {tile} {'autocast' if dtype == FP32 else 'bf16'}"
            yield name, functools.partial(_fused_add_layer_norm_mlp, config, dtype)


def _fused_mlp(config) -> Errors:
    x, weights = randn(2, 83, 192), mlp_weights(BF16, 192, 320)
    with use_fused_mlp(config):
        return assert_as_accurate_as_eager(ops.mlp, ops.mlp_reference, x, *weights, frozen=range(5))


def _fused_add_layer_norm_mlp(config, dtype: torch.dtype) -> Errors:
    norm = norm_weights(dtype, 192)
    gamma, x, branch = randn(192, dtype=dtype, scale=0.2, shift=0.7), randn(2, 83, 192, dtype=dtype), randn(2, 83, 192)
    pair = (
        under_autocast(
            lambda x, branch, g, b, w1, b1, w2, b2, gamma, f=f: f(x, branch, g, b, 1e-6, w1, b1, w2, b2, gamma=gamma),
            dtype == FP32,
        )
        for f in (ops.add_layer_norm_mlp, ops.add_layer_norm_mlp_reference)
    )
    with use_fused_mlp(config):
        return assert_as_accurate_as_eager(
            *pair, x, branch, *norm, *mlp_weights(dtype, 192, 320), gamma, frozen=range(9)
        )


# ---- sums of columns by themselves


def _column_sums(arch: int) -> Iterator[tuple[str, Callable[[], Errors]]]:
    yield "column sums of attention's two biases", _sum_two_matrices


def _sum_two_matrices() -> Errors:
    rows = 2 * TOKENS + 3  # no multiple of the rows that a step adds
    matrices, later = (randn(rows, 64), randn(rows, 192)), list[column_sums.Table]()
    with poisoned_memory():
        found = column_sums.column_sums(*((x, FP32) for x in matrices), later=later)
        column_sums.add_partial_sums(*later)
    errors: dict[str, Any] = {}
    for i, (x, total) in enumerate(zip(matrices, found, strict=True)):
        largest = x.double().cumsum(0).abs().max().item()
        errors[f"sum {i}"] = assert_close_to_oracle(f"sum {i}", total, x.double().sum(0), x.float().sum(0), largest)
    return errors


# ---- patch embedding


def _embedding(arch: int) -> Iterator[tuple[str, Callable[[], Errors]]]:
    yield "patch_embedding autocast", _embed


def _embed() -> Errors:
    channels, patch, grid = 192, 8, 6
    given = [
        randn(3, 3, patch * grid, patch * grid, dtype=FP32),
        randn(channels, 3, patch, patch, dtype=FP32, scale=0.07),
        randn(channels, dtype=FP32, scale=0.1),
        randn(1, grid * grid, channels, dtype=FP32, scale=0.1),
        randn(1, 1, channels, dtype=FP32),
        randn(1, 1, channels, dtype=FP32),
    ]
    pair = (under_autocast(f) for f in (ops.patch_embedding, ops.patch_embedding_reference))
    return assert_as_accurate_as_eager(*pair, *given)
