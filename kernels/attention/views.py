"""How the launchers show tensors to the attention kernels: as (B, N, heads, D) by strides, or as descriptors."""

from functools import lru_cache
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdeit.kernels.runtime.launch import descriptor

_LONGEST_STRIDE = 2**24  # elements from token to token, so that offsets within a tile fit 32 bits


def strided(x: torch.Tensor) -> torch.Tensor:
    """x (B, N, ...) itself if the kernels can walk it, else a contiguous copy."""
    return x if x.stride(-1) == 1 and x.stride(1) <= _LONGEST_STRIDE else x.contiguous()


def packed_strides(qkv: torch.Tensor, head_dim: int) -> tuple[int, int, int]:
    """Batch, token and head stride of a packed (B, N, heads * D) tensor."""
    return qkv.stride(0), qkv.stride(1), head_dim


def head_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Batch, token and head stride of (B, N, H, D)."""
    return x.stride()[:3]


@lru_cache
def vector_units(itemsize: int, head_dim: int, strides: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The largest power of two, 16 bytes at most, that divides D and every stride; and the strides in units of it."""
    bits = 16 // itemsize | head_dim
    for stride in strides:
        bits |= stride
    vector = bits & -bits
    return vector, tuple(stride // vector for stride in strides)


def describable(x: torch.Tensor) -> bool:
    """Whether a descriptor can express the packed tensor: 16-byte aligned, and so is every row."""
    itemsize = x.element_size()
    return x.data_ptr() % 16 == 0 and (x.stride(0) | x.stride(1)) * itemsize % 16 == 0 and min(x.stride()) > 0


class ByHead(NamedTuple):
    """A tensor seen as (B, heads, N, D). Without a view: PyTorch takes 2 us to make one."""

    tensor: torch.Tensor
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]


def by_head(x: torch.Tensor, head_dim: int) -> ByHead:
    """The packed (B, N, heads * D) tensor as (B, heads, N, D), for `descriptors`."""
    batch, tokens, width = x.shape
    batch_stride, token_stride, _ = x.stride()
    return ByHead(x, (batch, width // head_dim, tokens, head_dim), (batch_stride, head_dim, token_stride, 1))


def descriptors(heads: ByHead, split: tuple[int, int], rows: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Descriptors of (B, heads, N, D), one a piece, with blocks of `rows` tokens of a head.

    Tokens past N and columns past D load as zeros and are not stored.
    """
    tensor, *seen = heads
    main, rest = split
    return descriptor(tensor, [1, 1, rows, main], *seen), descriptor(
        tensor, [1, 1, rows, rest], *seen
    ) if rest else None


def descriptor_types(rows: dict[str, int], dtype: str, split: tuple[int, int]) -> dict[str, str]:
    """Triton's types of the descriptor pairs `<name>0_desc` and `<name>1_desc`, given the rows of each."""
    return {
        f"{name}{i}_desc": f"tensordesc<{dtype}[1, 1, {count}, {piece}]>"
        for name, count in rows.items()
        for i, piece in enumerate(split)
        if piece
    }
