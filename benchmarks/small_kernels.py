"""Every op forward and backward at a small, odd size, once a dtype: `python -m fastdeit.benchmarks.small_kernels`.

For compute-sanitizer, under which a kernel runs a hundred times slower. Kernels that small sizes do not take, or that no table
names yet, are asked for. Without a GPU the kernels are interpreted.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from fastdeit import backends, ops
from fastdeit.kernels.attention import config as attention_config
from fastdeit.kernels.attention.backward import attention_backward
from fastdeit.kernels.attention.forward import attention_forward
from fastdeit.kernels.gemm import config as gemm_config
from fastdeit.kernels.gemm import fused_mlp
from fastdeit.kernels.gemm.folded_weights import fold_both_forward
from fastdeit.kernels.runtime.architecture import architecture, multiprocessors
from fastdeit.testing import kernel_device, kernel_dtypes
from fastdeit.testing.merged_folds import folded_in_one_launch


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """The name and a call of each op, to be made at once; its result wants a gradient where there is a backward kernel for it."""

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, device=kernel_device()).to(dtype).requires_grad_()

    tokens, channels, heads = 17, 64, 1
    x, branch = randn(2, tokens, channels), randn(2, tokens, channels)
    weight, bias, gamma = randn(channels), randn(channels), randn(channels)
    scale = torch.tensor([0.0, 2.0], device=x.device)
    w1, b1, w2, b2 = randn(96, channels), randn(96), randn(channels, 96), randn(channels)
    yield "layer_norm", lambda: ops.layer_norm(x, weight, bias)
    yield (
        "add_layer_norm",
        lambda: torch.cat(ops.add_layer_norm(x, branch, weight, bias, gamma=gamma, drop_path_scale=scale)),
    )
    yield "attention", lambda: ops.attention(randn(2, tokens, 3 * channels), heads)
    yield "attention, 80", lambda: ops.attention(randn(1, tokens, 3 * 80), heads)
    q, k, v = (randn(2, heads, tokens, channels).transpose(1, 2) for _ in range(3))
    yield "attention_qkv", lambda: ops.attention_qkv(q, k, v)
    yield "mlp", lambda: ops.mlp(x, w1, b1, w2, b2)
    yield "linear", lambda: ops.linear(x, w1, b1, activation="gelu")
    options = dict(gamma=gamma, drop_path_scale=scale, residual=x)
    yield "linear, residual", lambda: ops.linear(x, w1[:channels], b1[:channels], **options)
    yield "layer_norm_mlp", lambda: ops.layer_norm_mlp(x, weight, bias, 1e-6, w1, b1, w2, b2, **options)
    for backend in ("triton", "tma"):
        with gemm_config.use_gemm(backend):
            yield f"mlp, {backend}", lambda: ops.mlp(x, w1, b1, w2, b2)
            yield f"linear, {backend}", lambda: ops.linear(x, w1[:channels], b1[:channels], **options)
    projections = randn(3 * channels, channels), randn(3 * channels), randn(channels, channels), randn(channels)
    yield (
        "add_layer_norm_attention",
        lambda: ops.add_layer_norm_attention(x, branch, weight, bias, 1e-6, *projections, heads)[1],
    )
    images, patches, positions = randn(2, 3, 19, 34), randn(channels, 3, 8, 8), randn(1, 10, channels)
    prefix = randn(1, 1, channels), randn(1, 1, channels)
    yield "patch_embedding", lambda: ops.patch_embedding(images, patches, bias, positions, *prefix)
    pixels, operation = (
        images.detach().to(torch.uint8),
        torch.full((2, 2, 8), 2.0, dtype=torch.float64, device=x.device),
    )
    yield "augment", lambda: ops.augment(pixels, operation)
    yield from quantization(x.detach(), branch.detach(), weight.detach(), bias.detach())
    narrow = randn(2, tokens, fused_mlp.CHANNELS.value), randn(128, 192), None, randn(192, 128), None
    for config in fused_mlp.candidates(architecture(x)):
        with fused_mlp.use_fused_mlp(config), torch.no_grad():
            yield f"mlp in one kernel, {config.backend}", lambda: ops.mlp(*narrow)
    if dtype != torch.float32:
        yield from descriptor_attention(randn(2, tokens, 3 * channels).detach())
        masters = [randn(*t.shape, dtype=torch.float32) for t in (x, weight, bias, w1, b1, w2, b2)]
        with torch.autocast(x.device.type, dtype):
            yield (
                "layer_norm_mlp, folded",
                lambda: ops.layer_norm_mlp(*masters[:3], 1e-6, *masters[3:], gamma=masters[2]),
            )
        yield (
            "folds of two branches, one launch",
            lambda: folds_of_two_branches([t.detach() for t in masters[1:]], dtype),
        )
    target = torch.tensor([1, 40], device=x.device)
    logits = [randn(2, 77) for _ in range(2)]
    yield "distillation", lambda: ops.distillation_cross_entropy(*logits, target, randn(2, 77).detach())


def folds_of_two_branches(masters: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The last weight, of four that one launch folds, as plans of training steps launch it."""
    scale, shift, w1, b1, w2, b2 = masters
    columns = dict(column_scale=scale, column_shift=shift)
    fold = functools.partial(fold_both_forward, (w1, b1), (w2, b2), dtype, **columns, row_scale=scale)
    _, (_, (last, _)) = folded_in_one_launch([fold, fold])
    return last


