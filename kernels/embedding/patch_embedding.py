"""From the product of patches and weights to tokens: bias, positions and prefix tokens in one pass, and their gradients in another.

Both walk over one image's tokens as a table of tokens * C elements. Prefix tokens come first in it, so patches begin at element
`prefix`, and what every image shares is read once a strip of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from fastdeit.kernels.gemm.tiles import assume_multiple_of
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import multiprocessors
from fastdeit.kernels.runtime.column_sums import add_partial_sums, sum_rows
from fastdeit.kernels.runtime.launch import cdiv, launch

IMAGES, ELEMENTS, NUM_WARPS = 4, 512, 4  # of a forward program's step: 16 values a thread


@dataclass(frozen=True)
class Config:
    elements: int  # of the table, that a program owns
    blocks: int  # of so many elements
    strips: int  # of images
    images_per_strip: int  # a multiple of IMAGES


def backward_elements(element_size: int) -> int:
    """Elements of the table that a backward program owns, for gradients of that many bytes: a thread reads 16 bytes of an image.

    Two copies of 16 bytes, 32 bytes apart, would each move whole sectors of 32 bytes from the L2 cache.
    """
    return 512 // element_size


@lru_cache
def select_config(images: int, size: int, multiprocessors: int, elements: int = ELEMENTS) -> Config:
    """Eight programs a multiprocessor keep enough loads in flight. Each strip costs backward a row of partial sums.

    Args:
        images: in the batch, at least 1.
        size: elements of one image's tokens, at least 1.
        multiprocessors: of the device.
        elements: that a program owns.
    """
    blocks = cdiv(size, elements)
    strips = min(cdiv(images, IMAGES), cdiv(8 * multiprocessors, blocks))
    images_per_strip = IMAGES * cdiv(cdiv(images, IMAGES), strips)
    return Config(elements, blocks, cdiv(images, images_per_strip), images_per_strip)


@triton.jit(do_not_specialize=["B", "C", "size", "prefix", "unplaced", "images_per_strip"])
def patch_embedding_forward_kernel(
    product_ptr,  # (B, patches, C)
    bias_ptr,  # (C,) or None
    positions_ptr,  # (tokens, C), (patches, C) or None
    class_token_ptr,  # (1, C) or None
    more_tokens_ptr,  # (prefix tokens after that one, C) or None
    tokens_ptr,  # (B, tokens, C)
    B,
    C,
    size,  # tokens * C
    prefix,  # prefix tokens * C
    unplaced,  # elements before the first that has a position: 0 or prefix
    images_per_strip,
    IMAGES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    VECTOR: tl.constexpr,  # a power of two that divides C: lets loads be 16 bytes wide
):
    """A program owns ELEMENTS elements of the table in one strip of images (program id 1)."""
    C, size = assume_multiple_of(C, VECTOR), assume_multiple_of(size, VECTOR)
    prefix, unplaced = assume_multiple_of(prefix, VECTOR), assume_multiple_of(unplaced, VECTOR)
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    of_patch = (at >= prefix) & (at < size)
    shared = tl.zeros([ELEMENTS], tl.float32)  # a patch's bias, or a prefix token
    if bias_ptr is not None:
        shared += tl.load(bias_ptr + at % C, of_patch, other=0.0).to(tl.float32)
    first_of_more = 0
    if class_token_ptr is not None:
        shared += tl.load(class_token_ptr + at, at < C, other=0.0).to(tl.float32)
        first_of_more = C
    if more_tokens_ptr is not None:
        is_more = (at >= first_of_more) & (at < prefix)
        shared += tl.load(more_tokens_ptr + (at - first_of_more), is_more, other=0.0).to(tl.float32)
    position = tl.zeros([ELEMENTS], tl.float32)
    if positions_ptr is not None:
        placed = (at >= unplaced) & (at < size)
        position += tl.load(positions_ptr + (at - unplaced), placed, other=0.0).to(tl.float32)
    first = tl.program_id(1) * images_per_strip
    for start in tl.range(first, tl.minimum(first + images_per_strip, B), IMAGES):  # no NaN: image numbers
        image = (start + tl.arange(0, IMAGES)[:, None]).to(tl.int64)
        inside = (image < B) & of_patch[None, :]
        product = tl.load(product_ptr + image * (size - prefix) + (at - prefix)[None, :], inside, other=0.0)
        token = product.to(tl.float32) + shared[None, :] + position[None, :]
        inside = (image < B) & (at < size)[None, :]
        tl.store(tokens_ptr + image * size + at[None, :], token.to(tokens_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["B", "size", "prefix", "images_per_strip"])
def patch_embedding_backward_kernel(
    dtokens_ptr,  # (B, tokens, C)
    dproduct_ptr,  # (B, patches, C) or None
    sum_partial_ptr,  # (strips, tokens, C) fp32 or None
    B,
    size,
    prefix,
    images_per_strip,
    IMAGES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The patches' gradient cast and packed for the products, and the sum over images of all tokens' gradient.

    A program owns ELEMENTS elements of the table in one strip of images (program id 1).
    """
    size, prefix = assume_multiple_of(size, VECTOR), assume_multiple_of(prefix, VECTOR)
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    of_patch = (at >= prefix) & (at < size)
    total = tl.zeros([IMAGES, ELEMENTS], tl.float32)
    strip = tl.program_id(1)
    first = strip * images_per_strip
    for start in tl.range(
        first, tl.minimum(first + images_per_strip, B), IMAGES, num_stages=4
    ):  # no NaN: image numbers
        image = (start + tl.arange(0, IMAGES)[:, None]).to(tl.int64)
        inside = (image < B) & (at < size)[None, :]
        dtoken = tl.load(dtokens_ptr + image * size + at[None, :], inside, other=0.0).to(tl.float32)
        if sum_partial_ptr is not None:
            total += dtoken
        if dproduct_ptr is not None:
            to = dproduct_ptr + image * (size - prefix) + (at - prefix)[None, :]
            tl.store(to, dtoken.to(dproduct_ptr.dtype.element_ty), (image < B) & of_patch[None, :])
    if sum_partial_ptr is not None:
        tl.store(sum_partial_ptr + strip.to(tl.int64) * size + at, sum_rows(total, IMAGES), at < size)


