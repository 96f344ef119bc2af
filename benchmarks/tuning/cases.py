"""What `fastdeit tune` measures: for every op the shapes that DeiT and ViT have, and the configurations to try at each."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import ops
from fastdeit.backends import use_backend
from fastdeit.benchmarks.baselines import op_baselines as baselines
from fastdeit.benchmarks.cases import by_importance
from fastdeit.kernels.attention import config as attention_config
from fastdeit.kernels.attention.backward import attention_backward
from fastdeit.kernels.attention.config import Tiles
from fastdeit.kernels.attention.forward import attention_forward, config_for
from fastdeit.kernels.gemm import config as gemm_config
from fastdeit.kernels.gemm import fused_mlp, linear
from fastdeit.kernels.mlp import activation as mlp
from fastdeit.kernels.norm import layer_norm
from fastdeit.kernels.runtime.architecture import architecture
from fastdeit.testing import kernel_device

# (batch, tokens, heads, head dimension): B at 224 and 384, B/32, Ti and B one image at a time, and DeiT III's huge model
ATTENTION = [(256, 197, 12, 64), (64, 577, 12, 64), (256, 50, 12, 64), (1, 197, 3, 64), (1, 577, 12, 64)]
ATTENTION += [(64, 257, 16, 80)]
CHANNELS = (768, 384, 192, 1024, 1280)
HIDDEN = (3072, 1536, 768)
# Batches of 198 tokens whose ranges of rows (gemm_config.around) meet: together they speak for 99 to 405,503 rows.
GEMM_BATCHES = (256, 64, 1024, 1, 16, 4)
GEMM_WIDTHS = (768, 384, 192)
STREAMS = ("fp32 stream", "low-precision stream")
# Epilogue, N and K in widths, and dtypes of the residual stream: fc1 in training, its pre-activation's gradient, fc1 in inference,
# fc2 and proj at a branch's end. A product with nothing but a bias is the library's own.
GEMM_FORMS = (
    ("activation_z", 4, 1, ("",)),
    ("derivative", 4, 1, ("",)),
    ("activation", 4, 1, ("",)),
    ("residual", 1, 4, STREAMS),
    ("residual", 1, 1, STREAMS),
)


@dataclass(frozen=True)
class Candidate:
    part: str  # which entry of the configuration it varies, such as "dq descriptors"
    config: Any  # that entry
    run: Callable[..., tuple[Tensor, ...]]
    present: bool  # it is what the op runs today

    @property
    def label(self) -> str:
        return f"{self.part} {self.config}"


@dataclass(frozen=True)
class Case:
    """Candidates for the same work, measured side by side. Cases of one group share an entry of the table."""

    name: str
    group: str
    batch: int
    tokens: int
    inputs: Callable[[int], tuple[Tensor, ...]]  # of a batch size
    reference: Callable[..., tuple[Tensor, ...]]  # plain PyTorch, for inputs of any dtype
    candidates: list[Candidate]
    baselines: dict[str, Callable[..., Any]] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)  # what a table that looks calls up knows it by


def cases(op: str, toy: bool) -> Iterator[Case]:
    """The cases of an op of `fastdeit tune`, those that matter most first."""
    dtype = torch.float16 if toy else torch.bfloat16
    if op == "attention":
        for shape in [(1, 20, 1, 64)] if toy else ATTENTION:
            yield from _attention(shape, dtype, toy)
    elif op == "layer_norm":
        for channels in (32, 64) if toy else CHANNELS:
            yield _layer_norm(channels, dtype, toy)
    else:
        for hidden in (32, 64) if toy else HIDDEN:
            yield _mlp(hidden, dtype, toy)
        yield from _gemms(toy)
        for dtype in (torch.float16,) if toy else (torch.bfloat16, torch.float16):
            for batch in (2,) if toy else GEMM_BATCHES:
                yield _fused_mlp(batch, dtype, "mlp", "", 1, toy)
                for stream in STREAMS:
                    yield _fused_mlp(batch, dtype, "add_layer_norm_mlp", stream, len(STREAMS), toy)


def _attention(shape: tuple[int, int, int, int], dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    batch, tokens, heads, head_dim = shape
    scale = head_dim**-0.5
    probe = torch.empty(0, device=kernel_device(), dtype=dtype)
    now = config_for(probe, batch, heads, tokens, tokens, head_dim, True)
    pointers = config_for(probe, batch, heads, tokens, tokens, head_dim, False)
    bases = {"pointers": pointers}
    if attention_config.has_descriptors(architecture(probe)):
        bases["descriptors"] = replace(now, descriptors=True, one_program=None)
    group = f"D={head_dim}{'' if now.forward.owned >= 64 else ' narrow'}"
    where = f"B={batch} N={tokens} H={heads} D={head_dim}"

    def inputs(size):
        qkv = torch.randn(size, tokens, 3 * heads * head_dim, device=kernel_device(), dtype=dtype)
        dout = torch.randn(size, tokens, heads * head_dim, device=kernel_device(), dtype=dtype)
        return qkv, dout, *attention_forward(qkv, heads, scale)

    def forward_reference(qkv, *_):
        return (ops.attention_reference(qkv, heads),)

    def backward_reference(qkv, dout, *_):
        return _gradients(lambda x: (ops.attention_reference(x, heads),), (qkv,), (dout,))

    def forward(part, base, tiles, present):
        config = replace(base, forward=tiles)
        return Candidate(part, tiles, lambda qkv, *_: attention_forward(qkv, heads, scale, config)[:1], present)

    def backward(part, tiles, config, present):
        def run(qkv, dout, out, lse):
            return (attention_backward(dout, qkv, out, lse, heads, scale, config),)

        return Candidate(part, tiles, run, present)

    def sdpa(direction):
        run = {
            n: baselines.DIRECTIONS[direction](baselines.sdpa(b, heads), 1) for n, b in baselines.SDPA_BACKENDS.items()
        }
        return {n: lambda qkv, dout, *_, r=r: r(qkv, dout) for n, r in run.items() if n != "SDPA math" and not toy}

    forwards, backwards = [], []
    for form, base in bases.items():
        chosen = now.descriptors == base.descriptors
        for tiles in _tiles(base.forward, toy):
            forwards.append(forward(f"forward {form}", base, tiles, chosen and tiles == now.forward))
        for entry in ("dq", "dkv"):
            for tiles in _tiles(getattr(base, entry), toy):
                present = chosen and now.one_program is None and tiles == getattr(now, entry)
                backwards.append(backward(f"{entry} {form}", tiles, replace(base, **{entry: tiles}), present))
    if "descriptors" in bases and attention_config.one_program_fits(tokens, head_dim):
        first = attention_config.one_program_tiles(tokens)
        for tiles in [first] if toy else [first, replace(first, num_stages=3), replace(first, streamed=16)]:
            config = replace(bases["descriptors"], one_program=tiles)
            backwards.append(backward("whole", tiles, config, tiles == now.one_program))
    call = dict(head_dim=head_dim, tokens=tokens, batch_heads=batch * heads)
    common = dict(group=group, batch=batch, tokens=tokens, inputs=inputs, call=call)
    name = f"attention forward {where}"
    yield Case(name, **common, reference=forward_reference, candidates=forwards, baselines=sdpa("forward"))
    name = f"attention backward {where}"
    yield Case(name, **common, reference=backward_reference, candidates=backwards, baselines=sdpa("backward"))


def _tiles(base: Tiles, toy: bool) -> list[Tiles]:
    """The base first, then what else may be faster."""
    if toy:
        return [base, Tiles(16, 16)]
    sizes = [(32, 64), (64, 32), (64, 64), (64, 128), (128, 64)]
    others = [Tiles(*size, num_stages=stages) for size in sizes for stages in (2, 3)]
    others += [Tiles(128, block, num_warps=8) for block in (32, 64, 128)]
    return list(dict.fromkeys([base, *others]))


def _layer_norm(channels: int, dtype: torch.dtype, toy: bool) -> Case:
    """Forward and backward of the residual addition with its LayerNorm, under autocast: the stream is fp32."""
    batch, tokens = (2, 3) if toy else (256, 197)
    now = layer_norm.select_config(channels, architecture(torch.empty(0, device=kernel_device())))

    def inputs(size):
        def randn(*shape, dtype=torch.float32):
            return torch.randn(shape, device=kernel_device(), dtype=dtype)

        stream = size, tokens, channels
        x, branch, weight, bias = randn(*stream), randn(*stream, dtype=dtype), randn(channels), randn(channels)
        return x, branch, weight, bias, randn(*stream), randn(*stream, dtype=dtype)

    def reference(x, branch, weight, bias, dx_new, dy):
        def function(*args):
            x_new, y = ops.add_layer_norm_reference(*args, out_dtype=dy.dtype)
            return x_new, y

        args = (x, branch, weight, bias)
        return *function(*args), *_gradients(function, args, (dx_new, dy))

    def candidate(config):
        def run(x, branch, weight, bias, dx_new, dy):
            x_new, y, mean, rstd = layer_norm.layer_norm_forward(
                x, weight, bias, 1e-6, dy.dtype, branch=branch, config=config
            )
            dtypes = dict(dx_dtype=x.dtype, dbranch_dtype=branch.dtype)
            dtypes |= dict(dweight_dtype=weight.dtype, dbias_dtype=bias.dtype)
            gradients = layer_norm.layer_norm_backward(
                dy, x_new, mean, rstd, weight, dx_new=dx_new, config=config, **dtypes
            )
            return x_new, y, *gradients[:4]

        return Candidate("config", config, run, config == now)

    tried = itertools.product((1, 2), (2,)) if toy else itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 6, 12, 16))
    configs = dict.fromkeys([now, *(layer_norm.Config(*entry) for entry in tried)])
    name = f"layer_norm C={channels} rows={batch * tokens}"
    return Case(name, str(channels), batch, tokens, inputs, reference, [candidate(c) for c in configs])


def _mlp(hidden: int, dtype: torch.dtype, toy: bool) -> Case:
    """GELU forward and backward with the bias gradient, the pointwise half of an MLP."""
    batch, tokens = (2, 3) if toy else (256, 197)
    now = mlp.select_config()

    def inputs(size):
        return tuple(torch.randn(size * tokens, hidden, device=kernel_device(), dtype=dtype) for _ in range(2))

    def reference(z, dh):
        (dz,) = _gradients(lambda z: (F.gelu(z),), (z,), (dh,))
        return F.gelu(z), dz, dz.sum(0)

    def candidate(config):
        def run(z, dh):
            h = mlp.activation_forward(z, "gelu", config)
            dz, _, dbias = mlp.activation_backward(dh, z, "gelu", dbias_dtype=z.dtype, config=config)
            return h, dz, dbias

        return Candidate("config", config, run, config == now)

    configs = [now]
    for num_warps, values, columns in [(1, 8, 64)] if toy else itertools.product((2, 4, 8), (8, 16), (128, 256, 512)):
        size = 32 * num_warps * values  # values of each stream a thread
        configs.append(mlp.Config(size, max(size // columns, 1), columns, num_warps))
    name = f"mlp hidden={hidden} rows={batch * tokens}"
    return Case(name, "all", batch, tokens, inputs, reference, [candidate(c) for c in dict.fromkeys(configs)])


def _gemms(toy: bool) -> Iterator[Case]:
    """Every product with an epilogue, the library's with its pointwise kernels beside ours with the epilogue inside."""
    batches, widths = ((2,), (16,)) if toy else (GEMM_BATCHES, GEMM_WIDTHS)
    for dtype in (torch.float16,) if toy else (torch.bfloat16, torch.float16):
        for batch, width, (epilogue, n, k, streams) in by_importance(batches, widths, GEMM_FORMS):
            for stream in streams:
                yield _gemm(batch, 3 if toy else 198, n * width, k * width, dtype, epilogue, stream, len(streams), toy)


