"""`fastdeit launch-cost`: host time of launches, per call and per model, with timm's for comparison, on the fake CUDA runtime."""

import argparse
import json
import math
import platform
from typing import Any

import torch
import triton

from fastdeit.benchmarks import launch_cost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="*",
        default=launch_cost.MODELS,
        metavar="NAME",
        help="timm models (default: distilled DeiT-Ti, S and B)",
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images per call (default: 1)")
    parser.add_argument(
        "--turns",
        type=int,
        default=15,
        metavar="N",
        help="measurements of each implementation, taken in turns (default: 15)",
    )
    parser.add_argument(
        "--driver-us",
        type=float,
        default=0.0,
        metavar="US",
        help="assumed driver time per launch in microseconds, added to fastdeit and timm (default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Prints the tables.

    Raises:
        ValueError: an option is out of range.
        OSError: the fake CUDA runtime is not available here.
        RuntimeError: the measuring process failed.
    """
    for name in ("batch_size", "turns"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected a positive whole number, got {getattr(args, name)}")
    if not (math.isfinite(args.driver_us) and args.driver_us >= 0):
        raise ValueError(f"--driver-us: expected microseconds, zero or more, got {args.driver_us}")
    found = launch_cost.measured(list(args.model), args.batch_size, args.turns, args.driver_us)
    print(json.dumps(found, indent=2) if args.json else f"{call_table(found['calls'])}\n\n{model_table(found, args)}")
    return 0


def call_table(costs: dict[str, float]) -> str:
    """The costs as text, each beside its budget and as a multiple of a call of PyTorch's."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}"
    lines = [
        f"Host microseconds per call, least of {launch_cost.REPEATS} runs of {launch_cost.CALLS} calls; {versions}",
        "",
    ]
    for name, cost in costs.items():
        budget = f"  budget {launch_cost.BUDGETS[name]:.0f}" if name in launch_cost.BUDGETS else ""
        lines.append(f"{name:50}{cost:7.1f}  {cost / costs[launch_cost.YARDSTICK]:5.1f} x F.layer_norm{budget}")
    return "\n".join(lines)


def model_table(found: dict[str, Any], args: argparse.Namespace) -> str:
    """A line for each model, precision, pass and mode."""
    driver = f", {args.driver_us:g} us a launch added to both" if args.driver_us else ""
    lines = [
        f"Processor time of the host per call in us, median of {args.turns} turns at batch size {args.batch_size}{driver}; "
        "timm's is called eagerly",
        "",
        f"{'model':36}{'precision':10}{'pass':9}{'mode':10}{'timm':>9}{'fastdeit':>10}{'ratio':>8}  launches, timm's and ours",
    ]
    for row in found["models"]:
        lines.append(
            f"{row['model']:36}{row['precision']:10}{row['passed']:9}{row['mode']:10}{row['timm_us']:9.0f}"
            f"{row['fastdeit_us']:10.0f}{row['ratio']:8.3f}  {row['timm_launches']:5}{row['fastdeit_launches']:6}"
        )
    return "\n".join(lines)