def quantization(x, branch, weight, bias) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """To the 8-bit formats that the architecture has, behind LayerNorm, attention and a product."""
    step = torch.tensor([0.05], device=x.device)
    for format in (torch.int8, torch.float8_e4m3fn)[: 1 if architecture(x) < 89 else 2]:

        def normalised(format=format):
            _, q, scale = ops.add_layer_norm_quantize(x, branch, weight, bias, dtype=format)
            return q.float() * scale[..., None]

        options = dict(column_scale=weight.float(), bias=bias, activation="gelu", scale=step, out_dtype=format)
        name = str(format).removeprefix("torch.")
        yield (
            f"attention_quantize, {name}",
            lambda format=format: ops.attention_quantize(torch.cat([x] * 3, 2), 1, step, dtype=format).float(),
        )
        yield f"add_layer_norm_quantize, {name}", normalised
        yield f"rescale, {name}", lambda options=options: ops.rescale(x, **options).float()


def descriptor_attention(qkv: torch.Tensor) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Of one head, forward, and backward in two kernels and in one, where attention takes descriptors."""
    tokens, arch = qkv.shape[1], architecture(qkv)
    if not attention_config.takes_descriptors(arch):
        return
    many = 1024, 1, tokens, tokens, qkv.shape[2] // 3  # so many samples fill any GPU
    config = attention_config.select_config(*many, qkv.element_size(), arch, multiprocessors(qkv), True)
    yield "attention, descriptors", lambda: attention_forward(qkv, 1, 0.125, config)[0]
    for form in (config, replace(config, one_program=attention_config.one_program_tiles(tokens))):

        def gradient(form=form):
            out, lse = attention_forward(qkv, 1, 0.125, form)
            return attention_backward(torch.ones_like(out), qkv, out, lse, 1, 0.125, form)

        yield f"its gradient in {'two kernels' if form.one_program is None else 'one kernel'}", gradient


def run(name: str, call: Callable[[], torch.Tensor]) -> bool:
    """Makes a call and backward of it, and prints how it went: whether it ended, with finite numbers.

    Raises:
        RuntimeError: the device can be used no more.
    """
    began = time.monotonic()
    try:
        result = call()
        if result.requires_grad:
            result.float().sum().backward()
        if not result.isfinite().all():
            raise ArithmeticError("the result is not finite")
        said = "ok"
    except Exception as error:
        said = f"FAILED, {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    print(f"{name}: {said}, {time.monotonic() - began:.1f} s", flush=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return said == "ok"


def main() -> int:
    """1 if one of them failed; the others are run all the same."""
    held = True
    with backends.use_backend("triton"):
        for dtype in kernel_dtypes():
            if dtype == torch.float32 and torch.cuda.is_available():
                continue  # IEEE products are the libraries'
            for name, call in calls(dtype):
                held &= run(f"{name} {str(dtype).removeprefix('torch.')}", call)
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
