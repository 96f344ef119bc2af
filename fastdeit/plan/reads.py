"""What a recording read besides its inputs, and whether it is unchanged, address included."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from fastdeit.plan.tape import Launch, Operation

_FACTS = (attrgetter("dtype"), attrgetter("shape"), Tensor.stride, attrgetter("device"))


class Reads:
    """The parameters and kernels of some events.

    Args:
        tensors: those that the events may read beside their inputs.

    Attributes:
        parameters: those of them that they read.
    """

    def __init__(self, events: Sequence[Launch | Operation], tensors: Sequence[Tensor]) -> None:
        read = {buffer.address for event in events for buffer in event.buffers}
        self.parameters = [p for p in tensors if p.untyped_storage().data_ptr() in read]
        (self._addresses, *self._found), self._guard = places(self.parameters), None
        launches = [event.made.kernel for event in events if isinstance(event, Launch)]
        self._kernels = list({id(kernel): kernel for kernel in launches}.values())

    def still_hold(self) -> bool:
        """Whether every parameter has its address and facts as before: nothing announces a replaced `data`."""
        for kernel in self._kernels:  # as `hooked`, without a call: each planned call comes here
            if kernel.pre_run_hooks:
                return False
        if list(map(Tensor.data_ptr, self.parameters)) != self._addresses:
            return False
        # The guard compares with the dispatch keys of where it was made too: in inference mode it fails outside of it.
        if self._guard is not None and self._guard.check(*self.parameters):
            return True
        if _facts(self.parameters) != self._found:
            return False
        self._guard = self._guard or _guard(self.parameters)
        return True

    def hooked(self) -> bool:
        """Whether a hook of Triton's is registered on one of the kernels."""
        return any(kernel.pre_run_hooks for kernel in self._kernels)

    def changed(self) -> list[Tensor]:
        """The parameters whose address or facts are others."""
        now = zip(*places(self.parameters), strict=True)
        before = zip(self._addresses, *self._found, strict=True)
        return [each for each, old, new in zip(self.parameters, before, now, strict=True) if old != new]


def places(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Addresses and facts: all that assigning to `data` may change."""
    return list(map(Tensor.data_ptr, tensors)), *_facts(tensors)


def _facts(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """What assigning to `data` may change besides the address."""
    return [list(map(fact, tensors)) for fact in _FACTS]


def _guard(tensors: list[Tensor]) -> Any:
    """Dynamo's guard of dtype, device, shape and strides, which compares the same facts in a sixth of the time."""
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
