"""Draws docs/architecture.png: a DeiT block as timm runs it and as fastdeit does. Run it as `python docs/architecture.py`."""

import hashlib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

OUT = Path(__file__).with_name("architecture.png")
DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # kept in the picture: says which script drew it

# What timm runs, one PyTorch operation to a row: (name, what it does). A branch ends with an addition, which fastdeit leaves to the
# next node: the rows begin with the addition of the block before.
EAGER = (
    ("drop_path2", "mask / keep, of the block before"),
    ("+", "add to the residual stream"),
    ("norm1", "LayerNorm"),
    ("attn.qkv", "linear"),
    ("attn", "scaled dot product attention"),
    ("attn.proj", "linear"),
    ("ls1", "multiply by gamma (DeiT III)"),
    ("drop_path1", "multiply by mask / keep"),
    ("+", "add to the residual stream"),
    ("norm2", "LayerNorm"),
    ("mlp.fc1", "linear"),
    ("mlp.act", "GELU"),
    ("mlp.fc2", "linear"),
    ("ls2", "multiply by gamma (DeiT III)"),
)
# What fastdeit runs in their place: (first row, last row, kernel or "GEMM", what it does).
FUSED = (
    (0, 2, "layer_norm_forward", "drop path,\naddition, LayerNorm"),
    (3, 3, "GEMM", ""),
    (4, 4, "attention_forward", "reads packed QKV"),
    (5, 6, "GEMM", "gamma is in the weight"),
    (7, 9, "layer_norm_forward", "drop path,\naddition, LayerNorm"),
    (10, 10, "GEMM", ""),
    (11, 11, "activation_forward", "GELU"),
    (12, 13, "GEMM", "gamma is in the weight"),
)
# Autograd nodes: (first row, last row, op).
NODES = ((0, 6, "add_layer_norm_attention"), (7, 13, "add_layer_norm_mlp"))

INK, FAINT = "#1f2933", "#7b8794"
EAGER_COLOUR = ("#f5f7fa", "#9aa5b1")  # face, edge
KERNEL_COLOUR = ("#c6f0d8", "#1f8a4c")
GEMM_COLOUR = ("#ffffff", "#9aa5b1")
NODE_COLOUR = ("#eef8f1", "#1f8a4c")
LEFT, RIGHT, WIDTH, HEIGHT = 0.0, 5.8, 5.0, 0.72  # in rows
BETWEEN_NODES = 1.05  # rows of room for the name of a node


def top_of(row: int) -> float:
    """The middle of a row, from the top downwards."""
    return -row - BETWEEN_NODES * sum(row >= first for first, _, _ in NODES)


def box(axes, x, first, last, colour, *, margin=0.0):
    """A box over rows; returns the height of its middle."""
    face, edge = colour
    bottom, top = top_of(last) - HEIGHT / 2 - margin, top_of(first) + HEIGHT / 2 + margin
    shape = FancyBboxPatch(
        (x - margin, bottom), WIDTH + 2 * margin, top - bottom, boxstyle="round,pad=0,rounding_size=0.14"
    )
    shape.set(facecolor=face, edgecolor=edge, linewidth=1.2)
    axes.add_patch(shape)
    return (bottom + top) / 2


def draw(out: Path = OUT) -> None:
    figure, axes = plt.subplots(figsize=(9.2, 8.4))
    for row, (name, does) in enumerate(EAGER):
        y = box(axes, LEFT, row, row, EAGER_COLOUR)
        axes.text(LEFT + 0.16, y, name, va="center", family="monospace", size=9, color=INK)
        axes.text(LEFT + WIDTH - 0.16, y, does, va="center", ha="right", size=8.5, color=FAINT)
    for first, last, op in NODES:
        box(axes, RIGHT, first, last, NODE_COLOUR, margin=0.16)
        axes.text(RIGHT, top_of(first) + 0.82, op, va="center", family="monospace", size=9.5, weight="bold", color=INK)
    for first, last, kernel, does in FUSED:
        y = box(axes, RIGHT, first, last, GEMM_COLOUR if kernel == "GEMM" else KERNEL_COLOUR)
        axes.text(RIGHT + 0.16, y, kernel, va="center", family="monospace", size=9, color=INK)
        axes.text(RIGHT + WIDTH - 0.16, y, does, va="center", ha="right", size=8.5, color=INK)
    for x, title, subtitle in (
        (LEFT, "timm, eager", "each box reads and writes the activations"),
        (RIGHT, "fastdeit", "two autograd nodes a block"),
    ):
        axes.text(x, 1.25, title, size=13, weight="bold", color=INK)
        axes.text(x, 0.72, subtitle, size=9, color=FAINT)
    bottom = top_of(len(EAGER)) - 0.35
    for x, colour, text in (
        (LEFT, KERNEL_COLOUR, "a Triton kernel, forward; backward has its own"),
        (RIGHT, GEMM_COLOUR, "a GEMM of cuBLAS"),
    ):
        axes.add_patch(plt.Rectangle((x, bottom), 0.5, 0.4, facecolor=colour[0], edgecolor=colour[1], linewidth=1.2))
        axes.text(x + 0.7, bottom + 0.2, text, va="center", size=9, color=INK)
    axes.set_xlim(LEFT - 0.1, RIGHT + WIDTH + 0.3)
    axes.set_ylim(bottom - 0.2, 1.8)
    axes.axis("off")
    figure.savefig(out, dpi=110, bbox_inches="tight", pad_inches=0.12)
    about = PngInfo()
    about.add_text("script", DIGEST)
    Image.open(out).convert("RGB").quantize(64).save(out, optimize=True, pnginfo=about)  # a third of the bytes


if __name__ == "__main__":
    draw()
