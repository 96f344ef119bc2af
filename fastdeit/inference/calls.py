"""How an optimized model answers calls: batches padded up to buckets, and CUDA graphs where the host is slower than the device."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdeit.blocks.snapshot import Snapshot
from fastdeit.inference import layers
from fastdeit.plan.graphs import MODES, AutomaticGraph
from fastdeit.plan.surroundings import circumstances, why_not_plannable

if TYPE_CHECKING:
    from fastdeit.inference.model import OptimizedModel

MOST_KINDS = 64  # of calls that are remembered at a time; a new one takes the place of the oldest
_PARTS = (
    layers.Embedding,
    layers.Norm,
    layers.Block,
    layers.Linear,
    layers.QuantizedLinear,
    nn.ModuleList,
    nn.ModuleDict,
)


class Calls:
    """The calls of one model. A copy of it, or a pickled one, begins anew.

    Args:
        cuda_graphs: "auto", or "off", which captures none.
        buckets: batch sizes that smaller batches are padded to.

    Raises:
        TypeError: a bucket is no whole number.
        ValueError: cuda_graphs is another, or a bucket is below 1.
    """

    def __init__(self, cuda_graphs: str = "auto", buckets: Iterable[int] = ()) -> None:
        if not isinstance(cuda_graphs, str) or cuda_graphs not in MODES:
            raise ValueError(f"cuda_graphs: expected one of {', '.join(MODES)}, got {cuda_graphs!r}")
        if isinstance(buckets, str) or not isinstance(buckets, Iterable):
            raise TypeError(f"buckets: expected batch sizes, such as (1, 8, 64), got {buckets!r}")
        self.cuda_graphs, self.buckets = cuda_graphs, tuple(buckets)
        for bucket in self.buckets:
            if isinstance(bucket, bool) or not isinstance(bucket, int):
                raise TypeError(f"buckets: expected whole numbers, got {bucket!r}")
            if bucket < 1:
                raise ValueError(f"buckets: expected batch sizes of at least 1, got {bucket}")
        self.buckets = tuple(sorted(set(self.buckets)))
        self._graphs: OrderedDict[tuple, AutomaticGraph] = OrderedDict()
        self._seen: _Seen | None = None  # the model that they are graphs of
        self._changing = threading.Lock()

    def __reduce__(self) -> tuple:
        return Calls, (self.cuda_graphs, self.buckets)

    def __call__(self, model: "OptimizedModel", images: Tensor) -> Tensor:
        """The logits of images that the model's check has accepted, without autocast."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return model.run(images)
        count = len(images)
        batch = Batch(model, next((bucket for bucket in self.buckets if bucket >= count > 0), count))
        if self.cuda_graphs == "off" or why_not_plannable(images) is not None or self._why_no_graph(model) is not None:
            return batch.launch(images)
        key = batch.images, *circumstances(images)
        graph = self._graphs.get(key)
        return (self._add(key) if graph is None else graph).run(batch, images)

    def described(self) -> list[str]:
        """A line for each kind of call since the model last changed."""
        lines = []
        for (images, device, stream, *_), graph in list(self._graphs.items()):
            where = f"cuda:{device}" + (f", stream {stream:#x}" if stream else "")
            lines.append(f"{images} image{'s' * (images > 1)} on {where}: {graph.state}")
        return lines

    def _why_no_graph(self, model: "OptimizedModel") -> str | None:
        seen = self._seen
        if seen is None or not seen.still_holds(model):
            with self._changing:
                self._graphs.clear()
                seen = self._seen = _Seen(model)
        return seen.why_no_graph

    def _add(self, key: tuple) -> AutomaticGraph:
        with self._changing:
            while len(self._graphs) >= MOST_KINDS:
                self._graphs.popitem(last=False)
            return self._graphs.setdefault(key, AutomaticGraph())


class Batch(NamedTuple):
    """A model's calls with at most so many images, as `AutomaticGraph` runs and captures them."""

    model: "OptimizedModel"
    images: int

    def launch(self, images: Tensor) -> Tensor:
        if len(images) == self.images:
            return self.model.run(images)
        padded = self.receive(images)
        padded[: len(images)] = images
        return self.model.run(padded)[: len(images)]

    def receive(self, images: Tensor) -> Tensor:
        """Zeros in the dtype in which the model's kernels read images."""
        dtype = images.dtype if images.dtype == torch.uint8 else self.model.dtype
        return images.new_zeros((self.images, *images.shape[1:]), dtype=dtype)

    def fixed(self, stream: int) -> tuple[Callable[[Tensor], object], Tensor, Any]:
        """The model's run into an output, and the buffers that it reads."""
        model = self.model
        out = torch.empty((self.images, model.architecture.classes), dtype=model.dtype, device=model.device)
        return lambda images: out.copy_(model.run(images)), out, list(model.buffers())


class _Seen:
    """A model's state at the time its graphs were captured."""

    def __init__(self, model: "OptimizedModel") -> None:
        self._model = model
        self._snapshot = Snapshot(model)
        self._buffers = list(model.buffers())
        self._addresses = list(map(Tensor.data_ptr, self._buffers))
        self.why_no_graph = _why_no_graph(model)

    def still_holds(self, model: "OptimizedModel") -> bool:
        """Whether modules, hooks and buffers are the same; values of buffers may be others, which graphs read."""
        return (
            model is self._model
            and list(map(Tensor.data_ptr, self._buffers)) == self._addresses
            and self._snapshot.unchanged()
        )


def _why_no_graph(model: "OptimizedModel") -> str | None:
    """Why a call of the model may do more than launch."""
    for name, module in model.named_modules():
        if module is model:
            continue
        if type(module) not in _PARTS or "forward" in module.__dict__:
            return f"{name} is a {type(module).__name__} of another's"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has a hook"
        if isinstance(module, layers.Block) and module.tap is not None:
            return f"{name} has a tap"
    return None
