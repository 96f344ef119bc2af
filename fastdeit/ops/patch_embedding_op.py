"""A vision transformer's embedding: patches of images to tokens, with positions and prefix tokens."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import backends
from fastdeit.ops import launchers
from fastdeit.ops.arguments import check_beside
from fastdeit.ops.matmul import contiguous, promoted, weight_gradient, without_autocast
from fastdeit.ops.passed_calls import PassedCalls
from fastdeit.ops.registration import Op
from fastdeit.refusals import or_reference

CENTRE = 128  # subtracted from uint8 levels
_INPUTS = ("images", "weight", "bias", "positions", "class_token", "more_tokens")


_passed = PassedCalls()


@or_reference
def patch_embedding(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    class_token: Tensor | None = None,
    more_tokens: Tensor | None = None,
) -> Tensor:
    """The tokens that enter a vision transformer's first block (Dosovitskiy et al. 2021, eq. 1), as one autograd node.

        [class_token, more_tokens, patches weight^T + bias] + positions

    Args:
        images: (B, K, H, W), a float dtype, any strides. Patches do not overlap; what is left over at the right and at the bottom
            is not read. uint8 is read as level - 128, which float16 and bfloat16 hold exactly.
        weight: (C, K, P, Q), a convolution's, of patches of P x Q pixels. Outside autocast of the images' dtype, if that is a float
            dtype.
        bias: (C,) of weight's dtype, or None.
        positions: (1, tokens, C), or (1, patches, C) to be added to the patches alone, or None.
        class_token: (1, 1, C) or None.
        more_tokens: (1, any number, C) or None: the distillation token (Touvron et al. 2021, section 4), or registers.

    Returns:
        (B, tokens, C): the prefix tokens, then the patches row by row, in the dtype that PyTorch's promotion gives the formula.

    Raises:
        TypeError: an argument is not a floating-point tensor, images neither that nor uint8, or outside autocast weight or bias has
            not the images' dtype.
        ValueError: a shape or device does not fit.
    """
    tensors = (images, weight, bias, positions, class_token, more_tokens)
    if not _passed.has(tensors):
        _check(*tensors)
        if why_reference(images if images.is_floating_point() else weight) is not None:
            return patch_embedding_reference(*tensors)
        _passed.add(tensors)
    matmul_dtype = backends.matmul_dtype(images if images.is_floating_point() else weight)
    (tokens,) = patch_embedding_unchecked(*tensors, matmul_dtype)
    return tokens


def patch_embedding_reference(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    class_token: Tensor | None = None,
    more_tokens: Tensor | None = None,
) -> Tensor:
    """Reference of `patch_embedding` in plain PyTorch. In float64 it is the oracle."""
    images = images if images.is_floating_point() else images.to(weight.dtype) - CENTRE
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if positions is not None and positions.shape[1] == tokens.shape[1]:
        tokens, positions = tokens + positions, None
    prefix = [t.expand(images.shape[0], -1, -1) for t in (class_token, more_tokens) if t is not None]
    tokens = torch.cat([*prefix, tokens], dim=1) if prefix else tokens
    return tokens if positions is None else tokens + positions


def why_reference(images: Tensor) -> str | None:
    """None when `patch_embedding` runs its kernel on images, else why it runs the reference, a convolution."""
    if backends.on_gpu(images) and backends.matmul_dtype(images) == torch.float32:
        return "float32 convolutions and matrix products take TF32 by switches of their own"
    return backends.why_reference(images, kernels=("embedding",))


def _check(images, weight, bias, positions, class_token, more_tokens) -> None:
    given = dict(zip(_INPUTS, (images, weight, bias, positions, class_token, more_tokens), strict=True))
    for name, tensor in given.items():
        if tensor is None and name not in ("images", "weight"):
            continue
        if name != "images" or not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8:
            check_beside(name, tensor, images, "images")
    if images.dim() != 4:
        raise ValueError(f"images: expected shape (B, K, H, W), got {tuple(images.shape)}")
    if weight.dim() != 4 or weight.shape[1] != images.shape[1]:
        raise ValueError(f"weight: expected shape (C, {images.shape[1]}, P, Q), got {tuple(weight.shape)}")
    if 0 in weight.shape[2:]:
        raise ValueError(
            f"weight: expected patches of at least 1 x 1 pixels, got {weight.shape[2]} x {weight.shape[3]}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        like, whose = (images, "images") if images.is_floating_point() else (weight, "weight")
        if tensor is not None and tensor.dtype != like.dtype and not torch.is_autocast_enabled(images.device.type):
            raise TypeError(f"{name}: expected {like.dtype} as {whose} has, got {tensor.dtype}")
    (height, width), (rows, columns) = images.shape[2:], weight.shape[2:]
    if height < rows or width < columns:
        raise ValueError(f"images: expected at least {rows} x {columns} pixels, a patch, got {height} x {width}")
    channels = weight.shape[0]
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias: expected shape ({channels},), got {tuple(bias.shape)}")
    if class_token is not None and class_token.shape != (1, 1, channels):
        raise ValueError(f"class_token: expected shape (1, 1, {channels}), got {tuple(class_token.shape)}")
    if more_tokens is not None and (more_tokens.dim() != 3 or more_tokens.shape[::2] != (1, channels)):
        raise ValueError(f"more_tokens: expected shape (1, any, {channels}), got {tuple(more_tokens.shape)}")
    if positions is not None:
        patches = (height // rows) * (width // columns)
        tokens = patches + _prefix_tokens(class_token, more_tokens)
        if positions.shape != (1, tokens, channels) and positions.shape != (1, patches, channels):
            expected = " or ".join(f"(1, {count}, {channels})" for count in dict.fromkeys((tokens, patches)))
            raise ValueError(f"positions: expected shape {expected}, got {tuple(positions.shape)}")


def _prefix_tokens(class_token: Tensor | None, more_tokens: Tensor | None) -> int:
    return sum(t.shape[1] for t in (class_token, more_tokens) if t is not None)


def _as_patches(images: Tensor, weight: Tensor) -> Tensor:
    """A view (B, rows, columns, K, P, Q) of images (B, K, H, W): a patch's pixels in the order of weight's."""
    height, width = weight.shape[2:]
    return images.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 1, 4, 5)


# ---- the op


class Saved(NamedTuple):
    """For backward: the patches where weight's gradient reads them, the images where theirs is needed, and the parameters."""

    patches: Tensor | None  # (B * patches, K * P * Q), in the matmul dtype
    images: Tensor | None  # for its shape
    weight: Tensor
    positions: Tensor | None
    class_token: Tensor | None
    more_tokens: Tensor | None


