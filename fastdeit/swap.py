"""Swap the classes of a model's modules for fused ones, and back."""

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import nn

from fastdeit.backends import supposed_gpu
from fastdeit.blocks.fused_module import has_own_forward
from fastdeit.blocks.snapshot import KEY as RECORD
from fastdeit.explanation import Report, explain_modules

MEMORY = ("usual", "lean")
DROP_PATH = ("mask", "skip")
_ONLY_NORMS = (
    "accelerate: of this {}, only LayerNorms are fused. It has no transformer block of the classes looked for, which are listed "
    "in docs/hosts.md by library and version; a block of a derived class, or of a library imported under another name, is not "
    "one of them"
)


def accelerate(
    model: nn.Module, *, exclude: Iterable[str] = (), memory: str = "usual", drop_path: str = "mask"
) -> nn.Module:
    """Replaces the class of every module that has a fused counterpart, in place: of timm, and of the libraries in docs/hosts.md.

    Parameters, buffers, hooks, names and the modules themselves stay the same. Only `forward` changes, and it falls back to the
    library's implementation for calls that the kernels do not support. A second call also replaces modules that were added since.
    Compiled code is dropped (`torch.compiler.reset`), since it would keep running the former class. Warns where only LayerNorms are
    fused.

    Args:
        model: any module. Its own class may be replaced too.
        exclude: names of modules that keep (or get back) their library's class, with everything inside them, as in
            `model.named_modules()`; `*`, `?` and `[...]` match as in file names. An excluded module is always called normally; a
            parent that would bypass it (a model its `patch_embed`, an MLP its `fc1`) falls back. `explain` reports that.
        memory: what the blocks save for backward, `fastdeit.nn.Block.memory`. "usual" saves 0.56 of timm's bytes under autocast
            to bf16; "lean" saves a third and recomputes one GEMM per block in backward.
        drop_path: what stochastic depth does in training, `fastdeit.nn.Block.drop_path_mode`. "mask" computes all samples and
            multiplies by timm's mask. "skip" runs each branch of timm's blocks on a random subset of round(B (1 - p)) samples.
            Blocks of other libraries keep their masks.

    Returns:
        model.

    Raises:
        TypeError: model is not a module or is scripted, or exclude is neither a string nor strings.
        ValueError: an exclude pattern matches no module, memory is neither "usual" nor "lean", drop_path is neither "mask" nor
            "skip", or it is "skip" and the model has no block of timm's.
        RuntimeError: a module's class was derived at run time from one that would be swapped, as `fully_shard` and
            `parametrize` do.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory: expected one of {', '.join(MEMORY)}, got {memory!r}")
    if drop_path not in DROP_PATH:
        raise ValueError(f"drop_path: expected one of {', '.join(DROP_PATH)}, got {drop_path!r}")
    named = _named_modules(model)
    patterns = _patterns(exclude)
    excluded = _excluded(named, patterns)
    fused = _fused_classes()
    source = {twin: cls for cls, twin in fused.items()}
    _check_not_derived(named, "accelerate")
    if drop_path == "skip" and not any(
        name not in excluded and fused.get(type(module), type(module)).__dict__.get("drop_path_mode")
        for name, module in named.items()
    ):
        raise ValueError(
            "drop_path: 'skip' is for timm's vision transformer blocks, of which the model has none to accelerate"
        )
    _set_choice((named[name] for name in excluded), "memory", "usual")  # while they are still this package's
    _set_choice((named[name] for name in excluded), "drop_path_mode", "mask")
    _swap((module, source if name in excluded else fused) for name, module in named.items())
    _set_choice(named.values(), "memory", memory)
    _set_choice(named.values(), "drop_path_mode", drop_path)
    _mark_excluded(named, excluded)
    swapped = {type(module) for module in named.values()} & source.keys()
    if swapped and not excluded and type(model) not in swapped and all(issubclass(c, nn.LayerNorm) for c in swapped):
        warnings.warn(_ONLY_NORMS.format(type(model).__name__), stacklevel=2)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`, in place: every fused module gets the class of timm, PyTorch or its library again.

    Returns:
        model.

    Raises:
        TypeError, RuntimeError: as `accelerate`.
    """
    named = _named_modules(model)
    _check_not_derived(named, "restore")
    source = {twin: cls for cls, twin in _fused_classes().items()}
    _set_choice(named.values(), "memory", "usual")
    _set_choice(named.values(), "drop_path_mode", "mask")
    _mark_excluded(named, set())
    for module in named.values():
        module.__dict__.pop(RECORD, None)
    _swap((module, source) for module in named.values())
    return model