def patch_embedding_forward(
    product: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor | None,
    class_token: torch.Tensor | None,
    more_tokens: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Tokens (B, prefix + patches, C) in dtype, rounded once: the prefix tokens, then product + bias, all with their positions.

    Args:
        product: (B, patches, C).
        bias: (C,).
        positions: (..., C), a row for every token, or for every patch alone.
        class_token, more_tokens: (..., C), one and any number of prefix tokens.

    All contiguous.
    """
    B, patches, C = product.shape
    prefix = sum(t.numel() for t in (class_token, more_tokens) if t is not None)
    size = prefix + patches * C
    tokens = product.new_empty(B, size // C, C, dtype=dtype)
    if tokens.numel():
        unplaced = 0 if positions is None else size - positions.numel()
        config = select_config(B, size, multiprocessors(product))
        launch(
            patch_embedding_forward_kernel,
            (config.blocks, config.strips),
            (
                product,
                bias,
                positions,
                class_token,
                more_tokens,
                tokens,
                B,
                C,
                size,
                prefix,
                unplaced,
                config.images_per_strip,
            ),
            (IMAGES, ELEMENTS, min(C & -C, 16)),
            NUM_WARPS,
        )
    return tokens


def patch_embedding_backward(
    dtokens: torch.Tensor, prefix_tokens: int, product_dtype: torch.dtype | None, *, needs_sum: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradient (B * patches, C) of the product in product_dtype, and the sum (tokens, C) of dtokens over images in fp32.

    Each only where it is asked for. dtokens (B, tokens, C) is contiguous; the sum's order is fixed.
    """
    B, tokens, C = dtokens.shape
    size, prefix = tokens * C, prefix_tokens * C
    rows = B * (tokens - prefix_tokens)
    dproduct = None if product_dtype is None else dtokens.new_empty(rows, C, dtype=product_dtype)
    if dtokens.numel() == 0:
        return dproduct, torch.zeros((tokens, C), device=dtokens.device) if needs_sum else None
    config = select_config(B, size, multiprocessors(dtokens), backward_elements(dtokens.element_size()))
    shape = (config.strips, tokens, C)
    partial = dtokens.new_empty(*shape, dtype=torch.float32) if needs_sum else None
    if needs_sum or dproduct is not None:
        launch(
            patch_embedding_backward_kernel,
            (config.blocks, config.strips),
            (dtokens, dproduct, partial, B, size, prefix, config.images_per_strip),
            (IMAGES, config.elements, min(C & -C, 16)),
            NUM_WARPS,
        )
    if not needs_sum or config.strips == 1:
        return dproduct, partial if partial is None else partial[0]
    total = dtokens.new_empty(tokens, C, dtype=torch.float32)
    add_partial_sums((partial.view(config.strips, size), total))
    return dproduct, total


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """bf16 autocast with an fp32 residual stream; a bf16 model's differ in the width of the tokens alone."""
    tile = dict(IMAGES=IMAGES, ELEMENTS=ELEMENTS, VECTOR=16)
    tensors = dict(product_ptr="*bf16", tokens_ptr="*fp32")
    tensors |= dict.fromkeys(("bias_ptr", "positions_ptr", "class_token_ptr", "more_tokens_ptr"), "*fp32")
    forward = tensors | dict.fromkeys(("B", "C", "size", "prefix", "unplaced", "images_per_strip"), "i32")
    yield AotConfig(patch_embedding_forward_kernel, forward, tile, NUM_WARPS, 1, "autocast", matrix=False)
    backward = dict(dtokens_ptr="*fp32", dproduct_ptr="*bf16", sum_partial_ptr="*fp32")
    backward |= dict.fromkeys(("B", "size", "prefix", "images_per_strip"), "i32")
    tile = tile | dict(ELEMENTS=backward_elements(4))
    yield AotConfig(patch_embedding_backward_kernel, backward, tile, NUM_WARPS, 1, "autocast", matrix=False)
