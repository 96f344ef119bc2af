"""FLOP formulas of registered ops, for PyTorch's FlopCounterMode.

Importing its module imports Triton, so the formulas are added only where it is already in use.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def add_to_counters(formulas: Mapping[Any, Callable[..., int]]) -> None:
    """Adds the formulas, by op, to every active FlopCounterMode, which copied PyTorch's registry when it was made."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or torch.compiler.is_compiling():
        return
    for op, formula in formulas.items():
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            mode.counter.flop_registry |= {op: counter.flop_registry[op] for op in formulas}
