"""What `fastdeit tune` measures: for every op the shapes that DeiT and ViT have, and the configurations to try at each."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import ops
from fastdeit.benchmarks import peers
from fastdeit.kernels import attention_config, layer_norm, mlp
from fastdeit.kernels.architecture import architecture
from fastdeit.kernels.attention import attention_forward, config_for
from fastdeit.kernels.attention_backward import attention_backward
from fastdeit.kernels.attention_config import Tiles
from fastdeit.testing import kernel_device

# (batch, tokens, heads, head dimension): B at 224 and 384, B/32, Ti and B one image at a time, and DeiT III's huge model
ATTENTION = [(256, 197, 12, 64), (64, 577, 12, 64), (256, 50, 12, 64), (1, 197, 3, 64), (1, 577, 12, 64)]
ATTENTION += [(64, 257, 16, 80)]
CHANNELS = (768, 384, 192, 1024, 1280)
HIDDEN = (3072, 1536, 768)


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
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    call: dict[str, int] = field(default_factory=dict)  # what a hand-over to a peer would be decided by


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


def _attention(shape: tuple[int, int, int, int], dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    batch, tokens, heads, head_dim = shape
    scale = head_dim**-0.5
    probe = torch.empty(0, device=kernel_device(), dtype=dtype)
    now = config_for(probe, batch, heads, tokens, tokens, head_dim, True)
    pointers = config_for(probe, batch, heads, tokens, tokens, head_dim, False)
    bases = {"pointers": pointers}
    if attention_config.has_descriptors(architecture(probe)):
        bases["descriptors"] = replace(now, descriptors=True, whole=None)
    group = f"D={head_dim}{'' if now.forward.own >= 64 else ' narrow'}"
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
        run = {n: peers.DIRECTIONS[direction](peers.sdpa(b, heads), 1) for n, b in peers.SDPA_BACKENDS.items()}
        return {n: lambda qkv, dout, *_, r=r: r(qkv, dout) for n, r in run.items() if n != "SDPA math" and not toy}

    forwards, backwards = [], []
    for form, base in bases.items():
        chosen = now.descriptors == base.descriptors
        for tiles in _tiles(base.forward, toy):
            forwards.append(forward(f"forward {form}", base, tiles, chosen and tiles == now.forward))
        for entry in ("dq", "dkv"):
            for tiles in _tiles(getattr(base, entry), toy):
                present = chosen and now.whole is None and tiles == getattr(now, entry)
                backwards.append(backward(f"{entry} {form}", tiles, replace(base, **{entry: tiles}), present))
    if "descriptors" in bases and attention_config.whole_fits(tokens, head_dim):
        first = attention_config.whole_tiles(tokens)
        for tiles in [first] if toy else [first, replace(first, num_stages=3), replace(first, block=16)]:
            config = replace(bases["descriptors"], whole=tiles)
            backwards.append(backward("whole", tiles, config, tiles == now.whole))
    call = dict(head_dim=head_dim, tokens=tokens, batch_heads=batch * heads)
    common = dict(group=group, batch=batch, tokens=tokens, inputs=inputs, call=call)
    name = f"attention forward {where}"
    yield Case(name, **common, reference=forward_reference, candidates=forwards, peers=sdpa("forward"))
    name = f"attention backward {where}"
    yield Case(name, **common, reference=backward_reference, candidates=backwards, peers=sdpa("backward"))


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


def _gradients(function, args, upstream) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        wrt = [a.detach().requires_grad_() for a in args]
        return torch.autograd.grad(function(*wrt), wrt, upstream)
