"""The report of what runs fused in a model."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdeit.cost.formulas import Cost

_NORMS = ("LayerNorm",)


class Row(NamedTuple):
    """One module: what runs for it, and why that is not a fused kernel where it isn't."""

    name: str  # as in `model.named_modules()`
    kind: str  # the class that it is, or stands in for
    fused: bool
    reason: str  # empty if fused

    @property
    def matched(self) -> bool:
        """Whether fastdeit has a fused class for it, used or not."""
        return self.fused or not self.reason.startswith("no fused class")


class Report:
    """Rows in the order of the model's modules. Iterate over it, print it, or take `as_dict()`.

    Args:
        rows: one a module.
        costs: by module name what a forward pass costs there, as it would run and as timm runs it; empty if nobody asked.
        batch_size: images of that pass.
        plans: a line for each kind of call that models have had, which says whether its launches are repeated from a plan.
    """

    def __init__(
        self,
        rows: list[Row],
        costs: Mapping[str, tuple[Cost, Cost]] | None = None,
        batch_size: int = 0,
        plans: Sequence[str] = (),
    ):
        self.rows = rows
        self.plans = list(plans)
        self.costs = costs or {}
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def as_dict(self) -> dict[str, dict[str, object]]:
        """{name: {"kind", "fused", "reason"}}, for JSON; with costs also "launches", "bytes", "timm_launches", "timm_bytes"."""
        found: dict[str, dict[str, object]] = {}
        for row in self.rows:
            found[row.name] = {"kind": row.kind, "fused": row.fused, "reason": row.reason}
            if row.name in self.costs:
                ours, timms = self.costs[row.name]
                found[row.name] |= dict(launches=ours.launches, bytes=ours.bytes)
                found[row.name] |= dict(timm_launches=timms.launches, timm_bytes=timms.bytes)
        return found

    def cells(self) -> list[tuple[str, ...]]:
        """A header and rows of text. Modules that differ in their index alone and fare the same share a row: `blocks.0-11.attn`."""
        priced = ("launches", "MB", "timm's launches", "timm's MB") if self.costs else ()
        lines: list[tuple[str, ...]] = [("module", "kind", "runs", *priced, "reason")]
        for rows in self._alike():
            name = _joint_name([row.name for row in rows]) or "(the model)"
            prices = _prices(self.costs, [row.name for row in rows]) if priced else ()
            lines.append((name, rows[0].kind, "fused" if rows[0].fused else "stock", *prices, rows[0].reason))
        return lines

    def summary(self) -> str:
        """How many modules run fused, the plans, and with costs the totals; a line each."""
        fused = sum(row.fused for row in self.rows)
        plans = "".join(f"\n{line}" for line in self.plans)
        return f"{fused} of {len(self.rows)} modules run fused" + plans + self._total() + self._hint()

    def __str__(self) -> str:
        """The cells as a table, and the summary below it."""
        lines = self.cells()
        last = len(lines[0]) - 1
        widths = [max(len(line[i]) for line in lines) for i in range(last)]
        lines.insert(1, tuple("-" * width for width in (*widths, len("reason"))))
        table = "\n".join(
            "  ".join(
                (
                    *(c.rjust(w) if i > 2 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=False))),
                    line[last],
                )
            ).rstrip()
            for line in lines
        )
        return f"{table}\n{self.summary()}"

    def _total(self) -> str:
        if not self.costs:
            return ""
        launches, megabytes, timms_launches, timms_megabytes = _prices(self.costs, list(self.costs))
        return (
            f"\na forward pass of {self.batch_size} images, by arithmetic: {launches} launches and {megabytes} MB, "
            f"in timm {timms_launches} and {timms_megabytes} MB"
        )

    def _hint(self) -> str:
        """One sentence for a model of which only LayerNorms were matched."""
        if not any(row.matched for row in self.rows) or any(
            row.matched and row.kind not in _NORMS for row in self.rows
        ):
            return ""
        return "\nonly LayerNorms were matched: no transformer block of a class in docs/hosts.md was found"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {sum(row.fused for row in self.rows)} of {len(self.rows)} modules fused>"

    def _alike(self) -> list[list[Row]]:
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            before, _, after = _around_index(row.name)
            groups.setdefault((before, after, *row[1:], self.costs.get(row.name)), []).append(row)
        return list(groups.values())


