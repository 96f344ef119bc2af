"""A program bound to the addresses of its workspaces. The allocator chooses them anew at each call, mostly the same ones."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdeit.plan.program import MOST_ADDRESSES, Program


class Bound:
    """The functions that `Program.bind` gave for the addresses used last."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.functions: OrderedDict[tuple[int, ...], Callable[..., tuple[Any, ...]]] = OrderedDict()
        self._changing = threading.Lock()

    def at(self, *addresses: int) -> Callable[..., tuple[Any, ...]]:
        """The function for workspaces at these addresses."""
        return self.functions.get(addresses) or self._bind(addresses)

    def fixed(self, address: int, output: Tensor, stream: int) -> Callable[..., tuple[Any, ...]]:
        """As `Program.bind`, for the caller to keep."""
        with self._changing:
            return self._program.bind(address, output=output, stream=stream)

    def _bind(self, addresses: tuple[int, ...]) -> Callable[..., tuple[Any, ...]]:
        with self._changing:
            run = self._program.bind(*addresses)
            while len(self.functions) >= MOST_ADDRESSES:
                self.functions.popitem(last=False)
            self.functions[addresses] = run
        return run
