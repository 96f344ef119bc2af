"""Checkpoints: written whole or not at all, read with checks that name the file and what is wrong with it.

`NAME.safetensors` holds a model's weights and, as metadata, the configuration and classes, so that it can be evaluated alone.
`last.state.pt` holds all that a run needs to continue; it is complete in itself, so that a kill between two files loses nothing.
The one before it stays as `previous.state.pt`, for the case that it is damaged.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdeit.train.class_names import CLASSES_KEY, class_difference, stored_classes
from fastdeit.train.config import FIELDS, FREE_FIELDS, Config, config_from
from fastdeit.train.files import write_atomically

STATE, PREVIOUS, DAMAGED = "last.state.pt", "previous.state.pt", "damaged.state.pt"
PLACES = ("data", "data_dir", "data_download")  # fields that say where the data are, not what they hold
METADATA_KEY = "fastdeit"
BAD_STATE = "nonfinite.state.pt"  # of a run that stopped at a loss or a gradient that was not finite, before that step
STATE_KEYS = {
    "config",
    "classes",
    "data",
    "epoch",
    "step",
    "img_size",
    "loss_sum",
    "model",
    "ema",
    "optimizer",
    "scaler",
    "history",
    "best",
}


STATE_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("config", "data", "model", "optimizer", "best"), (dict,)),
    **dict.fromkeys(("classes", "history"), (list,)),
    **dict.fromkeys(("epoch", "step", "img_size"), (int,)),
    "loss_sum": (float, int),
    **dict.fromkeys(("ema", "scaler"), (dict, type(None))),
}


def save_weights(
    path: Path, weights: Mapping[str, Tensor], config: Config, classes: tuple[str, ...], **facts: Any
) -> None:
    """weights as safetensors; as metadata the classes, and the configuration with `facts` (plain values), both JSON."""
    import safetensors.torch

    metadata = {CLASSES_KEY: json.dumps(classes), METADATA_KEY: json.dumps({"config": config.as_dict(), **facts})}
    data = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in weights.items()}, metadata)
    header, tensors = _with_ordered_metadata(data)
    write_atomically(path, lambda file: file.write(header) + file.write(tensors))


def read_metadata(path: Path) -> tuple[Config, tuple[str, ...], dict[str, Any]]:
    """The configuration, the classes and the other facts that `save_weights` put into path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, no safetensors file, or not written by fastdeit.
    """
    with _open_safetensors(path) as file:
        metadata = file.metadata() or {}
    text, classes = metadata.get(METADATA_KEY), stored_classes(metadata, path)
    if text is None or classes is None:
        raise ValueError(
            f"{path}: holds weights without {METADATA_KEY if text is None else CLASSES_KEY} in its metadata; expected a checkpoint "
            "of fastdeit train"
        )
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: metadata `{METADATA_KEY}` is not JSON: {error}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        raise ValueError(f"{path}: metadata `{METADATA_KEY}` holds {text[:80]}, expected an object with a `config`")
    try:
        return config_from(facts.pop("config")), classes, facts
    except ValueError as error:
        raise ValueError(f"{path}: metadata `{METADATA_KEY}`, config: {error}") from None


def load_weights(model: nn.Module, path: Path, classes: Sequence[str] | None = None) -> None:
    """Loads path into model. classes: the model's, compared with those that path names, if it does.

    Raises:
        FileNotFoundError, ValueError: as `read_metadata`, or path is of another model or of other classes, which are named.
    """
    with _open_safetensors(path) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        names = stored_classes(file.metadata() or {}, path)
    found = class_difference(classes, names) if classes is not None and names is not None else None
    if found is not None:
        raise ValueError(f"{path}: trained on other classes: beside them the data {found}")
    check_same_tensors(weights, model.state_dict(), path)
    model.load_state_dict(weights)


def check_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError unless both have the same names and shapes, and real numbers where these are expected."""
    differences = [f"no {name}" for name in expected if name not in found]
    differences += [f"an unknown {name}" for name in found if name not in expected]
    differences += [
        f"{name} of shape {tuple(found[name].shape)} where the model has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    differences += [
        f"{name} of {found[name].dtype} where the model has {tensor.dtype}"
        for name, tensor in expected.items()
        if name in found and found[name].is_floating_point() != tensor.is_floating_point()
    ]
    if differences:
        more = f" and {len(differences) - 3} more differences" if len(differences) > 3 else ""
        raise ValueError(f"{path}: from another model: it has {'; '.join(differences[:3])}{more}")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """state (tensors, dicts, lists and plain values) so that `torch.load(weights_only=True)` reads it.

    A run's STATE that is there becomes PREVIOUS. Raises WriteError.
    """
    assert set(state) == STATE_KEYS
    keep_as = path.with_name(PREVIOUS) if path.name == STATE else None
    write_atomically(path, lambda file: torch.save(state, file), keep_as)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or damaged, or not the state of a run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # PyTorch does not compare the checksums that it writes
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is raised depends on where the file ends
        raise ValueError(
            f"{path}: cannot be read ({path.stat().st_size} bytes): truncated, or no training state of fastdeit "
            f"({type(error).__name__})"
        ) from error
    if damaged:
        raise ValueError(
            f"{path}: cannot be read: damaged, {damaged} does not have the checksum that it was written with"
        )
    if isinstance(state, dict) and isinstance(
        state.get("config"), dict
    ):  # one written before sizes could change has none
        state.setdefault("img_size", state["config"].get("img_size"))
    if not isinstance(state, dict) or not set(state) >= STATE_KEYS:
        raise ValueError(f"{path}: expected the training state of a run with {', '.join(sorted(STATE_KEYS))}")
    for name, kinds in STATE_TYPES.items():
        if not isinstance(state[name], kinds) or isinstance(state[name], bool):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path}: {name}: expected {expected}, got {type(state[name]).__name__}")
    return state


