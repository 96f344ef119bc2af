"""`fastdeit bench roofline`: what whole models could reach on a GPU, from two numbers of it and no measurement."""

import argparse
import json
import math
from typing import Any

from fastdeit.cost import frozen
from fastdeit.cost.models import DEIT, EXECUTIONS, LAST_BLOCK, PRECISIONS, Part, part_seconds, parts, seconds
from fastdeit.cost.subsets import block_rates, parts_on_subsets

# What a part of a model belongs to, in the order of the pictures and tables.
GROUPS = {
    "matrix products": ("qkv", "proj", "fc1", "fc2"),
    "attention": ("attention",),
    "norms and additions": ("norms and additions",),
    "activation": ("activation",),
    "embedding, heads, loss": ("patch embedding", "heads and loss"),
}
SIZES = (224, 384)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tflops", type=float, required=True, metavar="N", help="bf16 TFLOP/s that its matrix products reach, say 600"
    )
    parser.add_argument(
        "--tbps", type=float, required=True, metavar="N", help="TB/s of memory that a copy reaches, say 4.3"
    )
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="images, default: 256")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: both")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--parts", metavar="MODEL", choices=tuple(DEIT), help="where one model's time goes instead")
    instead.add_argument(
        "--frozen", action="store_true", help="models of optimize_for_inference instead, in bf16, fp8 and int8"
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="N",
        help="with --frozen, rate of 8-bit products over bf16's (default: estimated, "
        f"{', '.join(f'{rate:g} for {width} channels' for width, rate in frozen.PRODUCT_RATES.items())})",
    )
    parser.add_argument(
        "--drop-path",
        type=float,
        metavar="RATE",
        help="add a column `skip` to training steps: stochastic depth of this rate, whose branches run on what it keeps",
    )
    parser.add_argument(
        "--drop-path-uniform", action="store_true", help="the same rate in every block, not rising from 0"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints images a second by model, or one model's parts.

    Raises:
        ValueError: a number that is not positive.
    """
    for name in ("tflops", "tbps", "batch_size", "rate"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    if args.drop_path is not None and not 0 <= args.drop_path < 1:
        raise ValueError(f"--drop-path: expected a rate from 0 to less than 1, got {args.drop_path}")
    if args.drop_path is not None and (args.parts or args.frozen):
        raise ValueError("--drop-path: is for the table of models, not for --parts or --frozen")
    if args.drop_path is None and args.drop_path_uniform:
        raise ValueError("--drop-path-uniform: belongs to --drop-path, which is not given")
    if args.rate is not None and not args.frozen:
        raise ValueError("--rate: is for --frozen, whose products may be in 8 bits")
    if args.frozen and args.precision:
        raise ValueError("--precision: expected nothing with --frozen, which shows all of its precisions")
    precisions = (args.precision,) if args.precision else PRECISIONS
    rates = args.tflops * 1e12, args.tbps * 1e12
    if args.parts:
        found = [
            dict(precision=p, **row) for p in precisions for row in by_group(args.parts, args.batch_size, p, *rates)
        ]
    elif args.frozen:
        found = frozen_rooflines(args.batch_size, *rates, args.rate)
    else:
        found = rooflines(args.batch_size, *rates, precisions, args.drop_path, args.drop_path_uniform)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print(
        f"Roofline at {args.tflops:g} TFLOP/s and {args.tbps:g} TB/s, batches of {args.batch_size}, in "
        f"{'milliseconds of a training step' if args.parts else 'images a second'}: arithmetic, not measurements.\n"
    )
    print(table(found))
    return 0


def rooflines(
    batch: int,
    flops_per_second: float,
    bytes_per_second: float,
    precisions: tuple[str, ...] = PRECISIONS,
    drop_path: float | None = None,
    uniform: bool = False,
) -> list[dict[str, Any]]:
    """Images a second of every execution, by model, image size, training and precision.

    Args:
        batch: images.
        flops_per_second, bytes_per_second: of the GPU.
        precisions: of the rows.
        drop_path: adds `skip`, fastdeit in training with branches on the samples that stochastic depth of this rate keeps.
        uniform: the same rate in every block, not rising from 0.
    """
    rows = []
    for training in (False, True):
        for precision in precisions:
            for name, shape in DEIT.items():
                for size in SIZES:
                    row: dict[str, Any] = dict(
                        model=f"DeiT-{name}",
                        pixels=size,
                        work="training step" if training else "inference",
                        precision=precision,
                    )
                    for execution in EXECUTIONS:
                        found = parts(shape.at(size), batch, execution, precision, training=training)
                        row[execution] = batch / seconds(found, flops_per_second, bytes_per_second)
                    row["fastdeit / compile"] = row["fastdeit"] / row["compile"]
                    if drop_path is not None:
                        row["skip"] = row["fastdeit"]
                    if drop_path and training:
                        rates = block_rates(drop_path, shape.depth, uniform)
                        found = parts_on_subsets(shape.at(size), batch, "fastdeit", precision, rates=rates)
                        row["skip"] = batch / seconds(found, flops_per_second, bytes_per_second)
                    rows.append(row)
    return rows


def frozen_rooflines(
    batch: int, flops_per_second: float, bytes_per_second: float, rate: float | None = None
) -> list[dict[str, Any]]:
    """Images a second of frozen models at 224 pixels, beside an ideal torch.compile of the same model in bf16.

    Args:
        rate: of 8-bit products over bf16's, by default that of `frozen.product_rate`.
    """
    rows = []
    for name, shape in DEIT.items():
        compiled = seconds(parts(shape, batch, "compile", "bf16", training=False), flops_per_second, bytes_per_second)
        row: dict[str, Any] = {"model": f"DeiT-{name}", "compile, bf16": batch / compiled}
        for precision in frozen.PRECISIONS:
            for fused in (False, True):
                found = frozen.frozen_parts(shape, batch, precision, epilogues=fused, rate=rate)
                taken = seconds(found, flops_per_second, bytes_per_second)
                row[f"{precision}, epilogues" if fused else precision] = batch / taken
        row["fp8 / compile"] = row["fp8"] / row["compile, bf16"]
        rows.append(row)
    return rows


def by_group(
    model: str, batch: int, precision: str, flops_per_second: float, bytes_per_second: float, *, training: bool = True
) -> list[dict[str, Any]]:
    """Milliseconds of a step by group of GROUPS and execution; the last row is their sum."""
    rows: list[dict[str, Any]] = [{"part": group} for group in GROUPS]
    for execution in EXECUTIONS:
        found = parts(DEIT[model], batch, execution, precision, training=training)
        for row in rows:
            share = [p for p in found if group_of(p) == row["part"]]
            row[execution] = 1e3 * sum(part_seconds(p, flops_per_second, bytes_per_second) for p in share)
    return [*rows, {"part": "all", **{e: sum(row[e] for row in rows) for e in EXECUTIONS}}]


def group_of(part: Part) -> str:
    name = part.name.removeprefix(LAST_BLOCK)
    return next(group for group, names in GROUPS.items() if name in names)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, numbers with three digits that count."""
    header = list(rows[0])
    cells = [[_text(row[name]) for name in header] for row in rows]
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]
    numbers = [isinstance(rows[0][name], int | float) for name in header]
    lines = [header, ["-" * (w - 1) + ":" if n else "-" * w for w, n in zip(widths, numbers, strict=True)], *cells]
    return "\n".join(
        "| " + " | ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numbers, strict=True)) + " |"
        for line in lines
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
