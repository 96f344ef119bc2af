"""Configurations that a call can reach and the catalog does not list: odd widths and lengths, dtypes mixed, frozen inputs.

The ops are called with random arguments, on the CPU and for a given architecture. Each launch is recorded instead of made: the
record lists what a GPU of this architecture would compile.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdeit import backends, ops
from fastdeit.aot import catalog
from fastdeit.kernels.attention.config import HEAD_DIM_SPLITS
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import LIMITS, nominal_device
from fastdeit.kernels.runtime.launch import cpu_launches

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_TYPES |= {torch.int64: "i64", torch.int32: "i32", torch.int8: "i8"}
_MOST_CALLS = 2000  # more would only find what was found


def sample(arch: int, count: int, seed: int = 0) -> list[AotConfig]:
    """`count` configurations, fewer if calls reach no more, none of them in the catalog, in the order in which calls reach them."""
    shipped = catalog.aot_configs(arch) if arch in catalog.ARCHITECTURES else ()
    known = {catalog.row_key(row, arch) for row in shipped}
    found: dict[str, AotConfig] = {}
    draw = random.Random(seed)
    for _ in range(_MOST_CALLS):
        if len(found) >= count:
            break
        new = {key: row for row in reached(draw, arch) if (key := catalog.row_key(row, arch)) not in known}
        if unseen := sorted(new.keys() - found.keys()):
            key = draw.choice(unseen)  # one of each call, so that no op fills the sample
            found[key] = new[key]
    return list(found.values())


def reached(draw: random.Random, arch: int) -> list[AotConfig]:
    """The configurations that one random call launches, forward and backward."""
    with recorded_launches(arch) as rows:
        call, inputs = _CALLS[draw.randrange(len(_CALLS))](draw)
        autocast = draw.random() < 0.5 and any(t.dtype == torch.float32 for t in inputs)
        for t in inputs:
            t.requires_grad_(t.is_floating_point() and draw.random() < 0.7)
        with torch.autocast("cpu", draw.choice([torch.bfloat16, torch.float16]), enabled=autocast):
            outputs = call(*inputs)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])
    return rows


@contextlib.contextmanager
def recorded_launches(arch: int) -> Iterator[list[AotConfig]]:
    """Ops take their kernels for tensors on the CPU, as on the given architecture; the list gets the launches, and none is made."""
    rows: list[AotConfig] = []

    def launch(kernel, grid, args, constexprs, num_warps, num_stages, fp_fusion, maxnreg):
        row = as_config(kernel, args, constexprs, num_warps, num_stages)
        rows.append(replace(row, fp_fusion=fp_fusion, maxnreg=maxnreg))

    with (
        cpu_launches(launch),
        backends.kernels_for_all_tensors(),
        nominal_device(arch),
    ):
        yield rows


def as_config(kernel: Any, args: tuple, constexprs: tuple, num_warps: int, num_stages: int) -> AotConfig:
    """A launch's configuration, by the types of its arguments."""
    run_time = [p.name for p in kernel.params if not p.is_constexpr]
    names = [p.name for p in kernel.params if p.is_constexpr]
    given = dict(zip(run_time, args, strict=True))
    signature = {name: _type(arg) for name, arg in given.items() if arg is not None}
    unaligned = tuple(n for n, arg in given.items() if isinstance(arg, Tensor) and arg.data_ptr() % 16)
    values = dict(zip(names, constexprs, strict=True)) | {n: None for n, arg in given.items() if arg is None}
    label = ", ".join([*(f"{n}={t}" for n, t in signature.items()), *(f"{n}={v}" for n, v in values.items())])
    return AotConfig(kernel, signature, values, num_warps, num_stages, label, matrix=False, unaligned=unaligned)


