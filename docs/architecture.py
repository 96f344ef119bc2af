"""Draws docs/architecture.png: a DeiT block as timm runs it and as fastdeit does. Run it as `python docs/architecture.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from fastdeit.aot.catalog import KERNEL_FILES

OUT = Path(__file__).with_name("architecture.png")

# What timm runs in a block, one PyTorch operation to a row: (name, what it does).
EAGER = (
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
    ("drop_path2", "multiply by mask / keep"),
    ("+", "add to the residual stream"),
    ("norm1", "LayerNorm of the next block"),
)
# What fastdeit runs in their place: (first row, last row, op, what it fuses, the kernel file that it needs).
FUSED = (
    (0, 0, "layer_norm", "", "layer_norm"),
    (1, 1, "F.linear", "", None),
    (2, 2, "attention", "reads the packed QKV", "attention"),
    (3, 3, "F.linear", "", None),
    (4, 7, "add_layer_norm", "gamma, drop path,\nresidual, LayerNorm", "layer_norm"),
    (8, 8, "F.linear", "", None),
    (9, 9, "mlp", "GELU, not kept for backward", "mlp"),
    (10, 10, "F.linear", "", None),
    (11, 14, "add_layer_norm", "gamma, drop path,\nresidual, LayerNorm", "layer_norm"),
)

INK, FAINT = "#1f2933", "#7b8794"
EAGER_COLOUR = ("#f5f7fa", "#9aa5b1")  # face, edge
KERNEL_COLOUR = ("#c6f0d8", "#1f8a4c")
MISSING_COLOUR = ("#ffffff", "#9aa5b1")
LEFT, RIGHT, WIDTH, HEIGHT = 0.0, 5.6, 4.6, 0.72  # in rows


def box(axes, x, first, last, colour, *, dashed=False):
    face, edge = colour
    y, height = -last - HEIGHT / 2, last - first + HEIGHT
    style = {"facecolor": face, "edgecolor": edge, "linewidth": 1.2, "linestyle": (0, (4, 3)) if dashed else "-"}
    axes.add_patch(FancyBboxPatch((x, y), WIDTH, height, boxstyle="round,pad=0,rounding_size=0.14", **style))
    return y + height / 2


def draw():
    figure, axes = plt.subplots(figsize=(8.2, 8.0))
    for row, (name, does) in enumerate(EAGER):
        y = box(axes, LEFT, row, row, EAGER_COLOUR)
        axes.text(LEFT + 0.16, y, name, va="center", family="monospace", size=9, color=INK)
        axes.text(LEFT + WIDTH - 0.16, y, does, va="center", ha="right", size=8.5, color=FAINT)
    for first, last, op, fuses, kernel_file in FUSED:
        written = kernel_file in KERNEL_FILES
        y = box(axes, RIGHT, first, last, KERNEL_COLOUR if written else MISSING_COLOUR, dashed=not written)
        axes.text(RIGHT + 0.16, y, op, va="center", family="monospace", size=9, color=INK)
        axes.text(RIGHT + WIDTH - 0.16, y, fuses, va="center", ha="right", size=8.5, color=INK if written else FAINT)
        span = [-first + HEIGHT / 2, -last - HEIGHT / 2]
        axes.fill_between([LEFT + WIDTH, RIGHT], *span, color="#eef1f4", linewidth=0, zorder=0)
    for x, title, subtitle in (
        (LEFT, "timm, eager", "each box reads and writes the activations"),
        (RIGHT, "fastdeit", "one op for the rows beside it"),
    ):
        axes.text(x, 1.25, title, size=13, weight="bold", color=INK)
        axes.text(x, 0.72, subtitle, size=9, color=FAINT)
    bottom = -len(EAGER) - 0.15
    for x, colour, dashed, text in (
        (LEFT, KERNEL_COLOUR, False, "a Triton kernel, forward and backward"),
        (RIGHT, MISSING_COLOUR, True, "no kernel: PyTorch's own operations"),
    ):
        style = {"facecolor": colour[0], "edgecolor": colour[1], "linewidth": 1.2}
        axes.add_patch(plt.Rectangle((x, bottom), 0.5, 0.4, linestyle=(0, (4, 3)) if dashed else "-", **style))
        axes.text(x + 0.7, bottom + 0.2, text, va="center", size=9, color=INK)
    axes.set_xlim(LEFT - 0.1, RIGHT + WIDTH + 0.1)
    axes.set_ylim(bottom - 0.2, 1.8)
    axes.axis("off")
    figure.savefig(OUT, dpi=110, bbox_inches="tight", pad_inches=0.12, metadata={"Software": None})
    Image.open(OUT).convert("RGB").quantize(64).save(OUT, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    draw()
