"""`fastdeit bench pictures`: where a DeiT step's time goes by roofline arithmetic, for docs/performance.md."""

import argparse
from pathlib import Path

from fastdeit.benchmarks.report.roofline_table import GROUPS, by_group
from fastdeit.cost.models import EXECUTIONS

# What the pictures and tables of the documentation assume of a GPU: bf16 products at DeiT's sizes, and a large copy.
TFLOPS, TBPS = 600.0, 4.3
MODELS = ("Ti", "S", "B")
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:gray")
_LABELS = {
    "eager": "timm,\neager",
    "compile": "ideal\ntorch.compile",
    "fastdeit": "fastdeit",
    "epilogues": "everything\nfused",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="DIR", help="default: docs")


def run(args: argparse.Namespace) -> int:
    """Writes performance.png.

    Raises:
        ImportError: the extra `bench` is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need the extra 'bench': pip install 'fastdeit[bench]' ({error})") from error
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(MODELS)), MODELS, strict=True):
        rows = by_group(model, 256, "amp", TFLOPS * 1e12, TBPS * 1e12)
        below = dict.fromkeys(EXECUTIONS, 0.0)
        for row, color in zip(rows[:-1], _COLORS, strict=True):
            heights = [row[e] for e in EXECUTIONS]
            axis.bar(
                [_LABELS[e] for e in EXECUTIONS], heights, bottom=list(below.values()), color=color, label=row["part"]
            )
            below = {e: below[e] + row[e] for e in EXECUTIONS}
        axis.set_title(f"DeiT-{model}: training step, 256 images")
        axis.set_ylabel("ms")
        axis.grid(axis="y", alpha=0.3)
        axis.tick_params(axis="x", labelsize=7)
        for x, height in enumerate(below.values()):
            axis.text(x, height, f"{height:.1f}", ha="center", va="bottom", fontsize=8)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(GROUPS), fontsize=8)
    figure.suptitle(
        f"Roofline at {TFLOPS:.0f} TFLOP/s and {TBPS} TB/s, autocast: arithmetic, not measurements", fontsize=10
    )
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "performance.png", dpi=120)
    print(args.out / "performance.png")
    return 0
