"""Student and teacher, made by timm, and the predictions of each head of a model."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fastdeit
from fastdeit.train.checkpoints import load_weights
from fastdeit.train.config import Config
from fastdeit.train.finetuning import load_for_finetuning
from fastdeit.train.sampling import derive_seed
from fastdeit.train.transform_errors import described


def create_student(
    config: Config,
    num_classes: int,
    device: torch.device,
    *,
    initial_weights: bool = False,
    classes: Sequence[str] | None = None,
    field: str = "model",
) -> nn.Module:
    """The model to train, initialised from the seed, accelerated, on device.

    Args:
        initial_weights: start from what config's `pretrained` or `finetune` names, as a new run does; a model that is given
            weights afterwards needs neither.
        classes: their names, which are compared with those of the weights that `finetune` names.
        field: of the user's configuration that names the model, for errors.

    Raises:
        FileNotFoundError: there is no checkpoint to start from.
        ValueError: timm has no such model or it takes no such argument, or distillation does not fit its heads.
    """
    torch.manual_seed(derive_seed("model", config.seed))
    kwargs = dict(config.model_kwargs, drop_path_rate=config.drop_path)
    if config.drop:
        kwargs["drop_rate"] = config.drop
    if initial_weights and config.pretrained:
        kwargs["pretrained"] = True
    if _takes_img_size(config.model):
        kwargs["img_size"] = config.img_size
    model = create_timm_model(field, config.model, num_classes, config.in_chans, kwargs)
    if config.drop_path_uniform:
        set_uniform_drop_path(model, config.drop_path)
    if config.distil_class_token and has_distillation_head(model):
        raise ValueError(
            f"distil_class_token: {config.model} has a distillation token, which is there to be distilled into"
        )
    if config.distillation_type != "none" and not config.distil_class_token:
        if not has_distillation_head(model):
            raise ValueError(
                f"model: {config.model} has no distillation token; distillation_type {config.distillation_type} needs one "
                "(such as deit_base_distilled_patch16_224), or distil_class_token, or distillation_type none"
            )
        model.set_distilled_training(True)
    if initial_weights and config.finetune is not None:
        load_for_finetuning(model, Path(config.finetune), classes, config.finetune_new_head)
    if config.accelerate:
        try:
            fastdeit.accelerate(model, memory=config.memory, drop_path=config.drop_path_mode)
        except ValueError as error:  # memory was checked with the configuration
            raise ValueError(f"drop_path_mode: {error}") from error
    return model.to(device)


def set_uniform_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth at the same rate in every block, as DeiT III trains; timm's models raise it from 0.

    Raises:
        ValueError: the model has no blocks with stochastic depth.
    """
    blocks = [m for m in model.modules() if hasattr(m, "drop_path1") and hasattr(m, "drop_path2")]
    if not blocks:
        raise ValueError(f"drop_path_uniform: {type(model).__name__} has no blocks with stochastic depth")
    for block in blocks:
        block.drop_path1 = DropPath(rate) if rate else nn.Identity()
        block.drop_path2 = DropPath(rate) if rate else nn.Identity()


def create_teacher(
    config: Config, num_classes: int, device: torch.device, classes: Sequence[str] | None = None
) -> nn.Module:
    """The teacher in eval mode, without gradient: with config's teacher_checkpoint (safetensors), else timm's pretrained weights.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: as `create_student`, or the weights are truncated, another model's or of other classes.
    """
    kwargs = dict(config.teacher_kwargs, pretrained=config.teacher_checkpoint is None)
    model = create_timm_model("teacher_model", config.teacher_model, num_classes, config.in_chans, kwargs)
    if config.teacher_checkpoint is not None:
        try:
            load_weights(model, Path(config.teacher_checkpoint), classes)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"teacher_checkpoint: {error}") from error
    return model.to(device).eval().requires_grad_(False)


def untrained_teacher(config: Config, num_classes: int, device: torch.device) -> nn.Module:
    """A teacher whose answers are worth nothing and take as long. Raises ValueError as `create_teacher`."""
    model = create_timm_model(
        "teacher_model", config.teacher_model, num_classes, config.in_chans, config.teacher_kwargs
    )
    return model.to(device).eval().requires_grad_(False)


def quickened(teacher: nn.Module, device: torch.device) -> nn.Module:
    """The teacher, in eval mode, as it runs fastest on a GPU: BatchNorm folded, channels last, compiled. On a CPU as it is."""
    if device.type != "cuda":
        return teacher
    return torch.compile(fold_batch_norm(teacher).to(memory_format=torch.channels_last))


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Multiplies timm's BatchNorm layers into the convolutions before them, in place, for a model in eval mode.

    What follows a norm in the same layer, its activation and dropout, stays. Results are the same but for rounding.
    """
    for module in model.modules():
        conv, norm = (module._modules.get(name) for name in ("conv", "bn"))
        if type(conv) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            module.conv = fuse_conv_bn_eval(conv, norm)
            module.bn = nn.Sequential(
                *(part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None)
            )
    return model


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


def create_timm_model(field: str, name: str, num_classes: int, in_chans: int, kwargs: dict[str, Any]) -> nn.Module:
    """timm's model. Raises ValueError that names field or its kwargs where timm has no such model or cannot make it so."""
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        close = close or difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"{field}: timm has no model {name!r}" + (f"; close: {', '.join(close)}" if close else ""))
    try:
        return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **kwargs)
    except Exception as error:  # which one depends on what timm or PyTorch did with an argument
        no_weights = kwargs.get("pretrained") and isinstance(error, OSError | RuntimeError)  # none there, or no network
        if not no_weights:
            arguments = "teacher_kwargs" if field == "teacher_model" else f"{field}_kwargs"
            raise ValueError(
                f"{field} and {arguments}: timm.create_model({name!r}, **{kwargs}) failed: {described(error)}"
            ) from error
        instead = "teacher_checkpoint" if field == "teacher_model" else "finetune"
        raise ValueError(
            f"{field}: timm's weights of {name!r} cannot be had ({error}); {instead} takes a file of weights"
        ) from error


def _takes_img_size(name: str) -> bool:
    """Transformers are built for a size; convnets take any and have no such argument."""
    pretrained_cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return bool(pretrained_cfg and pretrained_cfg.fixed_input_size)
