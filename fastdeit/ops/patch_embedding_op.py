"""A vision transformer's embedding: patches of images to tokens, with positions and prefix tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit import backends
from fastdeit.ops.arguments import check_beside
from fastdeit.ops.first_derivative import first_derivative_only
from fastdeit.ops.linear_op import promoted, without_autocast
from fastdeit.ops.mlp_op import _weight_gradient

_INPUTS = ("images", "weight", "bias", "positions", "class_token", "more_tokens")


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
            is not read.
        weight: (C, K, P, Q), a convolution's, of patches of P x Q pixels; bias: (C,) or None. Outside autocast of the images'
            dtype.
        positions: (1, tokens, C), or (1, patches, C) to be added to the patches alone, or None.
        class_token: (1, 1, C) or None.
        more_tokens: (1, any number, C) or None: the distillation token (Touvron et al. 2021, section 4), or registers.

    Returns:
        (B, tokens, C): the prefix tokens, then the patches row by row, in the dtype that PyTorch's promotion gives the formula.

    Raises:
        TypeError: an argument is not a floating-point tensor, or outside autocast weight or bias has not the images' dtype.
        ValueError: a shape or device does not fit.
    """
    _check(images, weight, bias, positions, class_token, more_tokens)
    tensors = (images, weight, bias, positions, class_token, more_tokens)
    if why_reference(images) is not None:
        return patch_embedding_reference(*tensors)
    products = backends.product_dtype(images)
    keeps = backends.wants_gradient(weight)
    if backends.registered_path(*tensors):
        return patch_embedding_forward(*tensors, products, keeps)[0]
    if backends.wants_gradient(*tensors):
        return _PatchEmbedding.apply(*tensors, products)
    return _forward(*tensors, products)[0]


def patch_embedding_reference(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    class_token: Tensor | None = None,
    more_tokens: Tensor | None = None,
) -> Tensor:
    """What `patch_embedding` means, in plain PyTorch. Run in float64 it is the oracle."""
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if positions is not None and positions.shape[1] == tokens.shape[1]:
        tokens, positions = tokens + positions, None
    prefix = [t.expand(images.shape[0], -1, -1) for t in (class_token, more_tokens) if t is not None]
    tokens = torch.cat([*prefix, tokens], dim=1) if prefix else tokens
    return tokens if positions is None else tokens + positions


def why_reference(images: Tensor) -> str | None:
    """None when `patch_embedding` runs its kernel on images, else why it runs the reference, a convolution."""
    if backends.on_gpu(images) and backends.product_dtype(images) == torch.float32:
        return "float32 convolutions and matrix products take TF32 by switches of their own"
    return backends.why_reference(images)