def _forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    class_token: Tensor | None,
    more_tokens: Tensor | None,
    matmul_dtype: torch.dtype,
    *,
    saves,
):
    pixels = _as_patches(images, weight)
    patches = torch.empty(*pixels.shape, dtype=matmul_dtype, device=images.device)
    if images.is_floating_point():
        patches.copy_(pixels)
    else:
        torch.sub(pixels, float(CENTRE), out=patches)
    patches = patches.view(pixels.shape[:3].numel(), pixels.shape[3:].numel())
    with without_autocast():
        product = torch.mm(patches, weight.reshape(len(weight), -1).to(matmul_dtype).t())
    product = product.view(len(images), pixels.shape[1] * pixels.shape[2], len(weight))
    added = map(contiguous, (bias, positions, class_token, more_tokens))
    dtype = promoted(matmul_dtype, positions, class_token, more_tokens)
    return (launchers.patch_embedding_forward(product, *added, dtype),), (patches,)


def _save(inputs, outputs, made, needs):
    images, weight, _, *added = inputs[:6]
    (patches,) = made
    return Saved(patches if needs[1] else None, images if needs[0] else None, weight, *added)


def _backward(grads, saved, options, grad_dtypes):
    (dtokens,), (patches, images, weight, positions, class_token, more_tokens) = grads, saved
    (matmul_dtype,), dtypes = options, dict(zip(_INPUTS, grad_dtypes, strict=True))
    input_grads: dict[str, Tensor] = {}
    of_class, of_prefix = _prefix_tokens(class_token, None), _prefix_tokens(class_token, more_tokens)
    matmul_dtype = None if dtypes["images"] is None and dtypes["weight"] is None else matmul_dtype
    needs_sum = any(dtypes[name] is not None for name in _INPUTS[2:])
    dproduct, total = launchers.patch_embedding_backward(
        dtokens.contiguous(), of_prefix, matmul_dtype, needs_sum=needs_sum
    )
    with without_autocast():
        if dtypes["weight"] is not None:
            input_grads["weight"] = weight_gradient(dproduct, patches, dtypes["weight"]).view(*weight.shape)
        if dtypes["images"] is not None:
            input_grads["images"] = torch.zeros(images.shape, dtype=dtypes["images"], device=dtokens.device)
            dpixels = _as_patches(input_grads["images"], weight)
            dpixels.copy_(torch.mm(dproduct, weight.reshape(len(weight), -1).to(matmul_dtype)).view(*dpixels.shape))
    if dtypes["bias"] is not None:
        input_grads["bias"] = total[of_prefix:].sum(0).to(dtypes["bias"])
    # Copies: gradients that shared memory would be scaled or clipped twice.
    # The first dimension comes last, so that its stride is the parameter's, to which DDP compares it.
    for name, rows in (("class_token", slice(0, of_class)), ("more_tokens", slice(of_class, of_prefix))):
        if dtypes[name] is not None:
            input_grads[name] = total[rows].to(dtypes[name], copy=True)[None]
    if dtypes["positions"] is not None:
        input_grads["positions"] = total[len(total) - positions.shape[1] :].to(dtypes["positions"])[None]
    return tuple(input_grads.get(name) for name in _INPUTS)


def _fake(images, weight, bias, positions, class_token, more_tokens, matmul_dtype):
    pixels = _as_patches(images, weight)
    batch, rows, columns = pixels.shape[:3]
    channels = weight.shape[0]
    tokens = (batch, rows * columns + _prefix_tokens(class_token, more_tokens), channels)
    patches = images.new_empty((batch * rows * columns, weight.numel() // channels), dtype=matmul_dtype)
    dtype = promoted(matmul_dtype, positions, class_token, more_tokens)
    return (images.new_empty(tokens, dtype=dtype),), (patches,)


def _flops(images, weight, *_) -> int:
    (batch, _, height, width), (rows, columns) = images, weight[2:]
    return 2 * batch * (height // rows) * (width // columns) * math.prod(weight)


def _backward_flops(grads, saved, options, grad_dtypes) -> int:
    dimages, dweight, *_ = (dtype is not None for dtype in grad_dtypes)
    batch, tokens, _ = grads[0]
    prefix = sum(token[1] for token in (saved.class_token, saved.more_tokens) if token is not None)
    return 2 * batch * (tokens - prefix) * (dimages + dweight) * math.prod(saved.weight)


patch_embedding_unchecked = Op(
    "patch_embedding",
    outputs=("tokens",),
    made=("patches",),
    saved=Saved,
    forward=_forward,
    save=_save,
    backward=_backward,
    fake=_fake,
    flops=(_flops, _backward_flops),
)
