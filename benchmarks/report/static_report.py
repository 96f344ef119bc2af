"""`fastdeit bench evidence`: what can be known without a GPU, beside what is on record.

Four kinds: what the compiler made of every kernel (fastdeit/aot/resources.json), what a DeiT-B block launches and keeps
for backward (counted, and held by record.json), its FLOPs by PyTorch's counter with and without the samples that stochastic depth
drops (counted, held by tests), and the host's time per launch as a ratio to a call of PyTorch (measured, on record, not held).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdeit.aot.report import RESOURCES_FILE
from fastdeit.benchmarks import launch_cost
from fastdeit.benchmarks.report import block_counts
from fastdeit.benchmarks.report.roofline_table import table
from fastdeit.cost.models import DEIT, parts
from fastdeit.testing import fake_cuda

RECORD = Path(__file__).with_name("record.json")
HOST = f"host time per call over that of {launch_cost.YARDSTICK.removeprefix('torch: ')}, not held"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--update", action="store_true", help="put the counts of now on record")
    parser.add_argument("--no-host", action="store_true", help="leave out the host's times, which take half a minute")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Prints the evidence; returns 1 if a count is worse than on record and --update was not given."""
    found = current()
    host = None if args.no_host else host_ratios()
    if args.update:
        old = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
        new = {"block of DeiT-B": found, HOST: rounded(host) if host else old.get(HOST)}
        RECORD.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
    worse = worsened(found, recorded())
    dropping = block_counts.counts_with_stochastic_depth()
    if args.json:
        parts = {"block": found, "stochastic depth": dropping, "kernels": kernels(), "host": host, "worse": worse}
        print(json.dumps(parts, indent=2))
    else:
        print(report(found, dropping, host))
        print("\n".join(f"worse than on record: {line}" for line in worse))
    return 1 if worse else 0


def current() -> dict[str, dict[str, float]]:
    """What a block of DeiT-B launches and keeps, counted, and what it moves per token and channel, by the formulas of its parts."""
    found = block_counts.counts()
    shape = DEIT["B"]
    for form, counts in found.items():
        precision, kind = form.split()
        execution = "fastdeit" if kind == "fused" else "eager"
        block = [p for p in parts(shape, 1, execution, precision, training=True) if p.count > 1]
        for direction in ("forward", "backward"):
            moved = sum(getattr(part, direction).bytes for part in block)
            counts[f"bytes_{direction}"] = round(moved / (shape.tokens * shape.channels), 1)
    return found


def rounded(ratios: Mapping[str, float]) -> dict[str, float]:
    return {name: round(ratio, 2) for name, ratio in ratios.items()}


def recorded() -> dict[str, dict[str, float]]:
    """The counts that record.json holds."""
    return json.loads(RECORD.read_text(encoding="utf-8"))["block of DeiT-B"]


def worsened(found: Mapping[str, Mapping[str, float]], record: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Counts of the fused block that are larger than on record, or are not on record, as sentences."""
    lines = []
    for form, counts in found.items():
        if "fused" not in form:
            continue
        for name, value in counts.items():
            before = record.get(form, {}).get(name)
            if before is None:
                lines.append(f"{form}: {name} is {value}, and nothing is on record")
            elif value > before:
                lines.append(f"{form}: {name} is {value}, {before} on record")
    return lines


def report(
    found: Mapping[str, Mapping[str, float]],
    dropping: Mapping[str, Mapping[str, float]],
    host: Mapping[str, float] | None,
) -> str:
    """Markdown.

    Args:
        found: of `current`.
        dropping: of `counts_with_stochastic_depth`.
        host: of `host_ratios`.
    """
    rows, others = (
        [{"block of DeiT-B": form, **counts} for form, counts in each.items()] for each in (found, dropping)
    )
    parts = [
        "Launches of one block in a training step, under autocast those of its casts included; bytes that it keeps for backward, "
        "and at one image moves, weights among them, per token and channel:",
        table(rows),
        f"The same block where stochastic depth drops {block_counts.RATE:.0%} of the samples: millions of FLOPs per token, images "
        "of 64 pixels, by PyTorch's FlopCounterMode; in backward it counts four products of timm's attention, five of a fused one:",
        table(others),
        "Kernels, over all their configurations:",
        table(kernels()),
    ]
    if host is not None:
        parts += [
            f"Host time per call over that of {launch_cost.YARDSTICK.removeprefix('torch: ')}, on the fake CUDA runtime:",
            table([{"call": name, "multiple": ratio} for name, ratio in host.items()]),
        ]
    return "\n\n".join(parts)


def kernels() -> list[dict[str, Any]]:
    """A row a kernel and architecture: how many configurations, and the worst of each resource."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in json.loads(RESOURCES_FILE.read_text(encoding="utf-8"))["rows"]:
        groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    return [
        {
            "kernel": kernel,
            "arch": arch,
            "configurations": len(rows),
            "most registers": max(row["registers"] for row in rows),
            "spilled bytes": max(row["spilled_bytes"] for row in rows),
            "most shared KiB": max(row["shared_bytes"] for row in rows) / 1024,
            "fewest blocks per SM": min(row["blocks_per_sm"] for row in rows),
        }
        for (kernel, arch), rows in groups.items()
    ]


def host_ratios() -> dict[str, float] | None:
    """The host's time of each call of `fastdeit launch-cost` over that of F.layer_norm, and of DeiT-Ti over timm's.

    None where the fake CUDA runtime is not available.
    """
    if fake_cuda.why_unavailable():
        return None
    found = launch_cost.measured([launch_cost.MODELS[0]])
    calls = {name: cost / found["calls"][launch_cost.YARDSTICK] for name, cost in found["calls"].items()}
    rows = {f"DeiT-Ti over timm's: {r['passed']}, {r['precision']}, {r['mode']}": r["ratio"] for r in found["models"]}
    return calls | rows
