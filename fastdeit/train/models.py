"""Student and teacher, made by timm, and what each head of a model says."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import fastdeit
from fastdeit.train.checkpoints import load_weights
from fastdeit.train.config import Config
from fastdeit.train.sampling import derive_seed


def create_student(config: Config, num_classes: int, device: torch.device) -> nn.Module:
    """The model to train, initialised from the seed, accelerated, on device.

    Raises:
        ValueError: timm has no such model or it takes no such argument, or distillation is on and it has no distillation head.
    """
    torch.manual_seed(derive_seed("model", config.seed))
    kwargs = dict(config.model_kwargs, drop_path_rate=config.drop_path)
    if _takes_img_size(config.model):
        kwargs["img_size"] = config.img_size
    model = _create("model", config.model, num_classes, config.in_chans, kwargs)
    if config.distillation_type != "none":
        if not has_distillation_head(model):
            raise ValueError(
                f"model: {config.model} has no distillation token; distillation_type {config.distillation_type} needs one "
                "(such as deit_base_distilled_patch16_224), or distillation_type none"
            )
        model.set_distilled_training(True)
    if config.accelerate:
        fastdeit.accelerate(model)
    return model.to(device)


def create_teacher(config: Config, num_classes: int, device: torch.device) -> nn.Module:
    """The teacher in eval mode, without gradient: with config's teacher_checkpoint (safetensors), else timm's pretrained weights.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: as `create_student`, or the weights are truncated or another model's.
    """
    kwargs = dict(config.teacher_kwargs, pretrained=config.teacher_checkpoint is None)
    model = _create("teacher_model", config.teacher_model, num_classes, config.in_chans, kwargs)
    if config.teacher_checkpoint is not None:
        load_weights(model, Path(config.teacher_checkpoint))
    return model.to(device).eval().requires_grad_(False)


def has_distillation_head(model: nn.Module) -> bool:
    return hasattr(model, "set_distilled_training") and hasattr(model, "head_dist")


def head_logits(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits (B, classes) by readout, as in Table 3 of the DeiT paper: of a distilled model those of the class head, of the
    distillation head, and of both together; of any other model its own, under "top1".

    Two ways of joining the heads are in use: "softmax" is the sum of their softmaxes, as the paper's section 4 has it; "both", the
    last, is the mean of their logits, as the released code has it, and what the model itself predicts.
    """
    if not has_distillation_head(model):
        return {"top1": model(images)}
    tokens = model.forward_features(images)
    class_logits = model.head(model.head_drop(tokens[:, 0]))
    distillation_logits = model.head_dist(model.head_drop(tokens[:, 1]))
    return {
        "class": class_logits,
        "distillation": distillation_logits,
        "softmax": torch.logaddexp(class_logits.float().log_softmax(1), distillation_logits.float().log_softmax(1)),
        "both": (class_logits + distillation_logits) / 2,
    }


def _create(field: str, name: str, num_classes: int, in_chans: int, kwargs: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        raise ValueError(f"{field}: timm has no model {name!r}" + (f"; close: {', '.join(close)}" if close else ""))
    try:
        return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **kwargs)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{field}: timm.create_model({name!r}, **{kwargs}) failed: {error!r}") from error


def _takes_img_size(name: str) -> bool:
    """Transformers are built for a size; convnets take any and have no such argument."""
    pretrained_cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return bool(pretrained_cfg and pretrained_cfg.fixed_input_size)
