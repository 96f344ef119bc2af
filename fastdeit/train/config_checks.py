"""Checks of a configuration's values."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdeit.train.config import Config

from fastdeit.train.schedule_checks import check_schedules

DISTILLATION_TYPES = ("none", "soft", "hard")
DECODERS = ("nvimgcodec", "simplejpeg", "torchvision", "pillow")  # `auto` takes the first that is installed
DEVICE_DECODERS = ("nvimgcodec", "torchvision")  # with `decode_on: device`, in the order of `auto`
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
LONGEST_NAME = 200  # bytes; file systems allow 255, and -2, -3... follow
TAKEN_KWARGS = {"num_classes", "img_size", "in_chans", "drop_path_rate", "pretrained"}
LARGEST_KWARG = 1e5  # of timm.create_model: widths, depths, sizes
LARGEST_RESIZED = 2**14  # pixels of the shorter side, before the crop of evaluation
LARGEST = 1e18  # of any number; products of two are finite in float32
MOST = {  # far beyond any use, and short of what hangs or brings down the machine
    "workers": 1024,
    "prefetch": 1024,
    "threads": 4096,
    "repeated_aug": 1024,
    "recount": 1024,
    "img_size": 4096,
    "epochs": 10**6,
    "eval_every": 10**6,
    "batch_size": 2**24,
    "num_classes": 10**7,
    "grad_accum_steps": 2**24,
    "mixup": 1e6,
    "cutmix": 1e6,
    "color_jitter": 1e6,
    "crop_pct": 100,
    "teacher_epochs": 10**6,
    "warmup_epochs": 10**6,
    "seed": 2**63 - 1,
}


def check_config(config: "Config") -> None:
    """Raises ValueError for a field out of range, and for fields that contradict each other."""
    c = config
    _check_texts(c)
    at_least_1 = [
        "epochs",
        "batch_size",
        "img_size",
        "threads",
        "repeated_aug",
        "recount",
        "num_classes",
        "prefetch",
        "grad_accum_steps",
        "eval_every",
        "keep_best",
    ]
    not_negative = [
        "seed",
        "workers",
        "mixup",
        "cutmix",
        "teacher_epochs",
        "lr_base_size",
        "weight_decay",
        "warmup_epochs",
        "warmup_lr",
        "min_lr",
        "color_jitter",
        "max_bad_images",
        "mixup_off_epoch",
        "checkpoint_minutes",
        "checkpoint_steps",
    ]
    positive = [
        "lr",
        "teacher_lr",
        "opt_eps",
        "distillation_tau",
        "clip_grad",
        "crop_pct",
        "layer_decay",
        "max_image_megapixels",
    ]
    shares = [
        "hflip",
        "reprob",
        "mixup_prob",
        "mixup_switch_prob",
        "smoothing",
        "drop_path",
        "distillation_alpha",
        "model_ema_decay",
        "vflip",
        "color_jitter_prob",
        "grayscale_prob",
        "gaussian_blur_prob",
        "drop",
        "bce_target_thresh",
    ]
    for name, most in MOST.items():
        value = getattr(c, name)
        if value is not None and value > most:
            raise ValueError(f"{name}: expected at most {most}, got {value}")
    for names, holds, allowed in (
        (at_least_1, lambda v: v >= 1, "at least 1"),
        (not_negative, lambda v: v >= 0, "at least 0"),
        (positive, lambda v: v > 0, "more than 0"),
        (shares, lambda v: 0 <= v <= 1, "from 0 to 1"),
    ):
        for name in names:
            value = getattr(c, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise ValueError(f"{name}: expected a value {allowed}, got {value}")
            if value is not None and value > LARGEST:
                raise ValueError(f"{name}: expected a value {allowed} and at most {LARGEST:g}, got {value}")
    for name, allowed in (
        ("distillation_type", DISTILLATION_TYPES),
        ("precision", PRECISIONS),
        ("remode", ("const", "rand", "pixel")),
        ("clip_mode", ("norm", "value", "agc")),
        ("memory", ("usual", "lean")),
        ("eval_ema", ("last", "each")),
        ("drop_path_mode", ("mask", "skip")),
        ("interpolation", ("nearest", "bilinear", "bicubic", "random")),
        ("crop_mode", ("center", "squash", "border")),
        ("mixup_mode", ("batch", "pair", "elem")),
        ("in_chans", (1, 3)),
        ("decoder", ("auto", *DECODERS)),
        ("resize", ("pillow", "torch")),
        ("augment_on", ("auto", "cpu", "device")),
        ("decode_on", ("cpu", "device")),
    ):
        if getattr(c, name) not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {getattr(c, name)!r}")
    for name, length in (
        ("mean", c.in_chans),
        ("std", c.in_chans),
        ("scale", 2),
        ("ratio", 2),
        ("opt_betas", 2),
        ("cutmix_minmax", 2),
    ):
        if getattr(c, name) is not None and len(getattr(c, name)) != length:
            raise ValueError(f"{name}: expected {length} value(s), got {getattr(c, name)}")

    for name in ("scale", "ratio"):
        low, high = getattr(c, name)
        most = {"scale": 1, "ratio": 1000}[name]
        if not 0 < low <= high <= most:
            raise ValueError(f"{name}: expected [low, high] with 0 < low <= high <= {most}, got {[low, high]}")
    if c.img_size / c.crop_pct > LARGEST_RESIZED:
        least = f"{c.img_size / LARGEST_RESIZED:.3g}, which resizes images to {LARGEST_RESIZED} pixels"
        raise ValueError(f"crop_pct: expected at least {least}, got {c.crop_pct}")
    if c.cutmix_minmax is not None and not 0 <= c.cutmix_minmax[0] <= c.cutmix_minmax[1] <= 1:
        raise ValueError(f"cutmix_minmax: expected [low, high] with 0 <= low <= high <= 1, got {c.cutmix_minmax}")
    if not all(abs(value) <= 1e3 for value in c.mean):
        raise ValueError(f"mean: expected values from -1000 to 1000, where 0 is black and 1 is white, got {c.mean}")
    if not all(1e-6 <= value <= 1e3 for value in c.std):
        raise ValueError(f"std: expected values from 1e-6 to 1000, got {c.std}")
    if not all(0 <= beta < 1 for beta in c.opt_betas):
        raise ValueError(f"opt_betas: expected values from 0 to less than 1, got {c.opt_betas}")

    check_schedules(c)
    _check_contradictions(c)
    for name in ("model_kwargs", "teacher_kwargs"):
        kwargs = getattr(c, name)
        clash = TAKEN_KWARGS & set(kwargs) - ({"img_size", "drop_path_rate"} if name == "teacher_kwargs" else set())
        if clash:
            raise ValueError(f"{name}: {', '.join(sorted(clash))} is set by a field or by the data")
        for key, value in kwargs.items():
            if not isinstance(key, str):
                raise ValueError(f"{name}: expected names of arguments, got {key!r}")
            numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int | float)]
            if not all(abs(number) <= LARGEST_KWARG for number in numbers):  # NaN included
                raise ValueError(f"{name}: {key}: expected numbers of at most {LARGEST_KWARG:g}, got {value}")


def _check_contradictions(c: "Config") -> None:
    def refuse(field: str, holds: bool, reason: str) -> None:
        if holds:
            raise ValueError(f"{field}: {reason}")

    distils = c.distillation_type != "none"
    refuse(
        "batch_size",
        c.mixes and c.batch_size % 2 == 1,
        f"mixup pairs the images of a batch, so expected an even number, got {c.batch_size}",
    )
    refuse(
        "warmup_epochs",
        c.epochs <= c.warmup_epochs,
        f"expected less than epochs ({c.epochs}), such as 0 for none, got {c.warmup_epochs}",
    )
    refuse(
        "resize",
        c.resize == "torch" and c.simple_random_crop,
        "torch is for random crops, pillow for simple_random_crop",
    )
    refuse(
        "resize",
        c.resize == "torch" and c.interpolation == "nearest",
        "torch is for bilinear and bicubic interpolation, pillow for nearest",
    )
    on_device = c.decode_on == "device"
    refuse(
        "decode_on",
        on_device and c.resize != "torch",
        f"the device resizes by PyTorch, expected resize torch, got {c.resize!r}",
    )
    refuse(
        "decode_on",
        on_device and c.decoder not in ("auto", *DEVICE_DECODERS),
        f"{c.decoder} decodes on the CPU only, expected decoder auto, {' or '.join(DEVICE_DECODERS)}",
    )
    refuse(
        "decode_on",
        on_device and c.augment_on == "cpu",
        "what the device decodes it augments, expected augment_on auto or device, got 'cpu'",
    )
    refuse("mixup_off_epoch", c.mixup_off_epoch > 0 and not c.mixes, "nothing is mixed, so that nothing can end")
    refuse(
        "interpolation",
        c.simple_random_crop and c.interpolation == "random",
        "simple_random_crop resizes in one way, expected nearest, bilinear or bicubic, got 'random'",
    )
    refuse(
        "three_augment", c.three_augment and c.aa is not None, f"takes the place of aa, which is {c.aa}; set aa to null"
    )
    skips = c.drop_path_mode == "skip"
    refuse(
        "drop_path_mode", skips and not c.accelerate, "skip is for accelerated blocks; expected accelerate true or mask"
    )
    refuse("drop_path", skips and c.drop_path == 1, "with drop_path_mode skip, a rate of 1 leaves nothing to train on")
    refuse("aa_schedule", c.three_augment and c.aa_schedule is not None, "contradicts three_augment, which replaces aa")
    refuse(
        "bce_target_thresh",
        c.bce_target_thresh is not None and not c.bce_loss,
        "binary targets are those of bce_loss, which is off",
    )
    refuse(
        "smoothing",
        c.bce_target_thresh is not None and c.bce_target_thresh < c.smoothing / 2,
        f"with bce_target_thresh {c.bce_target_thresh} every smoothed target may become 1; expected 0, got {c.smoothing}",
    )
    refuse(
        "finetune", c.finetune is not None and c.pretrained, "contradicts pretrained; both say where weights come from"
    )
    refuse("finetune_new_head", c.finetune_new_head and c.finetune is None, "belongs to finetune, which is not given")
    refuse(
        "teacher_model",
        distils and not c.teacher_model,
        f"distillation_type {c.distillation_type} needs a teacher, got none",
    )
    refuse(
        "teacher_checkpoint",
        c.teacher_epochs > 0 and c.teacher_checkpoint is not None,
        "contradicts teacher_epochs, by which the teacher is trained here",
    )
    refuse(
        "teacher_cache",
        c.teacher_cache is not None and c.distillation_type != "hard",
        f"holds the teacher's classes, of which distillation_type {c.distillation_type} makes no use; expected hard",
    )
    refuse(
        "teacher_cache",
        c.teacher_cache is not None and c.teacher_epochs > 0,
        "contradicts teacher_epochs: a teacher trained here has no labels yet",
    )
    refuse(
        "distil_class_token",
        c.distil_class_token and not distils,
        "has no effect without distillation; set distillation_type to soft or hard",
    )


def _check_texts(c: "Config") -> None:
    """Raises ValueError for a text that is empty or cannot be a path, and for a name that is none."""
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            raise ValueError(f"{field.name}: expected a text, got {value!r}; is a variable not set?")
    if Path(c.name).name != c.name or c.name in (".", "..") or len(c.name.encode(errors="replace")) > LONGEST_NAME:
        raise ValueError(
            f"name: expected the name of a folder in runs/, without / and of at most {LONGEST_NAME} bytes, got {c.name!r}"
        )
