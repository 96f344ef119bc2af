"""Checks of a configuration's schedules: entries by first epoch, in order, the last of them with the plain field's value."""

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdeit.train.config import Config

LARGEST_SIZE = 4096
MOST_PARTS = 2**24


def check_schedules(c: "Config") -> None:
    """Raises ValueError for a schedule that is not in order, does not fit the run, or contradicts the field that it is of."""
    sizes = c.img_size_schedule
    if sizes is not None:
        form = "[epoch, size] or [epoch, size, grad_accum_steps]"
        _check_entries("img_size_schedule", sizes, (2, 3), form)
        for entry in sizes:
            for value, what, most in zip(entry[1:], ("sizes", "parts"), (LARGEST_SIZE, MOST_PARTS), strict=False):
                if not _is_count(value) or not 1 <= value <= most:
                    raise ValueError(f"img_size_schedule: expected {what} from 1 to {most}, got {entry}")
        if any(later[1] < earlier[1] for earlier, later in itertools.pairwise(sizes)):
            raise ValueError(f"img_size_schedule: expected sizes that never shrink, got {sizes}")
        _check_end("img_size_schedule", sizes, c.epochs, "img_size", c.img_size)
        if len({len(entry) for entry in sizes}) > 1:
            raise ValueError(f"img_size_schedule: expected grad_accum_steps in all entries or in none, got {sizes}")
        if len(sizes[-1]) == 3 and sizes[-1][2] != c.grad_accum_steps:
            raise ValueError(
                f"img_size_schedule: ends with grad_accum_steps {sizes[-1][2]}, and grad_accum_steps is {c.grad_accum_steps}; "
                "expected the same"
            )
    policies = c.aa_schedule
    if policies is not None:
        _check_entries("aa_schedule", policies, (2,), "[epoch, policy]")
        for entry in policies:
            if entry[1] is not None and (not isinstance(entry[1], str) or not entry[1].strip()):
                raise ValueError(f"aa_schedule: expected policies as aa has them, or null, got {entry}")
        _check_end("aa_schedule", policies, c.epochs, "aa", c.aa)


def _check_entries(name: str, schedule: list[list[Any]], lengths: tuple[int, ...], form: str) -> None:
    if not schedule:
        raise ValueError(f"{name}: expected at least one entry {form}, got none; null is for no schedule")
    for entry in schedule:
        if len(entry) not in lengths or not _is_count(entry[0]):
            raise ValueError(f"{name}: expected entries {form}, got {entry}")
    epochs = [entry[0] for entry in schedule]
    if epochs[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(epochs)):
        raise ValueError(f"{name}: expected epochs that start at 0 and increase, got {', '.join(map(str, epochs))}")


def _check_end(name: str, schedule: list[list[Any]], epochs: int, field: str, value: Any) -> None:
    last = schedule[-1]
    if last[0] >= epochs:
        raise ValueError(f"{name}: its last entry starts at epoch {last[0]}, expected less than epochs ({epochs})")
    if last[1] != value:
        raise ValueError(f"{name}: ends with {last[1]}, and {field} is {value}; expected the same")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
