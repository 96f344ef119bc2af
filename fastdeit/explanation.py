"""The report of what runs fused in a model."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Row(NamedTuple):
    """One module: what runs for it, and why that is not a fused kernel where it isn't."""

    name: str  # as in `model.named_modules()`
    kind: str  # the class that it is, or stands in for
    fused: bool
    reason: str  # empty if fused


class Report:
    """Rows in the order of the model's modules. Iterate over it, print it, or take `as_dict()`."""

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def as_dict(self) -> dict[str, dict[str, object]]:
        """{name: {"kind", "fused", "reason"}}, for JSON."""
        return {row.name: {"kind": row.kind, "fused": row.fused, "reason": row.reason} for row in self.rows}

    def __str__(self) -> str:
        """A table. Modules that differ in their index alone and fare the same share a line: `blocks.0-11.attn`."""
        lines = [("module", "kind", "runs", "reason")]
        for rows in self._alike():
            name = _joint_name([row.name for row in rows]) or "(the model)"
            lines.append((name, rows[0].kind, "fused" if rows[0].fused else "timm's", rows[0].reason))
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        lines.insert(1, tuple("-" * width for width in (*widths, len("reason"))))
        table = "\n".join(
            "  ".join((*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3])).rstrip()
            for line in lines
        )
        fused = sum(row.fused for row in self.rows)
        return f"{table}\n{fused} of {len(self.rows)} modules run fused"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {sum(row.fused for row in self.rows)} of {len(self.rows)} modules fused>"

    def _alike(self) -> list[list[Row]]:
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            parts, place = _last_index(row.name)
            name = row.name if place is None else (place, *parts[:place], *parts[place + 1 :])
            groups.setdefault((name, *row[1:]), []).append(row)
        return list(groups.values())


def explain_modules(named: dict[str, nn.Module]) -> Report:
    """The report of `fastdeit.explain` on what `named_modules()` gave."""
    from fastdeit.nn import FUSED_CLASSES, Attention, Block, Mlp  # imports timm, which `import fastdeit` need not

    sources = {twin: source for source, twin in FUSED_CLASSES.items()}
    known = (*sources, *FUSED_CLASSES)
    whole = tuple(sources[twin] for twin in (Attention, Block, Mlp))  # their other parts are what they compute
    fallback = next((p for module in named.values() for p in module.parameters()), torch.empty(0))
    rows = []
    explained: tuple[str, ...] = ()
    for name, module in named.items():
        cls = type(module)
        twin = next((c for c in cls.__mro__ if c in sources), None)
        if twin is not None:
            reason = _why_not_fused(module, fallback)
            rows.append(Row(name, sources[twin].__name__, reason is None, reason or ""))
        elif cls in FUSED_CLASSES:
            rows.append(Row(name, cls.__name__, False, "not accelerated"))
        elif isinstance(module, known):
            base = next(c for c in cls.__mro__ if c in known)
            rows.append(
                Row(name, cls.__name__, False, f"a class derived from {base.__name__}, with a forward of its own")
            )
        elif module._parameters and not name.startswith(explained):
            rows.append(Row(name, cls.__name__, False, f"no fused class for {cls.__name__}"))
        if isinstance(module, whole):
            explained += (name + "." if name else "",)
    return Report(rows)


def _why_not_fused(module: nn.Module, fallback: Tensor) -> str | None:
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    parameter = next(module.parameters(), fallback)
    channels = (
        module.normalized_shape[-1] if isinstance(module, nn.LayerNorm) else (*parameter.shape, 1)[parameter.dim() - 1]
    )
    try:
        return module.why_not_fused(torch.empty(1, 1, channels, device=parameter.device, dtype=parameter.dtype))
    except RuntimeError as error:  # the backend "triton" where it cannot run: so would forward
        return str(error)


def _last_index(name: str) -> tuple[list[str], int | None]:
    """The dotted name's parts and the place of the last number among them."""
    parts = name.split(".")
    return parts, max((i for i, part in enumerate(parts) if part.isdigit()), default=None)


def _joint_name(names: list[str]) -> str:
    """Names that differ in their last index alone as one: blocks.0-11.attn."""
    parts, place = _last_index(names[0])
    if place is None:
        return names[0]
    numbers = [int(name.split(".")[place]) for name in names]
    return ".".join((*parts[:place], _ranges(numbers), *parts[place + 1 :]))


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
