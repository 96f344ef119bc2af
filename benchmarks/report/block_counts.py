"""What a block launches and keeps for backward, fused and in timm, counted on the CPU: no GPU, no time, no interpreter.

The fused model takes its fused path with every kernel launch left out, so that its results are noise and its launches a number.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def _model(name: str, img_size: int, depth: int, precision: str, *, fused: bool) -> nn.Module:
    model = timm.create_model(name, img_size=img_size, depth=depth, drop_path_rate=0.0)
    if fused:
        fastdeit.accelerate(model)
    return model if precision == "amp" else model.bfloat16()


@contextlib.contextmanager
def kernels_left_out() -> Iterator[list[str]]:
    """Ops take their kernels for tensors on the CPU and launch nothing; the names of the kernels are listed."""
    launched: list[str] = []

    def launch(kernel, *_):
        launched.append(getattr(kernel, "__name__", str(kernel)))

    def product_in_float32(a: Tensor, b: Tensor) -> Tensor:  # one launch on a GPU, copies on a CPU
        return torch.mm(a, b).new_empty(a.shape[0], b.shape[1], dtype=torch.float32)

    with (
        cpu_launches(launch),
        backends.kernels_for_all_tensors(),
        # whose insides a dispatch mode does not see
        mock.patch.object(backends, "registered_path", lambda *tensors: False),
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
