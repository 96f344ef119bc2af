"""Skips an op's checks of arguments for calls of the same kind as one that has passed them and run its kernels."""

from collections.abc import Sequence
from functools import partial
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from fastdeit import backends, refusals

_LIMIT = 4096  # calls an op; images of ever new sizes would add to them without end
# Without a Python call for each tensor.
_given = partial(is_not, None)
_read = attrgetter("shape", "dtype", "device", "layout", "requires_grad")


class PassedCalls:
    """The calls of one op that passed its checks, by everything that these read of a call: of each tensor type, shape, dtype,
    device, layout and whether it requires a gradient, the options with their types, and `backends.settings`.

    The kernels of backward were compiled for them too (`refusals.or_reference`).

    Args:
        products: the op multiplies matrices, as in `backends.why_reference`.
    """

    def __init__(self, products: bool = True) -> None:
        self._passed: set[tuple] = set()
        self._products = products

    def has(self, tensors: Sequence[Tensor | None], *options: Any) -> bool:
        """Whether a call like this one has passed. It may have arguments of any type.

        Args:
            tensors: the first is the op's main input; None where an optional one is not given.
            options: everything else that the checks read.
        """
        if torch.compiler.is_dynamo_compiling():  # checks are traced, and cost the compiled code nothing
            return False
        try:
            return self._facts(tensors, options) in self._passed
        except (
            AttributeError,
            RuntimeError,
            TypeError,
        ):  # no tensor, one without a shape, an option that is not hashable
            return False

    def add(self, tensors: Sequence[Tensor | None], *options: Any) -> None:
        """Notes a call that has passed; arguments as in `has`."""
        if torch.compiler.is_compiling():
            return
        facts = self._facts(tensors, options)
        if refusals.first_call() and facts is not None:
            if len(self._passed) >= _LIMIT:
                self._passed.clear()
            self._passed.add(facts)

    def _facts(self, tensors: Sequence[Tensor | None], options: tuple) -> tuple | None:
        """The facts that the checks depend on, None for a call that is checked every time."""
        settings = backends.settings(tensors[0], self._products)
        if settings is None:
            return None
        types = map(type, (*tensors, *options))
        return settings, *options, *types, *map(_read, filter(_given, tensors))
