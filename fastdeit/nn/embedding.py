"""A model's patch embedding, positions and prefix tokens in one op, for timm's `PatchEmbed` and its usual convolution."""

import timm.layers
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from fastdeit import ops
from fastdeit.nn.eligibility import autocast_dtype, exported, forward_of, why_not_bypassed, why_not_plain_weights
from fastdeit.ops.patch_embedding_op import why_reference

_PatchEmbed, _Conv2d, _Identity, _Parameter = timm.layers.PatchEmbed, nn.Conv2d, nn.Identity, nn.Parameter
_OWN_FORWARDS = forward_of(_PatchEmbed), forward_of(_Conv2d)
_NO_PADDING, _NO_DILATION = (0, 0), (1, 1)


def why_not_embedded(model: nn.Module, images: Tensor) -> str | None:
    """Why timm's code makes the tokens of these images, None if `embed` may.

    For a caller that has asked `why_not_plain_call` of the images, `why_global_hook`, and whether `_pos_embed` is timm's own.

    Args:
        model: derived from timm's VisionTransformer.
        images: (B, 3, H, W).
    """
    embedding = model._modules["patch_embed"]
    if type(embedding) is not _PatchEmbed:
        return f"patch_embed is a {type(embedding).__name__}"
    children = embedding._modules
    proj, norm = children["proj"], children["norm"]
    if type(proj) is not _Conv2d:
        return f"its projection is a {type(proj).__name__}"
    if type(norm) is not _Identity:
        return f"its patches go through a {type(norm).__name__}"
    if (_PatchEmbed.forward, _Conv2d.forward) != _OWN_FORWARDS:
        return "the forward of timm's PatchEmbed or of torch.nn.Conv2d was replaced"
    if model.dynamic_img_size or embedding.dynamic_img_pad or not embedding.flatten:
        return "the image size is dynamic"
    patch = proj.kernel_size
    if proj.stride != patch or proj.padding != _NO_PADDING or proj.dilation != _NO_DILATION or proj.groups != 1:
        return "its patches overlap, are padded, dilated or in groups"
    shape, size = images.shape, embedding.img_size
    if size is None or len(shape) != 4 or shape[1] != proj.in_channels or shape[2] != size[0] or shape[3] != size[1]:
        return f"images are {tuple(shape)} where the model has {proj.in_channels} channels and size {size}"
    return (
        why_not_bypassed((embedding, proj, norm))
        or why_not_plain_weights(proj._parameters)
        or _why_not_dtypes(proj._parameters, images)
        or _why_not_tokens(model, embedding.num_patches)
        or why_reference(images)
    )


def _why_not_dtypes(parameters: dict[str, Tensor | None], images: Tensor) -> str | None:
    """PyTorch's convolution wants one dtype, and says so."""
    weight, bias = parameters["weight"], parameters["bias"]
    if weight.dtype is images.dtype and (bias is None or bias.dtype is weight.dtype):
        return None
    return f"images in {images.dtype}, weights in {weight.dtype}" if autocast_dtype(images) is None else None


def _why_not_tokens(model: nn.Module, patches: int) -> str | None:
    positions, *prefix = added = _added(model)
    for tensor in added:
        kind = type(tensor)
        if tensor is None:
            continue
        if kind is not _Parameter and kind is not Tensor and not exported(tensor):
            return f"a token or position is a {kind.__name__}"
        if tensor.dim() != 3 or tensor.shape[0] != 1:
            return f"a token or position is {tuple(tensor.shape)}, not one for all images"
    if positions is None:
        return None
    tokens = patches
    if not model.no_embed_class:
        for tensor in prefix:
            tokens += 0 if tensor is None else tensor.shape[1]
    return None if positions.shape[1] == tokens else f"{positions.shape[1]} positions for {tokens} tokens"


def _added(model: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Positions, class token and what follows that: a distilled model has no use for registers."""
    more = "dist_token" if isinstance(model, VisionTransformerDistilled) else "reg_token"
    return _tensor(model, "pos_embed"), _tensor(model, "cls_token"), _tensor(model, more)


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    parameter = model._parameters.get(name)
    return getattr(model, name) if parameter is None else parameter  # such as a buffer in its place


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """The tokens (B, N, C) that timm's `patch_embed` and `_pos_embed` make, where `why_not_embedded` has nothing against it."""
    parameters = model._modules["patch_embed"]._modules["proj"]._parameters
    added = _added(model)
    tokens = ops.patch_embedding(images, parameters["weight"], parameters["bias"], *added)
    return tokens if added[0] is None else model.pos_drop(tokens)


def blank_image(model: nn.Module) -> Tensor | None:
    """One image as the model takes it, None if nothing says how large that is."""
    proj = getattr(model.patch_embed, "proj", None)
    size, weight = getattr(model.patch_embed, "img_size", None), getattr(proj, "weight", None)
    if size is None or type(proj) is not _Conv2d:
        return None
    return torch.empty(1, proj.in_channels, *size, dtype=weight.dtype, device=weight.device)
