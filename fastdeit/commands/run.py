"""`fastdeit run SCRIPT ARGS...`: runs a script unedited; models that timm or another known library makes are accelerated."""

import argparse
import contextlib
import functools
import importlib.util
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import nn

from fastdeit.commands.run_hosts import made_models
from fastdeit.swap import accelerate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is a module name, as with python -m")
    parser.add_argument("script", metavar="SCRIPT", help="a training or evaluation script, such as timm's train.py")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="arguments of the script")


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, up to SCRIPT, and the script's as they are: argparse would take `--` for its own."""
    at = list(argv).index("run") + 1
    while at < len(argv) and argv[at].startswith("-"):
        at += 1
    return list(argv[: at + 1]), list(argv[at + 1 :])


def run(args: argparse.Namespace) -> int:
    """Runs the script as `python SCRIPT ARGS...` would; its own exit code is the command's.

    Raises:
        ValueError: there is no such script or module.
    """
    _check_there(args.script, args.is_module)
    with (
        _started_as_python_does(args.script, args.arguments, args.is_module),
        accelerated_create_model(),
        made_models(_accelerated),
    ):
        try:
            if args.is_module:
                runpy.run_module(args.script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(args.script, run_name="__main__")
        except Exception as error:  # the script's own, so with its traceback, and not among the command's expected ones
            traceback.print_exception(error.with_traceback(_of_script(error.__traceback__)))
            return 1
    return 0


@contextlib.contextmanager
def accelerated_create_model() -> Iterator[None]:
    """Inside, every model that `timm.create_model` makes is accelerated, from whichever module of timm it is imported.

    A model created with `scriptable=True`, or inside `timm.layers.set_scriptable(True)`, is left timm's, since
    torch.jit.script needs that. What has imported the function from timm before keeps the original.
    """
    import timm.models
    from timm.layers import is_scriptable

    original = timm.models._factory.create_model

    @functools.wraps(original)
    def create_model(*args, **kwargs) -> nn.Module:
        model = original(*args, **kwargs)
        name = args[0] if args else kwargs.get("model_name", "")
        if kwargs.get("scriptable") or is_scriptable():
            _say(f"{name} stays timm's, since it is to be scripted")
            return model
        accelerate(model)
        _say(f"{name} is accelerated: {_count_fused(model)} of its modules have a fused forward")
        return model

    _replace_in_timm(original, create_model)
    try:
        yield
    finally:
        _replace_in_timm(create_model, original)


def _accelerated(model: nn.Module) -> None:
    accelerate(model)
    _say(f"{type(model).__name__} is accelerated: {_count_fused(model)} of its modules have a fused forward")


def _replace_in_timm(old: Callable, new: Callable) -> None:
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "timm" and module.__dict__.get("create_model") is old:
            module.create_model = new


def _count_fused(model: nn.Module) -> int:
    from fastdeit.blocks.fused_module import is_fused

    return sum(map(is_fused, model.modules()))


def _say(message: str) -> None:
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        print(f"fastdeit run: {message}", file=sys.stderr, flush=True)


def _check_there(script: str, is_module: bool) -> None:
    if not is_module:
        if not Path(script).is_file():
            raise ValueError(f"SCRIPT: there is no file {script!r}; a module's name needs -m before it")
        return
    with _first_on_path(""), contextlib.suppress(ModuleNotFoundError):  # of a package that it is to be in
        if importlib.util.find_spec(script) is not None:
            return
    raise ValueError(f"SCRIPT: there is no module {script!r}")


@contextlib.contextmanager
def _started_as_python_does(script: str, arguments: list[str], is_module: bool) -> Iterator[None]:
    """Inside, sys.argv holds the script and its arguments, and a script's folder is first on sys.path."""
    argv = sys.argv
    sys.argv = [script, *arguments]
    try:
        with _first_on_path("" if is_module else str(Path(script).resolve().parent)):
            yield
    finally:
        sys.argv = argv


@contextlib.contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    path = sys.path.copy()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path[:] = path


def _of_script(frames):
    """A traceback without the frames of this file and of runpy, as plain `python` prints it."""
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    while frames is not None and frames.tb_frame.f_code.co_filename in ours:
        frames = frames.tb_next
    return frames
