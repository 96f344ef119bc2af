"""A checker for kernels under Triton's interpreter: finds faulty memory accesses that running programs in turn hides.

While it is active, each launch is held to these rules:

- Every active lane of a load or store addresses an element of an argument: one that its shape and strides reach. What lies in its
  storage before, behind or between them is out of bounds.
- Programs run in random order. No address is written by two programs, written twice by one store, or written by one program and
  read by another. No program reads what it has stored, since no barrier orders its threads' global accesses.
- Hints to the compiler are true: `multiple_of`, `max_contiguous`, `max_constancy`, `assume`, and functions given as `multiples`.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor


@dataclass
class Checker:
    """What a checked run has seen.

    findings: sentences, each breach once per kernel; counts: launches, programs, loads, stores and claims.
    """

    findings: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    _launch: "_Launch | None" = None

    def report(self, sentence: str) -> None:
        kernel = self._launch.kernel if self._launch else "outside a launch"
        if (line := f"{kernel}: {sentence}") not in self.findings:
            self.findings.append(line)


@dataclass
class _Launch:
    kernel: str
    elements: list[np.ndarray] = field(default_factory=list)  # of each argument, the addresses of its elements, sorted
    order: list[tuple[int, int, int]] = field(default_factory=list)  # of the grid's programs
    ran: int = 0
    reads: list[tuple[int, np.ndarray]] = field(default_factory=list)  # program, addresses
    writes: list[tuple[int, np.ndarray]] = field(default_factory=list)


@contextlib.contextmanager
def checked_interpreter(multiples: Sequence[Any] = (), seed: int = 0) -> Iterator[Checker]:
    """Checks every kernel that the interpreter runs within a with statement.

    Args:
        multiples: interpreted functions (x, VECTOR) that tell the compiler that x is a multiple of VECTOR by computing it.
        seed: of the order of programs.

    Yields:
        The checker. Findings do not stop the run.
    """
    from triton.runtime import interpreter

    checker, order = Checker(), random.Random(seed)
    executor, builder, handle = interpreter.GridExecutor, interpreter.InterpreterBuilder, interpreter.TensorHandle
    with contextlib.ExitStack() as undo:

        def patch(owner: Any, name: str, make: Callable) -> None:
            plain = getattr(owner, name)
            setattr(owner, name, make(plain))
            undo.callback(setattr, owner, name, plain)

        patch(executor, "__call__", lambda plain: _launching(checker, plain))
        patch(executor, "_init_args_hst", lambda plain: _with_elements(checker, plain))
        patch(builder, "set_grid_dim", lambda plain: _ordering(checker, order, plain))
        patch(builder, "set_grid_idx", lambda plain: _shuffling(checker, plain))
        patch(builder, "create_masked_load", lambda plain: _loading(checker, plain))
        patch(builder, "create_masked_store", lambda plain: _storing(checker, plain))
        patch(builder, "create_assume", lambda plain: _assuming(checker, plain))
        patch(handle, "set_attr", lambda plain: _claiming(checker, plain))
        for function in multiples:
            plain = function.rewrite()
            function.rewritten_fn[function.fn] = _multiplying(checker, plain)
            undo.callback(function.rewritten_fn.__setitem__, function.fn, plain)
        yield checker


# ---- launches


def _launching(checker: Checker, plain: Callable) -> Callable:
    def call(self, *args, **kwargs):
        launch = checker._launch = _Launch(self.fn.__name__)
        try:
            plain(self, *args, **kwargs)
            _check_sharing(checker, launch)
        finally:
            checker._launch = None

    return call


def _with_elements(checker: Checker, plain: Callable) -> Callable:
    def init(self, args, kwargs):
        args, kwargs = plain(self, args, kwargs)
        for arg in (*args, *kwargs.values()):
            tensor = getattr(arg, "base", arg)  # of a descriptor
            if isinstance(tensor, Tensor) and tensor.numel():
                checker._launch.elements.append(_element_addresses(tensor))
        return args, kwargs

    return init


def _element_addresses(tensor: Tensor) -> np.ndarray:
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride:
            offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return np.sort(tensor.data_ptr() + offsets * tensor.element_size())


def _ordering(checker: Checker, order: random.Random, plain: Callable) -> Callable:
    def set_grid_dim(self, x, y, z):
        plain(self, x, y, z)
        launch = checker._launch
        launch.order = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
        order.shuffle(launch.order)
        checker.counts["launches"] += 1

    return set_grid_dim


def _shuffling(checker: Checker, plain: Callable) -> Callable:
    def set_grid_idx(self, x, y, z):
        launch = checker._launch
        plain(self, *launch.order[launch.ran])
        launch.ran += 1
        checker.counts["programs"] += 1

    return set_grid_idx


# ---- memory


def _loading(checker: Checker, plain: Callable) -> Callable:
    def load(self, pointers, mask, *rest, **options):
        launch, addresses = checker._launch, _active(pointers, mask)
        checker.counts["loads"] += 1
        _check_bounds(checker, "reads", addresses)
        launch.reads.append((launch.ran, addresses))
        if any(np.isin(addresses, written).any() for program, written in launch.writes if program == launch.ran):
            checker.report("a program reads what it has stored")
        return plain(self, pointers, mask, *rest, **options)

    return load


def _storing(checker: Checker, plain: Callable) -> Callable:
    def store(self, pointers, value, mask, *rest, **options):
        launch, addresses = checker._launch, _active(pointers, mask)
        checker.counts["stores"] += 1
        _check_bounds(checker, "writes", addresses)
        if np.unique(addresses).size != addresses.size:
            checker.report("a store writes an address twice")
        launch.writes.append((launch.ran, addresses))
        return plain(self, pointers, value, mask, *rest, **options)

    return store


def _active(pointers, mask) -> np.ndarray:
    addresses = np.asarray(pointers.data)
    lanes = np.asarray(mask.data).astype(bool)  # the interpreter makes integers of one truth value for a block
    return addresses[np.broadcast_to(lanes, addresses.shape)].astype(np.int64).ravel()


def _check_bounds(checker: Checker, verb: str, addresses: np.ndarray) -> None:
    outside = np.ones(addresses.shape, bool)
    for elements in checker._launch.elements:
        at = np.searchsorted(elements, addresses).clip(max=elements.size - 1)
        outside &= elements[at] != addresses
        if not outside.any():
            return
    if outside.any():
        checker.report(f"a lane {verb} outside every argument's elements")


def _check_sharing(checker: Checker, launch: _Launch) -> None:
    """No address is written by two programs, or written by one and read by another."""
    if not launch.writes:
        return
    written, writers = _flat(launch.writes)
    order = np.lexsort((writers, written))
    written, writers = written[order], writers[order]
    if ((written[1:] == written[:-1]) & (writers[1:] != writers[:-1])).any():
        checker.report("two programs write one address")
    if launch.reads:
        read, readers = _flat(launch.reads)
        at = np.searchsorted(written, read).clip(max=written.size - 1)
        if ((written[at] == read) & (writers[at] != readers)).any():
            checker.report("a program reads what another writes")


def _flat(accesses: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    addresses = np.concatenate([found for _, found in accesses])
    return addresses, np.concatenate([np.full(found.size, program) for program, found in accesses])


# ---- claims to the compiler


def _claiming(checker: Checker, plain: Callable) -> Callable:
    def set_attr(self, name, values):
        values = values if isinstance(values, list | tuple) else (values,)
        value = int(getattr(values[-1], "value", values[-1]))
        checker.counts["claims"] += 1
        rows = np.asarray(self.data).astype(np.int64)
        rows = rows.reshape(-1, rows.shape[-1] if rows.ndim else 1)
        if name == "tt.divisibility":
            # Of a block: the first of each run of consecutive values.
            first = np.ones(rows.shape, bool)
            first[:, 1:] = np.diff(rows, axis=1) != 1
            if (rows[first] % value).any():
                checker.report(f"multiple_of({value}) is false")
        elif rows.shape[1] >= value > 1:
            step = {"tt.contiguity": 1, "tt.constancy": 0}[name]
            runs = rows[:, : rows.shape[1] // value * value].reshape(-1, value)
            if (np.diff(runs, axis=1) != step).any():
                checker.report(f"{'max_contiguous' if step else 'max_constancy'}({value}) is false")
        return plain(self, name, values)

    return set_attr


def _assuming(checker: Checker, plain: Callable) -> Callable:
    def create_assume(self, condition):
        checker.counts["claims"] += 1
        if not condition:
            checker.report("assume() is false")

    return create_assume


def _multiplying(checker: Checker, plain: Callable) -> Callable:
    def multiple(x, vector):
        checker.counts["claims"] += 1
        value = x.handle.data if hasattr(x, "handle") else x
        divisor = getattr(vector, "value", vector)
        if (np.asarray(value) % np.asarray(divisor)).any():
            checker.report(f"a value is no multiple of {divisor}, as it is said to be")
        return plain(x, vector)

    return multiple