def _gemm(batch, tokens, N, K, dtype: torch.dtype, epilogue: str, stream: str, streams: int, toy: bool) -> Case:
    M = batch * tokens
    arch = architecture(torch.empty(0, device=kernel_device()))
    now = gemm_config.select_gemm(M, N, K, dtype, epilogue, arch)

    def inputs(size):
        def randn(*shape, dtype=dtype):
            return torch.randn(shape, device=kernel_device()).to(dtype)

        rows = randn(size * tokens, K)
        if epilogue == "derivative":
            return rows, randn(K, N) * K**-0.5, randn(size * tokens, N)
        weight, bias = randn(N, K) * K**-0.5, randn(N)
        if epilogue != "residual":
            return rows, weight, bias
        kept = torch.rand(size, device=kernel_device()) < 0.9  # drop path at 0.1
        residual = randn(size * tokens, N, dtype=torch.float32 if stream == "fp32 stream" else dtype)
        return rows, weight, bias, randn(N, dtype=residual.dtype), kept / 0.9, residual

    def call(rows, weight, *rest):
        if epilogue == "derivative":
            return linear.activation_gradient(rows, weight, *rest, "gelu", dbias_dtype=torch.float32)
        if epilogue != "residual":
            out, z = linear.linear_forward(rows, weight, *rest, activation="gelu", needs_z=epilogue == "activation_z")
            return (out,) if z is None else (out, z)
        bias, gamma, drop_path_scale, residual = rest
        keywords = dict(gamma=gamma, drop_path_scale=drop_path_scale, residual=residual, out_dtype=residual.dtype)
        return linear.linear_forward(rows, weight, bias, **keywords)[:1]

    def reference(rows, weight, *rest):
        if epilogue == "derivative":
            (dz,) = _gradients(lambda z: (F.gelu(z),), rest, (rows @ weight,))
            return dz, F.gelu(*rest), dz.sum(0, dtype=torch.promote_types(dz.dtype, torch.float32))
        z = F.linear(rows, weight, rest[0])
        if epilogue != "residual":
            return (F.gelu(z), z)[: 2 if epilogue == "activation_z" else 1]
        _, gamma, drop_path_scale, residual = rest
        factor = drop_path_scale.to(residual.dtype).repeat_interleave(tokens)[:, None]
        return (residual + z * gamma * factor,)

    def candidate(gemm):
        def run(*arguments):
            with gemm_config.use_gemm(gemm.backend, gemm.tile):
                return call(*arguments)

        return Candidate("gemm", gemm, run, gemm == now)

    tried = (
        (gemm_config.Gemm("triton", gemm_config.Tile(32, 64, 32)),) if toy else gemm_config.candidates(arch, epilogue)
    )
    found = [candidate(gemm) for gemm in dict.fromkeys([gemm_config.CUBLAS, now, *tried])]
    key = dict(M=M, N=N, K=K, dtype=str(dtype), epilogue=epilogue, cases=streams)
    name = " ".join(filter(None, (f"mlp {epilogue} M={M} N={N} K={K}", str(dtype).removeprefix("torch."), stream)))
    return Case(name, f"{epilogue} {N}x{K}", batch, tokens, inputs, reference, found, call=key)


