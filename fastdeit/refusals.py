"""Kernels that the compiler or the driver refuses, and the ops that fall back to their references from then on.

Under the backend "auto" the first refusal of the compiler or the driver hands the ops of that subject (a folder of kernels) over to
their references, for this process alone; each rank of a distributed run decides for itself. Under "triton" it is an error.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

REPORT_COMMAND = "python -m fastdeit.benchmarks.small_kernels"
_EVERY_OP = "runtime"  # the subject of what all ops use

# subject -> the first kernel refused, and why; others only read it
refused: dict[str, str] = {}
# ops with dtypes, shapes and frozen inputs of calls whose backward was compiled
_compiled: set[tuple] = set()
# How many calls were unlike all before them, and how often they were all forgotten.
_first_calls = 0
generation = 0
_F = TypeVar("_F", bound=Callable)


def why_refused(*subjects: str) -> str | None:
    """Why ops that use kernels of these subjects run PyTorch here; None if no kernel was refused."""
    if not refused:
        return None
    return next((refused[subject] for subject in (*subjects, _EVERY_OP) if subject in refused), None)


def forget() -> None:
    """The kernels are tried anew, for tests and after a change of the machine's compiler."""
    global generation
    refused.clear()
    _compiled.clear()
    generation += 1


def or_reference(op: _F) -> _F:
    """A public op that is called again when a kernel of it is refused. Its `why_reference` then names the refusal, so that this
    call and all later ones run the reference.

    A first call (`first_call`) with gradients, for each combination of dtypes, shapes and frozen inputs, also compiles the kernels
    of backward: a refusal of one of those hands the op over before anything depends on what forward has saved.

    Raises:
        RuntimeError: a kernel is refused under the backend "triton", or inside the capture of a CUDA graph.
    """

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return op(*args, **kwargs)
        before = _first_calls
        try:
            result = op(*args, **kwargs)
            if _first_calls != before and torch.is_grad_enabled():
                _compile_backward(op.__name__, result, (*args, *kwargs.values()))
            return result
        except RuntimeError as error:
            # A function that raised it again, as its argument, would hold it, and it that function's frame and all of a failed
            # call's tensors: until Python collects garbage, where memory has run out.
            if not _hand_over(error):
                raise
        return op(*args, **kwargs)

    return call


def first_call() -> bool:
    """Notes that an op's call is unlike all before it. False where its backward cannot be compiled: the next is a first one too."""
    global _first_calls
    _first_calls += 1
    return not (torch.is_grad_enabled() and _inside_something())


def _compile_backward(op: str, result: Any, inputs: tuple) -> None:
    """Compiles backward's kernels from a result to the inputs, unless that was done for such inputs or cannot be done here."""
    results = result if isinstance(result, tuple) else (result,)
    if not results[0].is_cuda:
        return
    key = (op, *[(t.dtype, t.shape[1:], t.requires_grad) for t in inputs if isinstance(t, Tensor)])
    if key in _compiled:
        return
    outputs = [t for t in results if t is not None and t.requires_grad]
    if not outputs or _inside_something():
        return
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    nodes = _own_nodes(outputs, {id(t.grad_fn) for t in wanted if t.grad_fn is not None})
    if not nodes:  # the reference ran
        return
    from fastdeit.kernels.runtime.launch import CompiledOnly

    held, handles = CompiledOnly(), []
    for node in nodes:
        # Hooks, since CUDA's nodes run in a thread of autograd's.
        handles.append(node.register_prehook(lambda grads: held.begin()))
        handles.append(node.register_hook(lambda inputs, grads: held.end()))
    try:
        grads = [torch.zeros_like(y) for y in outputs]
        with _without_hooks(wanted):
            torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True)
    finally:
        held.close()
        for handle in handles:
            handle.remove()
    _compiled.add(key)


@contextmanager
def _without_hooks(tensors: list[Tensor]) -> Iterator[None]:
    """Hooks on the tensors' gradients are not called: this is no backward pass, as which FSDP2's hooks would take it."""
    hooks = [tensor._backward_hooks for tensor in tensors if tensor._backward_hooks]
    before = list(map(dict, hooks))
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, those in zip(hooks, before, strict=True):
            each.update(those)


def _inside_something() -> bool:
    """Whether the context forbids running backward of a result at once: a capture, another backward, hooks on saved tensors
    (checkpointing), a dispatch mode."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._current_graph_task_id() != -1
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def _own_nodes(outputs: list[Tensor], beyond: set[int]) -> list[Any]:
    """The nodes of this package's ops in the graph from the outputs to the inputs, whose own nodes are `beyond`."""
    found: list[Any] = []
    seen, todo = set(beyond), [y.grad_fn for y in outputs]
    while todo:
        node = todo.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if getattr(node, "_forward_cls", object).__module__.startswith("fastdeit.ops."):
            found.append(node)
        todo += [following for following, _ in node.next_functions]
    return found


def _hand_over(error: RuntimeError) -> bool:
    """Records a refusal and warns once. False where the error is none.

    Raises:
        RuntimeError: the ops must not fall back.
    """
    from fastdeit import backends
    from fastdeit.kernels.runtime.refusal import KernelRefused  # which imports Triton

    if not isinstance(error, KernelRefused) or error.subject in refused:
        return False
    if backends.get_backend() == "triton":
        raise RuntimeError(f"backend 'triton' cannot run here: {error}. Use backend 'auto' or 'reference'.") from error
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{error}. Inside the capture of a CUDA graph nothing else can run in its place: call the model once before the "
            "capture, with gradients if it captures backward, or set backend 'reference'"
        ) from error
    refused[error.subject] = f"refused on this machine: {error.kernel}, {error.reason}"
    print(
        f"fastdeit: {error}. Ops with {error.subject} kernels run PyTorch from now on. `{REPORT_COMMAND}` tries every kernel.",
        file=sys.stderr,
        flush=True,
    )
    return True
