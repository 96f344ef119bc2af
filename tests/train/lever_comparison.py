"""Top-1 on the digits with and without the levers of docs/less-time.md that change training, over several seeds. Run by hand.

    python tests/train/lever_comparison.py --seeds 5 --output runs/levers

A run whose folder has results is not made again. All recipes of a seed have one teacher, and each of the --jobs processes computes
in one thread. The table is Markdown: mean and standard deviation over the seeds of the last epoch's top-1, both heads together, and
the student's GPU-hours relative to the full recipe, estimated as by --dry-run.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import statistics
import sys
from pathlib import Path

import torch

from fastdeit.train import run
from fastdeit.train.config import load_config
from fastdeit.train.estimate import gpu_hours
from fastdeit.train.models import create_student
from fastdeit.train.report import RESULTS

RATE = 0.2  # at which skipping is compared with the mask; the recipe's own 0.05 drops next to nothing


def recipes(epochs: int) -> dict[str, dict[str, object]]:
    """By name, what differs from the shipped `digits`."""
    late, early = 7 * epochs // 10, epochs // 4  # the first epoch at full size
    sizes = {
        f"16, 24, 32 from epoch {late}": [[0, 16], [2 * epochs // 5, 24], [late, 32]],
        f"24, 32 from epoch {late}": [[0, 24], [late, 32]],
        f"24, 32 from epoch {early}": [[0, 24], [early, 32]],
    }
    return {
        "full recipe": {},
        **{f"img_size_schedule {name}": dict(img_size_schedule=schedule) for name, schedule in sizes.items()},
        f"drop_path {RATE}, mask": dict(drop_path=RATE),
        f"drop_path {RATE}, skip": dict(drop_path=RATE, drop_path_mode="skip"),
    }


def train(recipe: dict[str, object], seed: int, epochs: int, folder: Path, teacher: Path | None) -> None:
    """Trains into folder, unless it has results.

    Args:
        teacher: its weights; None to train it first.
    """
    if (folder / RESULTS).exists():
        return
    config = load_config("digits", {"epochs": epochs, "eval_every": epochs, "threads": 1, "seed": seed, **recipe})
    if teacher is not None:
        config = config.replace(teacher_checkpoint=str(teacher), teacher_epochs=0)
    run.train(config, folder, resume=True)


def top1(folder: Path) -> float:
    return json.loads((folder / RESULTS).read_text())["top1"]["last epoch"]["both"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40, help="40, the recipe's, by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes; 1 by default")
    parser.add_argument("--output", type=Path, default=Path("runs/levers"))
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    (full, nothing), *others = recipes(given.epochs).items()

    def folder(name: str, seed: int) -> Path:
        return given.output / f"{name.replace(' ', '-').replace(',', '')}-{seed}"

    with concurrent.futures.ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        started = [
            pool.submit(train, nothing, seed, given.epochs, folder(full, seed), None) for seed in range(given.seeds)
        ]
        others_started = []
        for seed, run_of_full in enumerate(started):
            run_of_full.result()
            teacher = folder(full, seed) / "teacher" / "last.safetensors"
            others_started += [
                pool.submit(train, recipe, seed, given.epochs, folder(name, seed), teacher) for name, recipe in others
            ]
        for each in others_started:
            each.result()
    rows, hours_of_full = [], None
    for name, recipe in recipes(given.epochs).items():
        config = load_config("digits", {"epochs": given.epochs, **recipe})
        hours = gpu_hours(config, create_student(config, 10, torch.device("cpu")), 1)
        hours_of_full = hours_of_full or hours
        found = [top1(folder(name, seed)) for seed in range(given.seeds)]
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        values = ", ".join(f"{value:.2f}" for value in found)
        rows.append(f"| {name} | {statistics.mean(found):.2f}{spread} | {values} | {hours / hours_of_full:.2f} |")
    print(f"digits, {given.epochs} epochs, {given.seeds} seeds\n")
    print("| | top-1 (%) | by seed | GPU-hours, estimated |\n|---|---:|---|---:|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
