"""Top-1 on the digits with and without the levers of docs/less-time.md that change training, over several seeds. Run by hand.

    python tests/train/lever_comparison.py --seeds 5 --output runs/levers

A run whose folder has results is not made again. The table is Markdown: mean and standard deviation over the seeds of the last
epoch's top-1, both heads together, and the student's GPU-hours relative to the full recipe, estimated as by --dry-run.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from fastdeit.train import run
from fastdeit.train.config import Config, load_config
from fastdeit.train.estimate import gpu_hours
from fastdeit.train.models import create_student
from fastdeit.train.report import RESULTS

RATE = 0.2  # at which skipping is compared with the mask; the recipe's own 0.05 drops next to nothing


def recipes(epochs: int) -> dict[str, dict[str, object]]:
    """By name, what differs from the shipped `digits`."""
    sizes = [[0, 16], [2 * epochs // 5, 24], [7 * epochs // 10, 32]]
    return {
        "full recipe": {},
        "img_size_schedule": dict(img_size_schedule=sizes),
        f"drop_path {RATE}, mask": dict(drop_path=RATE),
        f"drop_path {RATE}, skip": dict(drop_path=RATE, drop_path_mode="skip"),
    }


def top1(config: Config, folder: Path) -> float:
    if not (folder / RESULTS).exists():
        run.train(config, folder, resume=True)
    return json.loads((folder / RESULTS).read_text())["top1"]["last epoch"]["both"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40, help="40, the recipe's, by default")
    parser.add_argument("--output", type=Path, default=Path("runs/levers"))
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    rows, full = [], None
    for name, changes in recipes(given.epochs).items():
        config = load_config("digits", {"epochs": given.epochs, "eval_every": given.epochs, **changes})
        hours = gpu_hours(config, create_student(config, 10, torch.device("cpu")), 1)
        full = full or hours
        slug = name.replace(" ", "-").replace(",", "")
        found = [top1(config.replace(seed=seed), given.output / f"{slug}-{seed}") for seed in range(given.seeds)]
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        values = ", ".join(f"{value:.2f}" for value in found)
        rows.append(f"| {name} | {statistics.mean(found):.2f}{spread} | {values} | {hours / full:.2f} |")
    print(f"digits, {given.epochs} epochs, {given.seeds} seeds\n")
    print("| | top-1 (%) | by seed | GPU-hours, estimated |\n|---|---:|---|---:|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
