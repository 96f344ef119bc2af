"""Run the teacher once, then train from its cached labels: the losses are those of a run with the teacher.

The same as the commands `fastdeit train`, `cache-teacher` and `train --teacher-cache`, for a recipe shrunk to
seconds: two epochs train nothing, so the accuracies that it prints mean nothing.
"""

import json
import tempfile
from pathlib import Path

from fastdeit.commands.cli import main

DATA = "--config digits --img-size 16 --epochs 2 --warmup-epochs 1 --device cpu --threads 1 --workers 0 --model-ema-decay 0"
TEACHER = "{depth: 8, stem_width: 8}"
STUDENT = ("--model-kwargs", "{patch_size: 8, embed_dim: 32, num_heads: 1, depth: 1}", "--teacher-model", "regnetx_002")


def run(command: str, *arguments: str) -> None:
    assert main([command, *DATA.split(), *arguments]) == 0


with tempfile.TemporaryDirectory() as folder:
    teacher, labels, student = (str(Path(folder) / name) for name in ("teacher", "teacher.labels", "student"))
    alone = ("--distillation-type", "none", "--drop-path", "0")
    run("train", *alone, "--model", "regnetx_002", "--model-kwargs", TEACHER, "--output", teacher)
    recipe = (*STUDENT, "--teacher-kwargs", TEACHER, "--teacher-epochs", "0")
    recipe = (*recipe, "--teacher-checkpoint", f"{teacher}/last.safetensors")
    run("cache-teacher", *recipe, "--labels", labels)
    print(f"{Path(labels).stat().st_size:,} bytes of labels")
    run("train", *recipe, "--teacher-cache", labels, "--output", student)
    top1 = json.loads((Path(student) / "results.json").read_text())["top1"]["last epoch"]
print({readout: round(value, 1) for readout, value in top1.items()})
