"""The order in which cases are measured: what matters most first, since time may run out."""

import itertools
from collections.abc import Sequence
from typing import Any


def by_importance(*axes: Sequence[Any]) -> list[tuple]:
    """All combinations of the axes' values, each axis given most important value first.

    Combinations of values that stand first come first.
    """
    ranked = itertools.product(*(enumerate(axis) for axis in axes))
    ordered = sorted(ranked, key=lambda combination: sum(rank for rank, _ in combination))
    return [tuple(value for _, value in combination) for combination in ordered]


def label(case: Sequence[Any]) -> str:
    """A case in a file name and in pytest's -k: `backward-256-197x12x64`."""
    return "-".join("x".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in case)
