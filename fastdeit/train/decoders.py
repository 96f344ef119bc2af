"""Which library decodes JPEG files. All are libjpeg-turbo with accurate DCT and smooth upsampling, so that pixels are the same.

They get files of the common kind only (see jpeg_header.py): Pillow decodes all others, and files that they refuse.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from fastdeit.train.config import Config
from fastdeit.train.config_checks import DECODERS, DEVICE_DECODERS
from fastdeit.train.jpeg_header import JpegHeader

_MODULES = {"nvimgcodec": "nvidia.nvimgcodec", "simplejpeg": "simplejpeg", "torchvision": "torchvision"}
_DISTRIBUTIONS = {"nvimgcodec": "nvidia-nvimgcodec-cu12", "simplejpeg": "simplejpeg", "torchvision": "torchvision"}


class Box(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


class Decoder(Protocol):
    """Decodes a common JPEG to RGB."""

    def decode(self, data: bytes, header: JpegHeader, box: Box) -> np.ndarray:
        """The part (box.height, box.width, 3) uint8. Raises anything, or gives another shape, where the library fails."""


def is_installed(name: str) -> bool:
    if name == "pillow":
        return True
    try:
        return find_spec(_MODULES[name]) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def resolved_decoder(config: Config) -> str:
    """The decoder that config means here.

    Raises:
        ImportError: it is not installed.
    """
    name = config.decoder
    if name == "auto":
        return next(d for d in (DEVICE_DECODERS if config.decode_on == "device" else DECODERS) if is_installed(d))
    if not is_installed(name):
        package = _DISTRIBUTIONS[name]
        raise ImportError(f"decoder: {name} is not installed: pip install {package}, or set decoder to auto")
    return name


def with_decoder(config: Config) -> Config:
    """config with the decoder that it means here, since pixels may depend on it; as it is where no files are decoded."""
    return config if config.data == "digits" else config.replace(decoder=resolved_decoder(config))


def with_installed_decoder(config: Config) -> Config:
    """config, with the decoder `auto` in place of one that is not installed, which stderr tells: for what trains nothing."""
    if config.data == "digits" or config.decoder == "auto" or is_installed(config.decoder):
        return config
    here = config.replace(decoder="auto", decode_on="cpu")
    here = here.replace(decoder=resolved_decoder(here))
    print(
        f"decoder: {config.decoder}, which the run used, is not installed; {here.decoder} decodes here, and pixels may differ",
        file=sys.stderr,
    )
    return here


def decoder_version(name: str) -> dict[str, str]:
    """Distribution and version of a resolved decoder, beyond those that every run has."""
    if name not in ("nvimgcodec", "simplejpeg"):
        return {}
    return {_DISTRIBUTIONS[name]: version(_DISTRIBUTIONS[name])}


def create_decoder(name: str) -> Decoder | None:
    """The decoder of this resolved name; None for Pillow."""
    return {
        "nvimgcodec": NvImageCodec,
        "simplejpeg": _SimpleJpeg,
        "torchvision": _Torchvision,
        "pillow": lambda: None,
    }[name]()


class _SimpleJpeg:
    def decode(self, data: bytes, header: JpegHeader, box: Box) -> np.ndarray:
        import simplejpeg

        return _part(simplejpeg.decode_jpeg(data), box)


class _Torchvision:
    def decode(self, data: bytes, header: JpegHeader, box: Box) -> np.ndarray:
        from torchvision.io import ImageReadMode, decode_jpeg

        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return _part(decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy(), box)


class NvImageCodec:
    """NVIDIA's. Decodes parts alone; on the CPU in one thread, since workers are processes.

    Args:
        device: a GPU, whose backends alone decode; None for the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._made: tuple[int, Any, Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # a process makes its own

    def decode(self, data: bytes, header: JpegHeader, box: Box) -> np.ndarray:
        library, decoder, options = self._library()
        stream = library.CodeStream(data)
        if box != (0, 0, header.width, header.height):
            stream = _part_of_stream(library, stream, box)
        return np.asarray(decoder.decode(stream, params=options))

    def decode_all(self, files: Sequence[np.ndarray], boxes: Sequence[Box], stream: int = 0) -> list[Any]:
        """The library's images of the parts of files, on its device; None of those that it refuses.

        Args:
            stream: CUDA's number of the stream that the images are used on.
        """
        library, decoder, options = self._library()
        streams: dict[int, Any] = {}
        for place, (file, box) in enumerate(zip(files, boxes, strict=True)):
            with contextlib.suppress(Exception):  # of the library's own kind, where it cannot read the header
                streams[place] = _part_of_stream(library, library.CodeStream(file), box)
        found: list[Any] = [None] * len(files)
        if streams:
            images = decoder.decode(list(streams.values()), params=options, cuda_stream=stream)
            for place, image in zip(streams, images, strict=True):
                found[place] = image
        return found

    def _library(self) -> tuple[Any, Any, Any]:
        if self._made is None or self._made[0] != os.getpid():
            with _without_stderr():  # where it complains of GPU libraries that it does without
                from nvidia import nvimgcodec

                decoder = nvimgcodec.Decoder(options=":fancy_upsampling=1", **self._place(nvimgcodec))
            options = nvimgcodec.DecodeParams(apply_exif_orientation=False)
            self._made = os.getpid(), nvimgcodec, decoder, options
        return self._made[1:]

    def _place(self, library: Any) -> dict[str, Any]:
        """Arguments of a decoder: where it decodes."""
        kinds = library.BackendKind
        if self.device is None:
            backends, number, threads = [kinds.CPU_ONLY], library.NVIMGCODEC_DEVICE_CPU_ONLY, 1
        else:
            backends = [kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU]
            number, threads = self.device.index or 0, 0
        return dict(
            device_id=number, max_num_cpu_threads=threads, backends=[library.Backend(kind) for kind in backends]
        )


def _part_of_stream(library: Any, stream: Any, box: Box) -> Any:
    region = library.Region(box.top, box.left, box.top + box.height, box.left + box.width)
    return stream.get_sub_code_stream(region=region)


def _part(image: np.ndarray, box: Box) -> np.ndarray:
    return image[box.top : box.top + box.height, box.left : box.left + box.width]


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Discards what libraries write to the process's stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
