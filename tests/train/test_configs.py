"""The configurations that are shipped: the papers' recipes, and that each of them trains."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from fastdeit.train.config import FIELDS, load_config, shipped_configs
from fastdeit.train.datasets import load_data
from fastdeit.train.engine import Trainer
from fastdeit.train.models import create_student

CPU = torch.device("cpu")
TINY = dict(
    img_size=16,
    workers=0,
    threads=1,
    precision="fp32",
    device="cpu",
    pretrained=False,
    finetune=None,
    data_download=False,
    num_classes=None,
    batch_size=48,
)
TINY_MODEL = dict(patch_size=8, embed_dim=32, num_heads=1, depth=2)

ABLATIONS = {  # of Table 8 of the DeiT paper: all that such a configuration changes in deit_base
    "deit_base_sgd": {"opt", "lr", "weight_decay"},
    "deit_base_autoaugment": {"aa"},
    "deit_base_no_aa": {"aa"},
    "deit_base_no_mixup": {"mixup"},
    "deit_base_no_cutmix": {"cutmix"},
    "deit_base_no_mixup_cutmix": {"mixup", "cutmix"},
    "deit_base_no_erasing": {"reprob"},
    "deit_base_no_drop_path": {"drop_path"},
    "deit_base_no_repeated_aug": {"repeated_aug"},
    "deit_base_dropout": {"drop"},
    "deit_base_ema": {"model_ema_decay"},
}


@pytest.mark.parametrize("name", shipped_configs())
def test_a_configuration_takes_two_steps(name, image_folder):
    """Everything of it but the size of images and model."""
    shipped = load_config(name)
    kwargs = {**shipped.model_kwargs, **TINY_MODEL}
    config = shipped.replace(
        data=str(image_folder), in_chans=3, mean=[0.5] * 3, std=[0.5] * 3, model_kwargs=kwargs, **TINY
    )
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)).eval().requires_grad_(False)
    model = create_student(config, 3, CPU)
    trainer = Trainer(
        config, model, None if config.distillation_type == "none" else teacher, load_data(config).train, 3
    )
    before = [p.detach().clone() for p in model.parameters()]
    loss = trainer.train_epoch(0, mock.Mock())
    assert trainer.step == 2 and 0 < loss < 10
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_table_9():
    """The hyper-parameters of the DeiT paper's Table 9, for batches of 1024."""
    c = load_config("deit_base")
    assert (c.epochs, c.batch_size, c.opt, c.scaled_lr, c.sched) == (300, 1024, "adamw", 1e-3, "cosine")
    assert (c.weight_decay, c.warmup_epochs, c.smoothing, c.drop, c.drop_path) == (0.05, 5, 0.1, 0.0, 0.1)
    assert c.color_jitter == 0.4  # of the released code; acts where aa is null
    assert (c.repeated_aug, c.clip_grad, c.aa) == (3, None, "rand-m9-mstd0.5-inc1")
    assert (c.mixup, c.cutmix, c.mixup_prob, c.reprob) == (0.8, 1.0, 1.0, 0.25)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_what_it_is_named_after(name):
    ablation, recipe = load_config(name).as_dict(), load_config("deit_base").as_dict()
    assert {field for field in FIELDS if ablation[field] != recipe[field]} == ABLATIONS[name] | {"name"}


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_distilled_models_differ_in_model_and_teacher_alone(size):
    distilled, plain = load_config(f"deit_{size}_distilled"), load_config(f"deit_{size}")
    different = {field for field in FIELDS if getattr(distilled, field) != getattr(plain, field)}
    assert different == {"name", "model", "distillation_type", "teacher_model"}
    assert (distilled.distillation_type, distilled.distillation_alpha) == ("hard", 0.5)
    assert load_config(f"deit_{size}_distilled_1000") == distilled.replace(
        epochs=1000, name=f"deit_{size}_distilled_1000"
    )


def test_soft_distillation_is_the_papers():
    c = load_config("deit_base_soft")
    assert (c.distillation_type, c.distillation_tau, c.distillation_alpha) == ("soft", 3.0, 0.1)


@pytest.mark.parametrize(
    "name, distillation, model",
    [
        ("deit_base_384", "none", "deit_base_patch16_384"),
        ("deit_base_distilled_384", "hard", "deit_base_distilled_patch16_384"),
    ],
)
def test_fine_tuning_at_384_is_the_released_command(name, distillation, model):
    c = load_config(name)
    assert (c.img_size, c.epochs, c.scaled_lr, c.min_lr, c.weight_decay) == (384, 30, 5e-6, 5e-6, 1e-8)
    assert (c.batch_size, c.distillation_type, c.model, c.drop_path) == (512, distillation, model, 0.0) and c.finetune


@pytest.mark.parametrize(
    "name, size, batch, lr, drop_path",
    [
        ("deit3_small", 224, 2048, 4e-3, 0.05),
        ("deit3_base", 192, 2048, 3e-3, 0.2),
        ("deit3_large", 192, 2048, 3e-3, 0.45),
    ],
)
def test_deit_3_is_the_released_command(name, size, batch, lr, drop_path):
    c = load_config(name)
    assert (c.epochs, c.img_size, c.batch_size, c.opt, c.scaled_lr) == (800, size, batch, "lamb", lr)
    assert (c.drop_path, c.drop_path_uniform, c.bce_loss, c.smoothing) == (drop_path, True, True, 0.0)
    assert (c.three_augment, c.color_jitter, c.aa, c.repeated_aug, c.reprob) == (True, 0.3, None, 3, 0.0)


@pytest.mark.parametrize("name, drop_path", [("deit3_base_224", 0.2), ("deit3_large_224", 0.45)])
def test_deit_3_fine_tunes_at_224(name, drop_path):
    c = load_config(name)
    assert (c.img_size, c.epochs, c.batch_size, c.scaled_lr, c.weight_decay) == (224, 20, 512, 1e-5, 0.1)
    assert (c.opt, c.aa, c.repeated_aug, c.bce_loss, c.drop_path) == (
        "adamw",
        "rand-m9-mstd0.5-inc1",
        1,
        False,
        drop_path,
    )


def test_a_run_is_named_after_its_configuration():
    assert {name for name in shipped_configs() if load_config(name).name != name} == set()


OPTIONS = (Path(__file__).parents[2] / "docs/training-options.md").read_text()


def test_every_field_is_documented():
    documented = set(re.findall(r"`([a-z_0-9]+)`", OPTIONS))
    assert [name for name in FIELDS if name not in documented] == []


def test_every_shipped_configuration_is_documented():
    documented = set(re.findall(r"`([a-z_0-9]+)`", OPTIONS))
    documented |= {f"{name}_1000" for name in documented}
    assert [name for name in shipped_configs() if name not in documented] == []
