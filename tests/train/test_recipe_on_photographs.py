"""DeiT's whole recipe for a thousand steps of a tiny model on JPEG crops of photographs: nothing stops it, and it learns."""

import csv
import json
import os

import numpy as np
import pytest
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

from fastdeit.commands import cli
from fastdeit.train.config import load_config

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "rocket.jpg",
)
TRAINING, VALIDATION = 40, 10  # crops of each
EPOCHS = 26


def photographs():
    """Six that scikit-image's wheel brings along and the two of scikit-learn, as PIL images by name."""
    folder = os.path.dirname(skimage.data.__file__)
    for name in PHOTOGRAPHS:
        yield name.split(".")[0], Image.open(os.path.join(folder, name)).convert("RGB")
    for name, pixels in zip(("temple", "flower"), load_sample_images().images, strict=True):
        yield name, Image.fromarray(pixels)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """A folder with a class for each photograph: crops of 48 to 160 pixels, the training ones above those for validation."""
    root, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name, photograph in photographs():
        border = int(0.7 * photograph.height)
        for number in range(TRAINING + VALIDATION):
            split, top, bottom = ("train", 0, border) if number < TRAINING else ("val", border, photograph.height)
            width, height = generator.integers(48, 160), generator.integers(48, min(160, bottom - top))
            x, y = generator.integers(0, photograph.width - width), generator.integers(top, bottom - height + 1)
            path = root / split / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph.crop((x, y, x + width, y + height)).save(path, quality=90)
    return root


@pytest.mark.long
def test_the_whole_recipe_trains_on_photographs(crops, tmp_path, capsys):
    recipe = load_config("deit_base_distilled")
    assert (recipe.aa, recipe.reprob, recipe.mixup, recipe.cutmix, recipe.smoothing) == (
        "rand-m9-mstd0.5-inc1",
        0.25,
        0.8,
        1.0,
        0.1,
    )
    assert (recipe.repeated_aug, recipe.drop_path, recipe.distillation_type) == (3, 0.1, "hard")
    options = dict(
        data=crops,
        output=tmp_path / "run",
        epochs=EPOCHS,
        warmup_epochs=2,
        workers=1,
        batch_size=8,
        img_size=32,
        threads=1,
        lr_base_size=0,
        lr="2e-3",
        model_kwargs="{patch_size: 8, embed_dim: 48, num_heads: 2, depth: 2}",
        model_ema_decay=0.99,
        checkpoint_minutes=0,
        teacher_model="regnetx_002",
        teacher_kwargs="{depth: 8, stem_width: 8}",
        teacher_epochs=4,
        teacher_lr="2e-3",
    )
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert cli.main(["train", "--config", "deit_base_distilled", *arguments]) == 0
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").open()))
    classes = len(PHOTOGRAPHS) + 2
    steps = len(rows) * (classes * TRAINING // 8)
    assert steps >= 1000
    scores = [[(name, row[name]) for name in row if "loss" in name or "top1" in name] for row in rows]
    of_model = [value for row in scores for name, value in row if not name.startswith("ema_")]
    # The moving average is evaluated after the last epoch alone.
    assert all(np.isfinite(float(value)) for value in [*of_model, *(value for _, value in scores[-1])])
    losses = [float(row["train_loss"]) for row in rows]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    results = json.loads((tmp_path / "run" / "results.json").read_text())["top1"]
    assert results["moving average"]["both"] > 2 * 100 / classes
    assert "unreadable" not in capsys.readouterr().err