def _check(images, weight, bias, positions, class_token, more_tokens) -> None:
    given = dict(zip(_INPUTS, (images, weight, bias, positions, class_token, more_tokens), strict=True))
    for name, tensor in given.items():
        if tensor is None and name not in ("images", "weight"):
            continue
        check_beside(name, tensor, images, "images")
    if images.dim() != 4:
        raise ValueError(f"images: expected shape (B, K, H, W), got {tuple(images.shape)}")
    if weight.dim() != 4 or weight.shape[1] != images.shape[1]:
        raise ValueError(f"weight: expected shape (C, {images.shape[1]}, P, Q), got {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != images.dtype and not torch.is_autocast_enabled(images.device.type):
            raise TypeError(f"{name}: expected {images.dtype} as images has, got {tensor.dtype}")
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


# ---- the work, shared by both paths


def _forward(images, weight, bias, positions, class_token, more_tokens, products) -> tuple[Tensor, Tensor]:
    """Tokens (B, tokens, C) and the patches (B * patches, K * P * Q) in the dtype of the product."""
    from fastdeit.kernels.embedding.patch_embedding import patch_embedding_forward as assemble

    pixels = _as_patches(images, weight)
    patches = torch.empty(pixels.shape, dtype=products, device=images.device).copy_(pixels)
    patches = patches.view(pixels.shape[:3].numel(), pixels.shape[3:].numel())
    with without_autocast(images):
        product = torch.mm(patches, weight.reshape(len(weight), -1).to(products).t())
    product = product.view(len(images), pixels.shape[1] * pixels.shape[2], len(weight))
    added = (t if t is None else t.contiguous() for t in (bias, positions, class_token, more_tokens))
    return assemble(product, *added, promoted(products, positions, class_token, more_tokens)), patches


def _backward(dtokens, patches, weight, images_shape, counts, products, dtypes) -> tuple[Tensor | None, ...]:
    """Gradients in the order of _INPUTS: each in its dtype of `dtypes`, None where that is None.

    Args:
        images_shape: read only for the images' gradient.
        counts: `_counts`.
    """
    from fastdeit.kernels.embedding.patch_embedding import patch_embedding_backward as split

    to = dict(zip(_INPUTS, dtypes, strict=True))
    found: dict[str, Tensor] = {}
    of_class, of_prefix, of_positions = counts
    needs_product = to["images"] is not None or to["weight"] is not None
    needs_sum = any(to[name] is not None for name in _INPUTS[2:])
    dproduct, total = split(dtokens.contiguous(), of_prefix, products if needs_product else None, needs_sum=needs_sum)
    with without_autocast(dtokens):
        if to["weight"] is not None:
            found["weight"] = _weight_gradient(dproduct, patches, to["weight"]).view(weight.shape)
        if to["images"] is not None:
            found["images"] = torch.zeros(images_shape, dtype=to["images"], device=dtokens.device)
            dpixels = _as_patches(found["images"], weight)
            dpixels.copy_(torch.mm(dproduct, weight.reshape(len(weight), -1).to(products)).view(dpixels.shape))
    if to["bias"] is not None:
        found["bias"] = total[of_prefix:].sum(0).to(to["bias"])
    # Copies: gradients that shared memory would be scaled or clipped twice.
    # The first dimension comes last, so that its stride is the parameter's, to which DDP compares it.
    for name, rows in (("class_token", slice(0, of_class)), ("more_tokens", slice(of_class, of_prefix))):
        if to[name] is not None:
            found[name] = total[rows].to(to[name], copy=True)[None]
    if to["positions"] is not None:
        found["positions"] = total[len(total) - of_positions :].to(to["positions"])[None]
    return tuple(found.get(name) for name in _INPUTS)


def _counts(positions, class_token, more_tokens) -> tuple[int, int, int]:
    """The number of class tokens, 0 or 1, of all prefix tokens, and of positions."""
    of_class, of_prefix = _prefix_tokens(class_token, None), _prefix_tokens(class_token, more_tokens)
    return of_class, of_prefix, 0 if positions is None else positions.shape[1]


# ---- eager


class _PatchEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, weight, bias, positions, class_token, more_tokens, products):
        tensors = (images, weight, bias, positions, class_token, more_tokens)
        tokens, patches = _forward(*tensors, products)
        ctx.save_for_backward(patches if ctx.needs_input_grad[1] else None, weight)
        ctx.options = images.shape, _counts(positions, class_token, more_tokens), products
        ctx.dtypes = tuple(None if t is None else t.dtype for t in tensors)
        return tokens

    @staticmethod
    @first_derivative_only
    def backward(ctx, dtokens):
        wanted = [dtype if need else None for dtype, need in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)]
        return *_backward(dtokens, *ctx.saved_tensors, *ctx.options, wanted), None


# ---- compiled and exported: the registered ops


@torch.library.custom_op("fastdeit::patch_embedding_forward", mutates_args=())
def patch_embedding_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    class_token: Tensor | None,
    more_tokens: Tensor | None,
    products: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    tokens, patches = _forward(images, weight, bias, positions, class_token, more_tokens, products)
    return tokens, patches if keeps else patches.new_empty(0)


@patch_embedding_forward.register_fake
def _(images, weight, bias, positions, class_token, more_tokens, products, keeps):
    pixels = _as_patches(images, weight)
    B, rows, columns = pixels.shape[:3]
    channels = weight.shape[0]
    count = rows * columns + _prefix_tokens(class_token, more_tokens)
    dtype = promoted(products, positions, class_token, more_tokens)
    kept = (B * rows * columns, weight.numel() // channels) if keeps else 0
    return images.new_empty((B, count, channels), dtype=dtype), images.new_empty(kept, dtype=products)


@torch.library.custom_op("fastdeit::patch_embedding_backward", mutates_args=())
def patch_embedding_backward(
    dtokens: Tensor,
    patches: Tensor,
    images: Tensor | None,  # where its gradient is wanted
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    class_token: Tensor | None,
    more_tokens: Tensor | None,
    products: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    given = zip((images, weight, bias, positions, class_token, more_tokens), needs, strict=True)
    wanted = [t.dtype if need and t is not None else None for t, need in given]
    shape, counts = None if images is None else images.shape, _counts(positions, class_token, more_tokens)
    gradients = _backward(dtokens, patches, weight, shape, counts, products, wanted)
    return [dtokens.new_empty(0) if g is None else g for g in gradients]


@patch_embedding_backward.register_fake
def _(dtokens, patches, images, weight, bias, positions, class_token, more_tokens, products, needs):
    given = zip((images, weight, bias, positions, class_token, more_tokens), needs, strict=True)
    return [
        dtokens.new_empty(t.shape, dtype=t.dtype) if need and t is not None else dtokens.new_empty(0)
        for t, need in given
    ]


def _keep(ctx, inputs, output):
    images, *tensors, ctx.products, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], images if ctx.needs_input_grad[0] else None, *tensors)


def _registered_backward(ctx, dtokens, _):
    needs = list(ctx.needs_input_grad[:6])
    gradients = patch_embedding_backward(dtokens, *ctx.saved_tensors, ctx.products, needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None


patch_embedding_forward.register_autograd(_registered_backward, setup_context=_keep)
