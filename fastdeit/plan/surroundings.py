"""The context of a call that a plan depends on besides its modules, as a key; and the contexts in which no plan may run."""

import gc
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fastdeit import backends
from fastdeit.blocks import spec
from fastdeit.blocks.call_rules import why_global_hook
from fastdeit.blocks.checklist import BlockVerdict, TrunkVerdict
from fastdeit.blocks.spans import most_gradients
from fastdeit.kernels.attention.config import SDPA_PREFERRED
from fastdeit.plan.tape import Tape

_MODULE_CALLS = {nn.Module._wrapped_call_impl.__code__, nn.Module._call_impl.__code__}
_PACKAGE = Path(__file__).parent.parent
_FOLDERS = tuple(f"{folder}/" for folder in (_PACKAGE, _PACKAGE.parent / "kernels", Path(torch.__file__).parent))
_STANDARD_LIBRARY = (f"{sysconfig.get_path('stdlib')}/", "<frozen ")
_INSTALLED = ("/site-packages/", "/dist-packages/")  # some of which lie inside the standard library's folder
_GENERATED = {
    "<lambda>",
    "__new__",
    "__init__",
    "__eq__",
    "__hash__",
    "_make",
    "_replace",
}  # of named tuples, data classes
_allows_construction = hasattr(torch._C, "_construct_storage_from_data_pointer")


def why_not_plannable(x: Tensor) -> str | None:
    """Why nothing is recorded or replayed where this call of a model stands, with input x."""
    if not x.is_cuda:
        return f"tensors on {x.device.type}"
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "a compiler or tracer looks on"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode looks on"
    if backends.settings(x) is None or torch.autograd.forward_ad._current_level >= 0:
        return "inside a torch.func transform, or a kernel was refused"
    if type(x) is not Tensor or x.is_neg() or x.is_conj() or x.numel() == 0 or x.data_ptr() % 16:
        return "the input is not a plain aligned tensor"
    return why_global_hook() or _why_not_launchable(x.get_device())


def _why_not_launchable(device: int) -> str | None:
    from fastdeit.kernels.runtime.launch import current_device, nothing_between
    from fastdeit.kernels.runtime.raw_launch import WHY_NO_RAW_LAUNCHES

    if device != current_device():
        return "the input is not on the current device"
    if not _allows_construction:
        return f"recorded launches were not tested with torch {torch.__version__}"
    return WHY_NO_RAW_LAUNCHES or (None if nothing_between() else "a hook of Triton's looks on")


def key_of(x: Tensor, needs: tuple[bool, ...] = ()) -> tuple:
    """What decides, beside modules and parameters, what a call with input x launches.

    Args:
        needs: whether x and each parameter need gradients, of a call with gradients.
    """
    return (x.shape, x.stride(), x.dtype, *circumstances(x), most_gradients() if needs else None, needs)


def circumstances(x: Tensor) -> tuple:
    """What decides so beside the input's shape and dtype: its device, the current stream as an integer, and settings."""
    from fastdeit.kernels.gemm.config import gemm_in_force
    from fastdeit.kernels.gemm.fused_mlp import fused_mlp_in_force

    return (
        *place_of(x),
        backends.settings(x),
        gemm_in_force(),
        fused_mlp_in_force(),
        tuple(SDPA_PREFERRED.items()),
    )


def place_of(x: Tensor) -> tuple[int, int]:
    """The input's device, and the current stream on it as an integer."""
    device = x.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)


def is_training(key: tuple) -> bool:
    """Whether a key is of a call with gradients."""
    return bool(key[-1])


def why_not_trainable() -> str | None:
    """Why nothing with gradients is recorded or replayed where this call of a model stands."""
    if torch.is_anomaly_enabled():
        return "autograd's anomaly mode is on"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "a hook is registered on saved tensors"
    return None


def why_not_recorded(parameters: Iterable[nn.Parameter]) -> str | None:
    """Why a call with gradients is not recorded, which computes them within a backward pass."""
    for parameter in parameters:
        if not parameter.is_leaf:
            return "a parameter was computed"
        if parameter._backward_hooks:
            return "a hook is registered on a parameter"
    return None


@contextmanager
def nothing_called(tape: Tape) -> Iterator[None]:
    """Refuses a recording in which a module is called, or any function that is neither PyTorch's, Triton's, Python's nor ours.

    Such a call may do more than launch: a hook, a layer of the user's, a function put in the place of another. Python collects no
    garbage meanwhile, so that what finalizes objects from elsewhere is not taken for one.
    """
    if sys.gettrace() is not None:
        tape.refuse("a debugger, or a measurement of coverage, traces Python's calls")
        yield
        return
    known: dict[int, tuple[CodeType, str | None]] = {}  # by id: a code's hash is computed from all of it each time

    def look(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        found = known.get(id(code))
        if found is None:
            found = known[id(code)] = code, _why_not_understood(code)
        if found[1] is not None:
            tape.refuse(found[1])

    collects = gc.isenabled()
    gc.disable()
    sys.settrace(look)  # a tracer that returns None gets call events only
    try:
        yield
    finally:
        sys.settrace(None)
        if collects:
            gc.enable()


def _why_not_understood(code: CodeType) -> str | None:
    if code in _MODULE_CALLS:
        return "a module is called"
    file = code.co_filename
    if file.startswith(_FOLDERS) or (file.startswith("<string>") and code.co_name in _GENERATED):
        return None
    if file.startswith(_STANDARD_LIBRARY) and not any(folder in file for folder in _INSTALLED):
        return None
    return None if _is_tritons(file) else f"{code.co_name} of {file} is called"


def _is_tritons(file: str) -> bool:
    import triton

    return file.startswith(f"{Path(triton.__file__).parent}/")


def why_parts_called(trunk: spec.Trunk, verdict: TrunkVerdict) -> str | None:
    """Why a module inside the blocks is called in a run that carries the residual through them."""
    for name, judged in zip(trunk.blocks, verdict.blocks, strict=True):
        reason = why_parts_of_block_called(judged)
        if reason is not None:
            return f"block {name}: {reason}"
    return None


def why_parts_of_block_called(verdict: BlockVerdict) -> str | None:
    """Why a module inside a block is called where the block runs fused."""
    return next(filter(None, (*verdict.parts, *verdict.called, *verdict.out_dropouts, verdict.tail)), None)
