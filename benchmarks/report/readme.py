"""`fastdeit bench readme`: writes the README's section of results, and the ceilings in docs/performance.md."""

import argparse
import re
import textwrap
from pathlib import Path
from typing import Any

from fastdeit.benchmarks import results_folder
from fastdeit.benchmarks.report import static_report
from fastdeit.benchmarks.report.pictures import TBPS, TFLOPS
from fastdeit.benchmarks.report.roofline_table import frozen_rooflines, rooflines, table

RESULTS = Path(__file__).parents[1] / "results"
WIDTH = 124  # of prose
COMMAND = "fastdeit bench readme"
BEGIN, END = f"<!-- performance: written by `{COMMAND}` -->", "<!-- end of performance -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE", help="default: README.md")
    parser.add_argument(
        "--performance",
        type=Path,
        default=Path("docs/performance.md"),
        metavar="FILE",
        help="default: docs/performance.md",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a section is not what it would be")


def run(args: argparse.Namespace) -> int:
    """Raises ValueError if one of the files has no such section."""
    stale = False
    for file, body in ((args.readme, section(RESULTS)), (args.performance, ceilings())):
        text = file.read_text(encoding="utf-8")
        fresh = replaced(text, body)
        stale |= fresh != text
        if not args.check:
            file.write_text(fresh, encoding="utf-8")
    return int(stale and args.check)


def replaced(text: str, body: str) -> str:
    """text with what stands between the two comments replaced by body."""
    found = re.search(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", text, re.DOTALL)
    if found is None:
        raise ValueError(f"readme: expected a section between {BEGIN!r} and {END!r}")
    return f"{text[: found.start()]}{BEGIN}\n\n{body}\n\n{END}{text[found.end() :]}"


def section(results: Path) -> str:
    """The README's section: each folder of results, or that there is none, and what is counted without a GPU."""
    folders = sorted(path for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    return "\n\n".join([*([measured(folder) for folder in folders] or [UNMEASURED]), counted()])


UNMEASURED = textwrap.fill(
    "**No kernel has been run or timed on a GPU yet.** `fastdeit bench quick` measures on yours, side by side with PyTorch eager, "
    "torch.compile and every SDPA backend.",
    WIDTH,
)


def measured(folder: Path) -> str:
    """Per suite, work and direction the range and the geometric mean of the speed-up over each case's best other candidate."""
    identity, benchmarks, missing = results_folder.read(folder)
    groups: dict[str, list[float]] = {}
    for benchmark in benchmarks:
        ours, *others = benchmark["extra_info"]["rows"]
        times = [row["median_us"] for row in others if row["median_us"]]
        if ours["median_us"] and times:
            shape = benchmark["extra_info"]["shape"]
            name = " ".join(
                filter(None, (results_folder.suite_of(benchmark), shape.get("work"), shape.get("direction")))
            )
            groups.setdefault(name, []).append(min(times) / ours["median_us"])
    rows: list[dict[str, Any]] = [
        {
            "work": name,
            "cases": len(ratios),
            "slowest": f"{min(ratios):.2f}x",
            "geometric mean": f"{_geometric_mean(ratios):.2f}x",
            "fastest": f"{max(ratios):.2f}x",
        }
        for name, ratios in groups.items()
    ]
    facts = ", ".join(f"{name} {value}" for name, value in identity.items() if value)
    left = f" {len(missing)} cases were not measured for lack of time." if missing else ""
    lines = [
        f"Measured in one run on {identity.get('gpu') or 'a CPU, at toy sizes that mean nothing'} ({facts}): speed-up over the "
        f"fastest other candidate of each case.{left} Raw results: `benchmarks/results/{folder.name}`."
    ]
    return "\n\n".join([*lines, table(rows)] if rows else [*lines, "No case has both fastdeit and another candidate."])


def counted() -> str:
    """What a block launches, saves and moves, from the record."""
    counts = [
        {"a block of DeiT-B, training": form, **{k.replace("_", " "): v for k, v in c.items()}}
        for form, c in static_report.recorded().items()
    ]
    heading = (
        "Counted without a GPU (`fastdeit bench evidence`): launches of a block, casts included; bytes that it saves for backward "
        "and, by arithmetic, moves, per token and channel. `amp` is autocast with fp32 weights, `bf16` a bf16 model; `eager` is "
        "timm's implementation:"
    )
    return "\n\n".join([textwrap.fill(heading, WIDTH), table(counts)])


def ceilings() -> str:
    """What models could reach, by roofline arithmetic."""
    rows = [row for row in rooflines(256, TFLOPS * 1e12, TBPS * 1e12, ("amp",)) if row["pixels"] == 224]
    heading = (
        f"Estimated ceilings, by roofline arithmetic for a GPU of {TFLOPS:.0f} TFLOP/s and {TBPS} TB/s (autocast, batches of 256): "
        "images per second of timm, of an ideal torch.compile with the same GEMMs, of fastdeit as it ships, and with every fusion."
    )
    frozen = (
        "The same for models of `optimize_for_inference`, beside an ideal torch.compile in bf16. 8-bit products are assumed to run "
        "at 1.05 times the rate of bf16 ones in DeiT-Ti, 1.25 in S and 1.45 in B and L, since their sums are short:"
    )
    shown = [{k: v for k, v in row.items() if k not in ("pixels", "precision")} for row in rows]
    tables = (heading, shown), (frozen, frozen_rooflines(256, TFLOPS * 1e12, TBPS * 1e12))
    parts = [(textwrap.fill(text, WIDTH, break_on_hyphens=False), table(found)) for text, found in tables]
    return "\n\n".join(text for part in parts for text in part)


def _geometric_mean(values: list[float]) -> float:
    product = 1.0
    for value in values:
        product *= value
    return product ** (1 / len(values))