def faults(row: AotConfig, arch: int) -> list[str]:
    """Why a GPU could not run a configuration, as phrases: it does not compile, or needs more shared memory than there is."""
    try:
        found = catalog.compile_config(row, arch)
    except Exception as error:  # the compiler has no exception of its own
        return [f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"]
    most = LIMITS[arch].shared_per_block
    if found.shared_bytes > most:
        return [f"{found.shared_bytes} bytes of shared memory, a block has {most}"]
    return [] if found.blocks_per_sm else ["no block fits a multiprocessor"]


def _type(arg: Any) -> str:
    if isinstance(arg, TensorDescriptor):
        return f"tensordesc<{_TYPES[arg.base.dtype]}{list(arg.block_shape)}>"
    if isinstance(arg, Tensor):
        return f"*{_TYPES[arg.dtype]}"
    return "fp32" if isinstance(arg, float) else "i32" if -(2**31) <= arg < 2**31 else "i64"


# ---- calls: each draws an op and its tensors

_Call = tuple[Callable, list[Tensor]]


def _tensor(draw: random.Random, *shape: int, dtype: torch.dtype, plain: bool = False) -> Tensor:
    """Zeros of this shape; one time in three off a 16-byte boundary, or with a gap behind each row."""
    layout = "plain" if plain else draw.choice(["plain"] * 4 + ["offset", "gap"])
    if layout == "offset":
        return torch.zeros(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)
    if layout == "gap":
        return torch.zeros(*shape[:-1], shape[-1] + draw.choice([1, 4, 8]), dtype=dtype)[..., : shape[-1]]
    return torch.zeros(shape, dtype=dtype)


def _dtype(draw: random.Random) -> torch.dtype:
    return draw.choice([torch.bfloat16, torch.float16, torch.float32])


def _width(draw: random.Random) -> int:
    return draw.choice([192, 384, 768, 1024, 33, 100, 257, 1280, 40, 5000])


def _tokens(draw: random.Random) -> int:
    return draw.choice([1, 17, 33, 65, 130, 197, 198, 257])


def _attention(draw: random.Random) -> _Call:
    head_dim, heads, batch = draw.choice(sorted(HEAD_DIM_SPLITS)), draw.choice([1, 2]), draw.choice([1, 140])
    dtype, tokens = _dtype(draw), _tokens(draw)
    if draw.random() < 0.3:
        q, k, v = (_tensor(draw, batch, n, heads, head_dim, dtype=dtype) for n in (tokens, *[_tokens(draw)] * 2))
        return ops.attention_qkv, [q, k, v]
    qkv = _tensor(draw, batch, tokens, 3 * heads * head_dim, dtype=dtype)
    return lambda x: ops.attention(x, heads), [qkv]


def _attention_quantize(draw: random.Random) -> _Call:
    """To int8, which every architecture has."""
    head_dim, heads, batch = draw.choice(sorted(HEAD_DIM_SPLITS)), draw.choice([1, 2]), draw.choice([1, 140])
    qkv = _tensor(draw, batch, _tokens(draw), 3 * heads * head_dim, dtype=_dtype(draw))
    return lambda x: ops.attention_quantize(x, heads, torch.ones(1), dtype=torch.int8), [qkv]


def _norm(draw: random.Random) -> _Call:
    channels, stream, low = _width(draw), _dtype(draw), _dtype(draw)
    x, branch = (_tensor(draw, 2, 5, channels, dtype=t) for t in (stream, low))
    weight, bias, gamma = (torch.zeros(channels, dtype=draw.choice([stream, torch.float32])) for _ in range(3))
    scale = draw.choice([None, torch.ones(2)])
    if draw.random() < 0.5:
        return ops.layer_norm, [x, weight, bias]
    if draw.random() < 0.5:
        added = lambda x, b, w, v: ops.add_layer_norm(x, b, w, v, drop_path_scale=scale)  # noqa: E731
        return added, [x, branch, weight, bias]
    scaled = lambda x, b, w, v, g: ops.add_layer_norm(x, b, w, v, gamma=g, drop_path_scale=scale)  # noqa: E731
    return scaled, [x, branch, weight, bias, gamma]


def _mlp(draw: random.Random) -> _Call:
    channels, hidden, dtype = _width(draw), draw.choice([64, 65, 96, 130, 768]), _dtype(draw)
    x = _tensor(draw, draw.choice([1, 7, 300]), channels, dtype=dtype)
    shapes = (hidden, channels), (hidden,), (channels, hidden), (channels,)
    weights = [torch.zeros(s, dtype=dtype) for s in shapes]
    activation = draw.choice(["gelu", "gelu_tanh", "quick_gelu", "silu"])
    if draw.random() < 0.3:
        return lambda *t: ops.linear(*t, activation=activation), [x, *weights[:2]]
    return lambda *t: ops.mlp(*t, activation=activation), [x, *weights]


def _block(draw: random.Random) -> _Call:
    channels, hidden, dtype = draw.choice([192, 384, 40, 48, 100]), draw.choice([72, 96, 256]), _dtype(draw)
    x, branch = (_tensor(draw, 2, 35, channels, dtype=dtype) for _ in range(2))
    norm, shift, gamma = (torch.zeros(channels, dtype=dtype) for _ in range(3))
    scale = draw.choice([None, torch.ones(2)])

    def weights(inner: int, outputs: int) -> list[Tensor]:
        return [torch.zeros(s, dtype=dtype) for s in ((inner, channels), (inner,), (channels, outputs), (channels,))]

    if draw.random() < 0.5:

        def mlp(x, b, n, s, g, *w):
            return ops.add_layer_norm_mlp(x, b, n, s, 1e-6, *w, gamma=g, drop_path_scale=scale)

        return mlp, [x, branch, norm, shift, gamma, *weights(hidden, hidden)]

    def attention(x, b, n, s, g, *w):
        return ops.add_layer_norm_attention(x, b, n, s, 1e-6, *w, 1, gamma=g, drop_path_scale=scale)

    return attention, [x, branch, norm, shift, gamma, *weights(96, 32)]


def _embedding(draw: random.Random) -> _Call:
    channels, dtype, more = draw.choice([192, 384, 33, 36]), _dtype(draw), draw.choice([0, 1])
    tensors = [torch.zeros(s, dtype=dtype) for s in ((3, 3, 33, 49), (channels, 3, 16, 16), (channels,))]
    tensors += [torch.zeros(s, dtype=dtype) for s in ((1, 7 + more, channels), *[(1, 1, channels)] * (1 + more))]
    return ops.patch_embedding, tensors


def _distillation(draw: random.Random) -> _Call:
    classes, dtype = draw.choice([10, 1000, 1001, 5000, 21841]), _dtype(draw)
    kind, base = draw.choice(["none", "hard", "soft"]), draw.choice(["cross_entropy", "binary_cross_entropy"])
    soft = base == "binary_cross_entropy" or draw.random() < 0.5
    target = torch.zeros(4, classes, dtype=draw.choice([torch.float32, dtype])) if soft else torch.zeros(4).long()
    teacher = None if kind == "none" else _tensor(draw, 4, classes, dtype=_dtype(draw))

    def loss(head: Tensor, dist: Tensor | None = None) -> Tensor:
        return ops.distillation_cross_entropy(head, dist, target, teacher, kind=kind, base=base, tau=2.0)

    heads = 1 if kind == "none" else 2
    return loss, [_tensor(draw, 4, classes, dtype=dtype) for _ in range(heads)]


_CALLS = (_attention, _attention, _attention_quantize, _norm, _mlp, _block, _embedding, _distillation)
