"""A model's patch embedding, positions and prefix tokens in one op, for timm's `PatchEmbed` and its usual convolution."""

import timm.layers
import torch
from torch import Tensor, nn

from fastdeit import ops
from fastdeit.blocks.checklist import MISSING, why_not_bypassed, why_not_weight, why_not_weights, why_replaced
from fastdeit.blocks.run import autocast_dtype, dropped_out
from fastdeit.blocks.snapshot import register_methods
from fastdeit.blocks.spec import Affine
from fastdeit.ops.patch_embedding_op import why_reference

_PatchEmbed, _Conv2d = timm.layers.PatchEmbed, nn.Conv2d
register_methods(_PatchEmbed, "forward")
register_methods(_Conv2d, "forward")


def why_not_embedding(model: nn.Module) -> str | None:
    """Why timm's code makes the tokens of any images, for a model derived from timm's VisionTransformer."""
    embedding = model._modules["patch_embed"]
    if type(embedding) is not _PatchEmbed:
        return f"patch_embed is a {type(embedding).__name__}"
    proj, norm = embedding._modules["proj"], embedding._modules["norm"]
    if type(proj) is not _Conv2d:
        return f"its projection is a {type(proj).__name__}"
    if type(norm) is not nn.Identity:
        return f"its patches go through a {type(norm).__name__}"
    if model.dynamic_img_size or embedding.dynamic_img_pad or not embedding.flatten or embedding.img_size is None:
        return "the image size is dynamic"
    if proj.stride != proj.kernel_size or proj.padding != (0, 0) or proj.dilation != (1, 1) or proj.groups != 1:
        return "its patches overlap, are padded, dilated or in groups"
    return (
        why_replaced(_PatchEmbed)
        or why_replaced(_Conv2d)
        or why_not_bypassed((embedding, proj, norm))
        or why_not_weights(Affine(proj))
        or _why_not_tokens(model, embedding.num_patches)
    )


def why_not_embedding_call(model: nn.Module, images: Tensor) -> str | None:
    """Why timm's code makes the tokens of these images (B, 3, H, W), in a model to which `why_not_embedding` does not object."""
    embedding = model._modules["patch_embed"]
    proj, size, shape = embedding._modules["proj"], embedding.img_size, images.shape
    if len(shape) != 4 or shape[1] != proj.in_channels or shape[2] != size[0] or shape[3] != size[1]:
        return f"images are {tuple(shape)} where the model has {proj.in_channels} channels and size {size}"
    weight, bias = proj._parameters["weight"], proj._parameters["bias"]
    if weight.dtype is not images.dtype or (bias is not None and bias.dtype is not weight.dtype):
        if autocast_dtype(images) is None:  # PyTorch's convolution wants one dtype, and says so
            return f"images in {images.dtype}, weights in {weight.dtype}"
    return why_reference(images)


def _why_not_tokens(model: nn.Module, patches: int) -> str | None:
    positions, *prefix = added = added_tokens(model)
    for tensor in added:
        if tensor is None:
            continue
        if why_not_weight(tensor) is not None:
            return f"a token or position is a {type(tensor).__name__}"
        if tensor.dim() != 3 or tensor.shape[0] != 1:
            return f"a token or position is {tuple(tensor.shape)}, not one for all images"
    if positions is None:
        return None
    tokens = patches
    if not model.no_embed_class:
        for tensor in prefix:
            tokens += 0 if tensor is None else tensor.shape[1]
    return None if positions.shape[1] == tokens else f"{positions.shape[1]} positions for {tokens} tokens"


def added_tokens(model: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Positions, class token and the prefix tokens after it: registers, or a distilled model's distillation token."""
    more = "dist_token" if "dist_token" in model._parameters else "reg_token"
    return _tensor(model, "pos_embed"), _tensor(model, "cls_token"), _tensor(model, more)


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    parameter = model._parameters.get(name, MISSING)
    return getattr(model, name) if parameter is MISSING or parameter is None else parameter  # such as a buffer


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """The tokens (B, N, C) that timm's `patch_embed` and `_pos_embed` make, where neither rule above objects."""
    parameters = model._modules["patch_embed"]._modules["proj"]._parameters
    added = added_tokens(model)
    tokens = ops.patch_embedding(images, parameters["weight"], parameters["bias"], *added)
    return tokens if added[0] is None else dropped_out(model.pos_drop, tokens)


def blank_image(model: nn.Module) -> Tensor | None:
    """One blank image of the model's size, None if the size is unknown."""
    proj = getattr(model.patch_embed, "proj", None)
    size, weight = getattr(model.patch_embed, "img_size", None), getattr(proj, "weight", None)
    if size is None or type(proj) is not _Conv2d:
        return None
    return torch.empty(1, proj.in_channels, *size, dtype=weight.dtype, device=weight.device)
