"""`fastdeit explain MODEL`: what of a model runs fused, and why the rest does not."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastdeit import web_page
from fastdeit.commands import named_model

if TYPE_CHECKING:
    from fastdeit.explanation import Report

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=named_model.HELP)
    parser.add_argument("--device", help="device of the model (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--on-gpu", action="store_true", help="explain what would run on a GPU of capability 8.0 or newer; needs no GPU"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the parameters (default: %(default)s)"
    )
    parser.add_argument("--amp", choices=("float16", "bfloat16"), help="explain what runs under autocast to this dtype")
    parser.add_argument("--train", action="store_true", help="explain training mode rather than evaluation")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="modules that keep their library's implementation",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="add launches and memory traffic of a forward pass of N images"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the table as a self-contained HTML page")


def run(args: argparse.Namespace) -> int:
    from fastdeit.swap import accelerate, explain

    if not named_model.is_path(args.model):
        check_model_name(args.model)
    on = device(args.device)
    model = named_model.make(args.model).train(args.train).to(on, DTYPES[args.dtype])
    accelerate(model, exclude=args.exclude)
    with torch.autocast(on.type, DTYPES[args.amp]) if args.amp else contextlib.nullcontext():
        report = explain(model, batch_size=args.batch_size, on_gpu=args.on_gpu)
    if args.html is not None:
        args.html.write_text(html(args.model, report), encoding="utf-8")
    print(json.dumps(report.as_dict(), indent=2) if args.json else report)
    return 0


def html(model: str, report: "Report") -> str:
    """The report as a page; rows that run fused are shaded."""
    header, *rows = report.cells()
    parts = [web_page.paragraph(line) for line in report.summary().splitlines()]
    fused = [row[2] == "fused" for row in rows]
    return web_page.page(f"fastdeit explain {model}", [*parts, web_page.table(header, rows, text=True, good=fused)])


def check_model_name(name: str) -> None:
    """Raises ValueError, with the names that are close to it, unless timm has the model."""
    import timm

    if not timm.is_model(name):
        raise ValueError(f"MODEL: timm has no model named {name!r}{_suggestion(timm, name)}")


def device(name: str | None) -> torch.device:
    """The device of that name, by default the GPU if there is one. Raises ValueError if there is none such."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device: expected a device such as cpu, cuda or cuda:1, got {name!r}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {name} was given, but PyTorch sees no CUDA device")
    return found


def _suggestion(timm, name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f"; close to it: {', '.join(close)}" if close else ""
