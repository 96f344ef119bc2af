"""What a block launches and keeps for backward, fused and in timm, counted on the CPU: no GPU, no time, no interpreter.

The fused model takes its fused path with every kernel launch left out, so that its results are noise and its launches a number.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastdeit
from fastdeit import backends
from fastdeit.kernels.runtime.launch import cpu_launches
from fastdeit.ops import matmul

# Operations that launch nothing on a GPU: views and allocations.
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "as_strided",
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "t",
    "transpose",
    "permute",
    "expand",
    "unsqueeze",
    "squeeze",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "unbind",
    "promote_types",
}
PRECISIONS = ("amp", "bf16")
BATCHES = (8, 4)  # of what grows with the batch; the rate leaves whole samples of both
RATE = 0.25


def counts(name: str = "deit_base_distilled_patch16_224", img_size: int = 64) -> dict[str, dict[str, float]]:
    """By precision and form (`fused`, `eager`) what one block in the middle of a model adds, in a training step.

    Launches forward and backward, and bytes saved for backward per token and channel. Two models that differ by a block are
    compared, so that embedding, heads and the last block, which is fused in its own way, do not count; two batch sizes for what is
    saved, so that weights and their casts do not.

    Args:
        name: timm's, of a vision transformer.
        img_size: small images will do, since nothing depends on the number of tokens.
    """
    found = {}
    for precision in PRECISIONS:
        for form in ("fused", "eager"):
            models = [_model(name, img_size, depth, precision, fused=form == "fused") for depth in (3, 2)]
            with kernels_left_out() as kernels:
                launches = [_launches(model, img_size, precision, kernels) for model in models]
                kept = [[_saved_bytes(model, batch, img_size, precision) for batch in (4, 2)] for model in models]
            (four, two), (four_less, two_less) = kept
            elements = 2 * models[0].pos_embed.shape[1] * models[0].embed_dim
            found[f"{precision} {form}"] = dict(
                launches_forward=launches[0][0] - launches[1][0],
                launches_backward=launches[0][1] - launches[1][1],
                saved_bytes=round((four - two - four_less + two_less) / elements, 3),
            )
    return found


def counts_with_stochastic_depth(
    name: str = "deit_base_distilled_patch16_224", img_size: int = 64
) -> dict[str, dict[str, float]]:
    """By precision and form what one block in the middle of a model adds where every branch drops a quarter of the samples.

    The forms are timm, its mask in fused blocks, and branches that run on the samples that are left (`drop_path="skip"`). Counted
    are millions of FLOPs per token of the batch, forward and backward, by PyTorch's FlopCounterMode, and bytes saved for backward
    per token and channel. PyTorch counts no fused attention on a CPU: timm's is made of its matrix products here, four in backward,
    where a fused one is counted with five.

    Args:
        name, img_size: as `counts` has them.
    """
    found = {}
    for precision in PRECISIONS:
        for form, mode in (("timm", None), ("mask", "mask"), ("skip", "skip")):
            models = [_model(name, img_size, depth, precision, fused=mode is not None) for depth in (3, 2)]
            for model in models:
                for block in model.blocks:
                    block.drop_path1, block.drop_path2 = DropPath(RATE), DropPath(RATE)
                if mode is not None:
                    fastdeit.accelerate(model, drop_path=mode)
            with kernels_left_out():
                kept = [[_saved_bytes(model, batch, img_size, precision) for batch in BATCHES] for model in models]
            with kernels_left_out(registered=True), sdpa_kernel(SDPBackend.MATH):
                flops = [_flops(model, BATCHES[-1], img_size, precision) for model in models]
            (more, less), (more_without, less_without) = kept
            tokens = BATCHES[-1] * models[0].pos_embed.shape[1]
            forward, backward = (with_it - without for with_it, without in zip(*flops, strict=True))
            found[f"{precision} {form}"] = dict(
                mflop_forward=forward / tokens / 1e6,
                mflop_backward=backward / tokens / 1e6,
                saved_bytes=round((more - less - more_without + less_without) / tokens / models[0].embed_dim, 3),
            )
    return found


def _model(name: str, img_size: int, depth: int, precision: str, *, fused: bool) -> nn.Module:
    model = timm.create_model(name, img_size=img_size, depth=depth, drop_path_rate=0.0)
    if fused:
        fastdeit.accelerate(model)
    return model if precision == "amp" else model.bfloat16()


@contextlib.contextmanager
def kernels_left_out(*, registered: bool = False) -> Iterator[list[str]]:
    """Ops take their kernels for tensors on the CPU and launch nothing; the names of the kernels are listed.

    Args:
        registered: under a dispatch mode ops are the registered ones, as anywhere else. Else they are not, since such a mode does
            not see inside those.
    """
    launched: list[str] = []

    def launch(kernel, *_):
        launched.append(getattr(kernel, "__name__", str(kernel)))

    def product_in_float32(a: Tensor, b: Tensor) -> Tensor:  # one launch on a GPU, copies on a CPU
        return torch.mm(a, b).new_empty(a.shape[0], b.shape[1], dtype=torch.float32)

    with (
        cpu_launches(launch),
        backends.kernels_for_all_tensors(),
        contextlib.nullcontext() if registered else mock.patch.object(backends, "registered_path", lambda *_: False),
        mock.patch.object(matmul, "product_in_float32", product_in_float32),
    ):
        yield launched


class _Operations(TorchDispatchMode):
    """Counts the operations of PyTorch that compute something."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in _FREE
        return function(*args, **(kwargs or {}))


def _launches(model: nn.Module, img_size: int, precision: str, kernels: list[str]) -> tuple[int, int]:
    images = torch.zeros(2, 3, img_size, img_size, dtype=_input_dtype(precision))
    kernels.clear()
    with _Operations() as operations:
        out = _run(model, images, precision)
    forward = operations.count + len(kernels)
    gradient = torch.ones_like(out)
    kernels.clear()
    with _Operations() as operations:
        out.backward(gradient)
    model.zero_grad(set_to_none=True)
    return forward, operations.count + len(kernels)


class _NoModules(contextlib.nullcontext):
    """Instead of FlopCounterMode's tracker of modules, whose hooks have every module called: with any hook nothing is fused."""

    parents = frozenset({"Global"})


def _flops(model: nn.Module, batch: int, img_size: int, precision: str) -> tuple[int, int]:
    """Forward and backward."""
    images = torch.zeros(batch, 3, img_size, img_size, dtype=_input_dtype(precision))
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with counter:
        out = _run(model, images, precision)
        forward = counter.get_total_flops()
        out.backward(torch.ones_like(out))
    model.zero_grad(set_to_none=True)
    return forward, counter.get_total_flops() - forward


def _saved_bytes(model: nn.Module, batch: int, img_size: int, precision: str) -> int:
    """Bytes of the distinct storages that a forward pass keeps for backward."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.zeros(batch, 3, img_size, img_size, dtype=_input_dtype(precision))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = _run(model, images, precision)
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _input_dtype(precision: str) -> torch.dtype:
    return torch.float32 if precision == "amp" else torch.bfloat16


def _run(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp"):
        return model(images)