def explain_modules(named: dict[str, nn.Module], batch_size: int | None = None) -> Report:
    """The report of `fastdeit.explain` on what `named_modules()` gave, with costs for a batch_size that is not None."""
    from fastdeit.blocks.checklist import EXCLUDED
    from fastdeit.nn.hosts import (  # imports timm, which `import fastdeit` need not
        fused_classes,
        has_known_name,
        why_no_class,
    )
    from fastdeit.plan.planned import described

    fused = fused_classes()
    sources = {twin: source for source, twin in fused.items()}
    known = (*sources, *fused)
    covering = tuple(source for twin, source in sources.items() if twin.covers_parts)
    fallback = next((p for module in named.values() for p in module.parameters()), torch.empty(0))
    rows = []
    explained: tuple[str, ...] = ()
    embeddings: dict[str, nn.Module] = {}  # name of a convolution -> the model that may run it
    for name, module in named.items():
        cls = type(module)
        twin = next((c for c in cls.__mro__ if c in sources), None)
        if twin is not None:
            reason = _why_not_fused(module, fallback)
            note = module.note() if reason is None and hasattr(module, "note") else None
            rows.append(Row(name, sources[twin].__name__, reason is None, reason or note or ""))
            if hasattr(module, "why_not_embedded"):
                embeddings[f"{name}.patch_embed.proj" if name else "patch_embed.proj"] = module
        elif cls in fused:
            rows.append(
                Row(name, cls.__name__, False, "excluded" if EXCLUDED in module.__dict__ else "not accelerated")
            )
        elif isinstance(module, known):
            base = next(c for c in cls.__mro__ if c in known)
            rows.append(
                Row(name, cls.__name__, False, f"a class derived from {base.__name__}, with a forward of its own")
            )
        elif name in embeddings:
            reason = "excluded" if EXCLUDED in module.__dict__ else _why_not_embedded(embeddings[name])
            rows.append(Row(name, cls.__name__, reason is None, reason or ""))
        elif (module._parameters or has_known_name(cls)) and not name.startswith(explained):
            rows.append(Row(name, cls.__name__, False, why_no_class(cls)))
        if isinstance(module, covering):
            explained += (name + "." if name else "",)
    plans = _joint_lines({name: described(module) for name, module in named.items()})
    if batch_size is None:
        return Report(rows, plans=plans)
    from fastdeit.cost.view import forward_costs

    return Report(rows, forward_costs(named[""], rows, batch_size), batch_size, plans)


def _prices(costs: Mapping[str, tuple[Cost, Cost]], names: list[str]) -> tuple[str, ...]:
    """Launches and megabytes of modules together, as they run and as in timm; empty texts where no cost is known."""
    found = [costs[name] for name in names if name in costs]
    if not found:
        return ("",) * 4
    sums = (sum((pair[i] for pair in found), Cost(0, 0, 0)) for i in (0, 1))
    return tuple(text for cost in sums for text in (f"{cost.launches:,}", f"{cost.bytes / 1e6:,.0f}"))


def _why_not_fused(module: Any, fallback: Tensor) -> str | None:
    if "forward" in module.__dict__ and not _wraps_its_class(module):
        return "it has a forward of its own"
    parameter = next(module.parameters(), fallback)
    channels = (
        module.normalized_shape[-1] if isinstance(module, nn.LayerNorm) else (*parameter.shape, 1)[parameter.dim() - 1]
    )
    try:
        return module.why_not_fused(torch.empty(1, 1, channels, device=parameter.device, dtype=parameter.dtype))
    except RuntimeError as error:  # the backend "triton" where it cannot run: so would forward
        return str(error)


def _wraps_its_class(module: nn.Module) -> bool:
    """Whether the forward put on this instance ends in its class's, as that of Hugging Face Accelerate's `prepare` does."""
    innermost = inspect.unwrap(module.__dict__["forward"])
    return getattr(innermost, "__func__", None) is type(module).forward and innermost.__self__ is module


def _why_not_embedded(model: nn.Module) -> str | None:
    try:
        return model.why_not_embedded()
    except RuntimeError as error:
        return str(error)


def _around_index(name: str) -> tuple[str, str, str]:
    """A dotted name around its index: the last part that is a number, as in blocks.11.attn, else the first number at the end of a
    part, as in encoder_layer_11.ln_1. A name without an index has two empty ends.
    """
    found = re.fullmatch(r"((?:.*\.)?)(\d+)((?:\..*)?)", name) or re.fullmatch(r"(.*?_)(\d+)((?:\..*)?)", name)
    return (found[1], found[2], found[3]) if found else (name, "", "")


def _joint_lines(described: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines on the calls of modules, by name, with one for those that differ in their index alone."""
    groups: dict[tuple, list[str]] = {}
    for name, lines in described.items():
        before, _, after = _around_index(name)
        for line in lines:
            groups.setdefault((before, after, line), []).append(name)
    return [
        f"calls{f' of {_joint_name(names)}' if names[0] else ''} with {line}" for (*_, line), names in groups.items()
    ]


def _joint_name(names: list[str]) -> str:
    """Names that differ in their index alone as one: blocks.0-11.attn."""
    before, index, after = _around_index(names[0])
    return f"{before}{_ranges([int(_around_index(name)[1]) for name in names])}{after}" if index else names[0]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
