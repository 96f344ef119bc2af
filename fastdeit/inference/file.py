"""An optimized model as one safetensors file: its buffers, and as metadata a description in JSON. Nothing in it is executed."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeit.inference.architecture import Architecture, Options
from fastdeit.inference.calls import Calls
from fastdeit.inference.model import OptimizedModel, Preprocessing

KEY = "fastdeit_optimized"
VERSION = 1


def save_optimized(model: OptimizedModel, path: str | os.PathLike[str]) -> None:
    """Writes a file that `load_optimized` reads; one that is there is replaced when the new one is complete."""
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.named_buffers()}
    description = {
        "version": VERSION,
        "architecture": model.architecture.as_dict(),
        "options": model.options._asdict(),
        "preprocessing": model.preprocessing._asdict(),
        "tensors": _facts(tensors),
    }
    target, unfinished = Path(path), Path(f"{os.fspath(path)}.unfinished")
    safetensors.torch.save_file(tensors, unfinished, {KEY: json.dumps(description)})
    unfinished.replace(target)


def load_optimized(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    cuda_graphs: str = "auto",
    buckets: Iterable[int] = (),
) -> OptimizedModel:
    """Loads the model that `OptimizedModel.save` wrote.

    Args:
        path: of the file.
        device: where its tensors go.
        cuda_graphs: as `optimize_for_inference` takes it; the file does not contain it.
        buckets: as `optimize_for_inference` takes them; the file does not contain them.

    Raises:
        TypeError: a bucket is not a whole number.
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or changed, is not a safetensors file, has no optimized model or one of another version,
            or the device does not support its precision.
    """
    from safetensors import SafetensorError, safe_open

    from fastdeit.inference.device import check_device

    calls = Calls(cuda_graphs, buckets)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: cannot be read ({path.stat().st_size} bytes): truncated, or no safetensors file ({error})"
        ) from None
    if KEY not in metadata:
        raise ValueError(
            f"{path}: holds no optimized model; expected a file of OptimizedModel.save (fastdeit predict --checkpoint takes "
            "weights of fastdeit train)"
        )
    try:
        description = json.loads(metadata[KEY])
        version = description["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: metadata `{KEY}` is damaged: expected an object with a version") from None
    if version != VERSION:
        raise ValueError(
            f"{path}: is of version {version!r}, and this fastdeit reads version {VERSION}; optimize the model again"
        )
    try:
        _check_tensors(description["tensors"], tensors, path)
        architecture = Architecture.from_dict(description["architecture"])
        options = Options(**{name: _as_tuple(value) for name, value in description["options"].items()})
        preprocessing = Preprocessing(**{n: _as_tuple(value) for n, value in description["preprocessing"].items()})
        model = OptimizedModel(architecture, options, tensors, preprocessing, calls).eval()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: metadata `{KEY}` is damaged: {error!r}") from None
    check_device(options.precision, torch.device(device))
    return model.to(device)


def _facts(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    return {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()}


def _check_tensors(expected: dict[str, list[Any]], tensors: Mapping[str, Tensor], path: Path) -> None:
    found = _facts(tensors)
    differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path}: was changed: {name} is {found.get(name, 'missing')}, its description says {expected.get(name, 'none')}"
        )


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
