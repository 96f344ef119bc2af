"""The frozen model that `optimize_for_inference` makes."""

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdeit.inference.architecture import READOUTS, Architecture, Options
from fastdeit.inference.calls import Calls
from fastdeit.inference.conversion import converted, factors_name
from fastdeit.inference.host import Host
from fastdeit.inference.layers import Block, Embedding, Linear, Norm, under
from fastdeit.ops import layer_norm
from fastdeit.ops.matmul import without_autocast

if TYPE_CHECKING:
    from fastdeit.inference.report import Report


class Preprocessing(NamedTuple):
    """Of image files, as timm's evaluation transform takes them, and what the classes are called; None where that is not known."""

    crop_pct: float | None = None
    interpolation: str | None = None
    crop_mode: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | None = None


class OptimizedModel(nn.Module):
    """A vision transformer with frozen weights in buffers, on one device and in a fixed precision.

    Args:
        architecture: of the model.
        options: of the optimization.
        weights: folded, by the names of the buffers, in the dtypes that they are to have.
        preprocessing: of image files, for `fastdeit predict`.
        calls: how it runs on a GPU, by default with CUDA graphs and without buckets.
    """

    embedding: Embedding
    norm_before: Norm | None
    norm: Norm

    def __init__(
        self,
        architecture: Architecture,
        options: Options,
        weights: Mapping[str, Tensor],
        preprocessing: Preprocessing | None = None,
        calls: Calls | None = None,
    ) -> None:
        super().__init__()
        self.architecture, self.options = architecture, options
        self.preprocessing = preprocessing or Preprocessing()
        self._calls = calls or Calls()
        self._originals: list[weakref.ref[nn.Module]] = []  # one or none
        self.embedding = Embedding(under(weights, "embedding"))
        self.norm_before = None
        if architecture.eps_before is not None:
            self.norm_before = Norm(architecture.eps_before, under(weights, "norm_before"))
        self.blocks = nn.ModuleList(
            Block(block, under(weights, f"blocks.{index}")) for index, block in enumerate(architecture.blocks)
        )
        self.norm = Norm(architecture.eps, under(weights, "norm"))
        heads = ("class", "distillation") if options.readout == "softmax_sum" else (options.readout,)
        self.heads = nn.ModuleDict({name: Linear(under(weights, f"heads.{name}")) for name in heads})

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream and of the logits."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images.

        Args:
            images: (B, K, H, W) on the model's device, of the size that it was made for: normalised, of any float dtype, or with
                images="uint8" levels from 0 to 255 as they are decoded.

        Returns:
            (B, classes) as `readout` says, of the model's dtype; a new tensor.

        Raises:
            TypeError: images is not a tensor or has another dtype.
            ValueError: images has another shape or device.
        """
        self.check(images)
        if images.requires_grad:
            images = images.detach()
        if torch.is_autocast_enabled(images.device.type):
            with without_autocast():
                return self._calls(self, images)
        return self._calls(self, images)

    def calls(self) -> list[str]:
        """A line for each batch size, device and stream that the model was called with on a GPU, which says whether such calls are
        captured in a CUDA graph, and why not. It begins anew when modules or buffers of the model are replaced."""
        return self._calls.described()

    def check(self, images: Any) -> None:
        """Raises what `forward` raises."""
        uint8, (height, width) = self.options.images == "uint8", self.architecture.img_size
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
        if uint8 and images.dtype != torch.uint8:
            raise TypeError(
                f"images: expected torch.uint8, levels from 0 to 255 as they are decoded, got {images.dtype}; normalised images "
                "need a model that was optimized with images='float'"
            )
        if not uint8 and not images.is_floating_point():
            raise TypeError(
                f"images: expected a floating-point tensor of normalised images, got {images.dtype}; raw ones need a model that "
                "was optimized with images='uint8'"
            )
        shape = (self.architecture.in_chans, height, width)
        if images.dim() != 4 or images.shape[1:] != shape:
            raise ValueError(f"images: expected shape (B, {shape[0]}, {height}, {width}), got {tuple(images.shape)}")
        if images.device != self.device:
            raise ValueError(f"images: expected device {self.device} as the model has, got {images.device}")

    def run(self, images: Tensor) -> Tensor:
        """`forward` without its checks, as launches for as many images as there are."""
        x = self.embedding(images)
        if self.norm_before is not None:
            x = layer_norm(x, self.norm_before.weight, self.norm_before.bias, self.norm_before.eps)
        branch = gamma = None
        last, prefix = len(self.blocks) - 1, self.architecture.prefix
        for index, block in enumerate(self.blocks):
            x, branch = block(x, branch, gamma, prefix if index == last else None)
            gamma = block.gamma2
        _, tokens = self.norm(x, branch, gamma)
        return self._read(tokens)

    def _read(self, tokens: Tensor) -> Tensor:
        """The heads' output for normalised prefix tokens (B, prefix, C)."""
        readout = self.options.readout
        if readout == "mean":
            return self.heads["mean"](tokens[:, :2].flatten(1))
        if readout != "softmax_sum":
            return self.heads[readout](tokens[:, 0 if readout == "class" else 1])
        both = self.heads["class"](tokens[:, 0]), self.heads["distillation"](tokens[:, 1])
        return sum(logits.float().softmax(-1) for logits in both).to(tokens.dtype)

    def refresh(self, model: nn.Module) -> None:
        """Takes over the weights that model has now, in place, so that captured graphs and holders of the buffers see them.

        Scales that were calibrated stay.

        Raises:
            TypeError: model is not a module.
            ValueError: it is not of the architecture that this one was made of, or no longer fused as a whole.
        """
        host = Host(model)
        self.check_architecture(host)
        buffers = dict(self.named_buffers())
        scales = {f"{layer}.input_scale" for layer in self.options.quantized}
        scales |= {factors_name(layer) or "" for layer in self.options.quantized}
        weights = converted(host, self.options, {name: t for name, t in buffers.items() if name in scales})
        if weights.keys() != buffers.keys():
            differing = sorted(weights.keys() ^ buffers.keys())
            raise ValueError(
                f"model: expected weights that fold as before, got others for {', '.join(differing[:3])}; optimize it anew"
            )
        for name, tensor in weights.items():
            buffers[name].copy_(tensor)
        self.remember(model)

    def report(self, loader: Iterable[Any], model: nn.Module | None = None) -> "Report":
        """What the precision costs on images: top-1 agreement with the model in float32, error of logits, layers by their error.

        Args:
            loader: batches of images as this model takes them, or pairs with labels.
            model: the one that this was made of; by default the original object, which must still exist.

        Returns:
            A `Report`; `str()` of it is a table.

        Raises:
            TypeError, ValueError: as `forward` for the images, as `refresh` for the model, or there are no images.
        """
        from fastdeit.inference.report import report

        model = self._originals[0]() if model is None and self._originals else model
        if model is None:
            raise ValueError("model: expected the model that this one was made of, which is gone or was never here")
        return report(self, model, loader)

    def image_transform(self) -> Callable[[Any], Tensor]:
        """A function from a Pillow image to a tensor (K, H, W), of which batches for this model are made: resized and cropped as
        timm's evaluation does, and normalised unless the model takes uint8.

        Raises:
            ValueError: the model has no preprocessing on record.
        """
        from fastdeit.inference.images import preparation

        try:
            return preparation(self)
        except ValueError as error:
            raise ValueError(f"model: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model as one safetensors file, which `fastdeit.load_optimized` reads."""
        from fastdeit.inference.file import save_optimized

        save_optimized(self, path)

    def remember(self, model: nn.Module) -> None:
        """The model that this one was made of, for reports. It is not kept alive."""
        self._originals[:] = [weakref.ref(model)]

    def check_architecture(self, host: Host) -> None:
        """Raises ValueError where host is not of the architecture that this model was made of."""
        found, expected = host.architecture().as_dict(), self.architecture.as_dict()
        if differing := [name for name in expected if found[name] != expected[name]]:
            raise ValueError(
                f"model: expected the architecture that was optimized, got another: {', '.join(differing)} differ"
            )
        if self.options.readout != "class" and not host.has_distillation_head():
            raise ValueError(
                f"model: expected a distillation head, which the readout {self.options.readout!r} reads, got none"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_originals": []}

    def _apply(self, fn, recurse=True):
        if fn(self.embedding.weight.new_empty(0)).dtype != self.dtype:
            raise TypeError(
                f"precision: a model optimized in {self.options.precision} keeps its dtypes; optimize the model again"
            )
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.options.precision}, images={self.options.images!r}, {READOUTS[self.options.readout]}"