def has_state(folder: Path) -> bool:
    """Whether folder holds the state of a run, the last or the one before it."""
    return any((folder / name).exists() for name in (STATE, PREVIOUS))


def newest_state(folder: Path) -> tuple[dict[str, Any], Path, str | None]:
    """The last state of a run, else the one before it: the state, where it was, and what is wrong with the last one if anything.

    Raises:
        ValueError: neither can be read.
    """
    problems = []
    for path in (folder / STATE, folder / PREVIOUS):
        try:
            return load_state(path), path, "; ".join(problems) or None
        except (OSError, ValueError) as error:
            problems.append(str(error))
    raise ValueError(f"{'; '.join(problems)}. To start anew, use another folder")


def put_aside(folder: Path) -> None:
    """Renames a last state that cannot be read, so that it never takes the place of the one before it."""
    if (folder / STATE).exists():
        (folder / STATE).replace(folder / DAMAGED)


def check_same_run(state: dict[str, Any], config: Config, path: Path) -> None:
    """Raises ValueError naming the fields in which a state's run differs from config.

    The number of epochs may grow, and the data may be elsewhere: what they hold is compared by itself.
    """
    saved = config_from({"decoder": "pillow", **state["config"]})  # what decoded before there was a choice
    differing = [
        f"{name} ({getattr(saved, name)!r} there, {getattr(config, name)!r} now)"
        for name in FIELDS
        if name not in (*FREE_FIELDS, *PLACES, "epochs") and getattr(saved, name) != getattr(config, name)
    ]
    if differing:
        raise ValueError(f"{path}: from a run with another configuration: {'; '.join(differing)}")
    if state["epoch"] > config.epochs:
        raise ValueError(f"epochs: {path} has trained {state['epoch']} epochs already, expected at least as many")


def _with_ordered_metadata(data: bytes) -> tuple[bytes, memoryview]:
    """A safetensors file, cut after its header, the metadata in one order: safetensors writes several keys in a random one, and
    equal runs are to give equal files."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    return len(text).to_bytes(8, "little") + text, memoryview(data)[end:]


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: cannot be read ({path.stat().st_size} bytes): truncated, or no safetensors file ({error})"
        ) from None
