"""What each module of a vision transformer costs in a forward pass, by what it runs: the cost view of `fastdeit.explain`."""

from collections.abc import Sequence

import torch
from torch import nn

from fastdeit.cost.formulas import Cost
from fastdeit.cost.models import LAST_BLOCK, Part, Shape, parts

# Where a part's cost is listed. A block's norms are fused with its additions, so that they stand with the block.
_PLACES = {
    "patch embedding": "patch_embed.proj",
    "heads and loss": "head",
    "norms and additions": "blocks.{}",
    **dict.fromkeys(("qkv", "attention", "proj"), "blocks.{}.attn"),
    **dict.fromkeys(("fc1", "activation", "fc2"), "blocks.{}.mlp"),
}


def forward_costs(model: nn.Module, rows: Sequence, batch_size: int) -> dict[str, tuple[Cost, Cost]]:
    """Costs by module name: as the module would run, and as timm runs it in eager mode.

    Args:
        model: timm's VisionTransformer or one derived from it, with blocks of the usual kind.
        rows: of `fastdeit.explain`, which say what runs fused.
        batch_size: images.

    Parameters in 16 bits cost as such; others as under autocast.

    Raises:
        TypeError: batch_size is not an int.
        ValueError: batch_size is below 1, or the model is of another kind, whose costs are not known.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size: expected an int, got {type(batch_size).__name__}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    shape = shape_of(model)
    low = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    precision = "bf16" if low else "amp"
    fused = {row.name for row in rows if row.fused}
    timms = _by_module(parts(shape, batch_size, "eager", precision, training=False), shape)
    ours = _by_module(parts(shape, batch_size, "fastdeit", precision, training=False), shape)
    if "" not in fused:  # no residual is carried, and in the last block no token left out: so each is whole
        embedding = ours["patch_embed.proj"]
        unpruned = {name: cost for name, cost in ours.items() if f".{shape.depth - 1}" not in name}
        first = {
            name.replace("blocks.0", f"blocks.{shape.depth - 1}"): cost
            for name, cost in ours.items()
            if "blocks.0" in name
        }
        ours = {**unpruned, **first} if shape.depth > 1 else {**timms, "patch_embed.proj": embedding}
    return {name: (ours[name] if name in fused else theirs, theirs) for name, theirs in timms.items()}


def shape_of(model: nn.Module) -> Shape:
    """The sizes of a timm vision transformer. Raises ValueError for a model of another kind."""
    try:
        block = model.blocks[0]
        return Shape(
            channels=model.embed_dim,
            heads=block.attn.num_heads,
            depth=len(model.blocks),
            tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
            prefix_tokens=model.num_prefix_tokens,
            patch_size=model.patch_embed.patch_size[0],
            hidden=block.mlp.fc1.out_features,
            classes=model.num_classes,
            classifiers=2 if hasattr(model, "head_dist") else 1,
        )
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"batch_size: costs are known for timm's VisionTransformer, not for a {type(model).__name__} ({error})"
        ) from error


def _by_module(found: list[Part], shape: Shape) -> dict[str, Cost]:
    """The forward cost of every part, under the module that it belongs to."""
    costs: dict[str, Cost] = {}

    def add(name: str, cost: Cost) -> None:
        costs[name] = costs.get(name, Cost(0, 0, 0)) + cost

    for part in found:
        place = _PLACES[part.name.removeprefix(LAST_BLOCK)]
        if part.name.startswith(LAST_BLOCK):
            add(place.format(shape.depth - 1), part.forward)
        elif "{}" in place:
            for index in range(part.count):
                add(place.format(index), part.forward)
        else:
            add(place, part.forward)
    return costs