def _fused_mlp(batch: int, dtype: torch.dtype, form: str, stream: str, streams: int, toy: bool) -> Case:
    """DeiT-Ti's MLP for inference, in library products beside one kernel."""
    tokens, channels, hidden = (3, 192, 64) if toy else (198, 192, 768)
    arch = architecture(torch.empty(0, device=kernel_device()))
    now = fused_mlp.select_config(batch * tokens, hidden, dtype, form, arch)
    op, plain = getattr(ops, form), getattr(ops, f"{form}_reference")
    wide = torch.float32 if stream == "fp32 stream" else dtype

    def inputs(size):
        def randn(*shape, dtype=wide):
            return torch.randn(shape, device=kernel_device()).to(dtype)

        w1, w2 = randn(hidden, channels) * channels**-0.5, randn(channels, hidden) * hidden**-0.5
        layers = w1, randn(hidden), w2, randn(channels)
        x = randn(size, tokens, channels)
        if form == "mlp":
            return x, *layers
        return x, randn(*x.shape, dtype=dtype), randn(channels), randn(channels), *layers

    def call(function, x, *rest):
        options = () if form == "mlp" else (1e-6,)
        at = 3 if options else 0  # after branch, weight and bias of the norm
        with torch.autocast(x.device.type, dtype, enabled=x.dtype == torch.float32):
            results = function(x, *rest[:at], *options, *rest[at:])
        return results if isinstance(results, tuple) else (results,)

    def candidate(config):
        def run(*arguments):
            with fused_mlp.use_fused_mlp(config), use_backend("triton"):
                return call(op, *arguments)

        return Candidate("whole", config, run, config == now)

    tried = (fused_mlp.Config("tma", 16, 32, 4, 2),) if toy else fused_mlp.candidates(arch)
    found = [candidate(config) for config in dict.fromkeys([None, now, *tried])]
    key = dict(M=batch * tokens, hidden=hidden, dtype=str(dtype), form=form, cases=streams)
    name = " ".join(filter(None, (f"mlp whole {form} M={batch * tokens}", str(dtype).removeprefix("torch."), stream)))
    return Case(name, form, batch, tokens, inputs, functools.partial(call, plain), found, call=key)


def _gradients(function, args, upstream) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        wrt = [a.detach().requires_grad_() for a in args]
        return torch.autograd.grad(function(*wrt), wrt, upstream)
