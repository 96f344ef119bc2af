"""How the launchers show tensors to the attention kernels: as (B, N, heads, D) by strides, or as descriptors."""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdeit.kernels.launch import descriptor

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


def by_head(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The packed (B, N, heads * D) tensor as (B, heads, N, D), for `descriptors`."""
    batch, tokens, width = x.shape
    return x.view(batch, tokens, width // head_dim, head_dim).transpose(1, 2)


def descriptors(
    heads: torch.Tensor, pieces: tuple[int, int], rows: int
) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Descriptors of (B, heads, N, D), one a piece, with blocks of `rows` tokens of a head.

    Tokens past N and columns past D load as zeros and are not stored.
    """
    main, rest = pieces
    return descriptor(heads, [1, 1, rows, main]), descriptor(heads, [1, 1, rows, rest]) if rest else None


def descriptor_types(rows: dict[str, int], dtype: str, pieces: tuple[int, int]) -> dict[str, str]:
    """Triton's types of the descriptor pairs `<name>0_desc` and `<name>1_desc`, given the rows of each."""
    return {
        f"{name}{i}_desc": f"tensordesc<{dtype}[1, 1, {count}, {piece}]>"
        for name, count in rows.items()
        for i, piece in enumerate(pieces)
        if piece
    }