def explain(model: nn.Module, *, batch_size: int | None = None, on_gpu: bool = False) -> Report:
    """What runs fused in model, and why the rest does not.

    Each module is judged by the rules of its forward, for an input of its parameters' device and dtype in the present state
    (training or evaluation, backend, autocast). Call it under the autocast that the model runs in. Weights sharded by `fully_shard`
    are judged as gathered, as they are in forward.

    Args:
        model: any module.
        batch_size: adds launches and memory traffic of a forward pass of that many images, by arithmetic, for the model as it
            runs and for timm's; timm's vision transformers only.
        on_gpu: judge a model on a CPU as if it were on a GPU of capability 8.0 or newer.

    Returns:
        A `Report`: rows (name, kind, fused, reason) in the order of `model.named_modules()`; `str()` of it is a table.

    Raises:
        TypeError: model is not a module, or batch_size is not an int.
        ValueError: batch_size is below 1, or given for a model whose costs are not known.
    """
    named = _named_modules(model)
    with _gathered(named.values()), supposed_gpu() if on_gpu else contextlib.nullcontext():
        return explain_modules(named, batch_size)


@contextlib.contextmanager
def _gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts plain tensors, without memory of their own, in the place of weights that `fully_shard` gathers for each forward."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = [] if fsdp is None else [module for module in modules if isinstance(module, fsdp.FSDPModule)]
    taken: dict[tuple[int, str], tuple[dict, torch.Tensor]] = {}
    for module in (part for whole in sharded for part in whole.modules()):
        for name, weight in module._parameters.items():
            if isinstance(weight, torch.distributed.tensor.DTensor) and weight.device_mesh.ndim == 1:
                taken[id(module), name] = module._parameters, weight
    try:
        for (_, name), (parameters, weight) in taken.items():
            parameters[name] = torch.empty(1, device=weight.device, dtype=weight.dtype).expand(weight.shape)
        yield
    finally:
        for (_, name), (parameters, weight) in taken.items():
            parameters[name] = weight


def _fused_classes() -> dict[type[nn.Module], type[nn.Module]]:
    from fastdeit.nn.hosts import fused_classes  # imports timm, which `import fastdeit` need not

    return fused_classes()


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: expected a plain module, got a scripted one, whose forward is already compiled")
    return dict(model.named_modules())


def _patterns(exclude: Iterable[str]) -> tuple[str, ...]:
    patterns = (
        (exclude,) if isinstance(exclude, str) else tuple(exclude) if isinstance(exclude, Iterable) else (exclude,)
    )
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude: expected names of modules or patterns of them, got {pattern!r}")
    return patterns


def _excluded(named: dict[str, nn.Module], patterns: tuple[str, ...]) -> set[str]:
    excluded: set[str] = set()
    for pattern in patterns:
        matches = [name for name in named if fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(f"exclude: no module of the model matches {pattern!r}")
        for match in matches:
            excluded.update(name for name in named if match in ("", name) or name.startswith(match + "."))
    return excluded


def _check_not_derived(named: dict[str, nn.Module], function: str) -> None:
    """Raises for a class that something derived from a known one at run time: swapping it would undo what it added."""
    fused = _fused_classes()
    known = (*fused, *fused.values())
    for name, module in named.items():
        cls = type(module)
        if cls in known or not isinstance(module, known) or not _made_at_run_time(cls):
            continue
        base = next(c for c in cls.__mro__ if c in known)
        raise RuntimeError(
            f"{function}: {name or 'the model'} is a {cls.__name__}, derived from {base.__name__} at run time "
            f"(fully_shard and parametrize do that). Call {function} before that, or after it is undone."
        )


def _made_at_run_time(cls: type) -> bool:
    """Whether no statement defines the class: its module has none of that name, and it is no function's local."""
    return "<locals>" not in cls.__qualname__ and not hasattr(
        sys.modules.get(cls.__module__), cls.__qualname__.split(".")[0]
    )


def _swap(choices: Iterable[tuple[nn.Module, dict[type, type]]]) -> None:
    changed = False
    for module, classes in choices:
        new = classes.get(type(module))
        if new is not None:
            if "forward" in module.__dict__ and not has_own_forward(module):
                del module.__dict__["forward"]  # it would go on calling the former class's
            module.__class__ = new
            changed = True
    if changed:
        torch.compiler.reset()  # Dynamo does not guard a module's class


def _mark_excluded(named: dict[str, nn.Module], excluded: set[str]) -> None:
    """Marks excluded modules and those that contain one; removes the mark from all others."""
    from fastdeit.blocks.checklist import EXCLUDED, HOLDS_EXCLUDED

    around = {name[:end] for name in excluded for end, letter in enumerate(name) if letter == "."}
    if excluded:
        around.add("")  # the model itself
    changed = False
    for mark, names in ((EXCLUDED, excluded), (HOLDS_EXCLUDED, around)):
        for name, module in named.items():
            if (name in names) != (mark in module.__dict__):
                if name in names:
                    module.__dict__[mark] = True
                else:
                    del module.__dict__[mark]
                changed = True
    if changed:
        torch.compiler.reset()


def _set_choice(modules: Iterable[nn.Module], name: str, value: str) -> None:
    """Sets an attribute of the blocks that support it; removes it where the value is the class's."""
    from fastdeit.blocks.fused_module import is_fused

    changed = False
    for module in modules:
        if is_fused(module) and getattr(module, name) not in (None, value):
            if value == getattr(type(module), name):
                delattr(module, name)
            else:
                setattr(module, name, value)
            changed = True
    if changed:
        torch.compiler.reset()
