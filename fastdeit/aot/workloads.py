"""The launches of the kernels that run by default in DeiT-S and DeiT-B, 256 images of 224 pixels, for the estimates.

Each is found by kernel and label of its configuration. Kernels on weights alone (folding) and on logits are left out: their floors
are a few microseconds, so that a launch's latency decides.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from fastdeit.aot.catalog import Resources
from fastdeit.aot.devices import DEVICES, Device
from fastdeit.aot.estimate import Estimate, Workload, estimate
from fastdeit.cost import formulas
from fastdeit.cost.formulas import Cost
from fastdeit.cost.models import DEIT, Shape
from fastdeit.kernels.attention import config as attention
from fastdeit.kernels.embedding import patch_embedding
from fastdeit.kernels.mlp import activation
from fastdeit.kernels.norm import layer_norm
from fastdeit.kernels.runtime import column_sums
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.launch import cdiv

BATCH = 256
MODELS = ("S", "B")
_PREFIX = 2  # class and distillation tokens


@dataclass(frozen=True)
class Launch:
    """A configuration and what it is launched on."""

    kernel: str
    label: str
    model: str
    work: Workload
    lowest_share: float = 0.75  # of the floor, that the estimate must reach


@functools.cache
def _by_configuration(arch: int) -> dict[tuple[str, str], list[Launch]]:
    found: dict[tuple[str, str], list[Launch]] = {}
    for launch in launches(arch, DEVICES[arch]) if arch in DEVICES else ():
        found.setdefault((launch.kernel, launch.label), []).append(launch)
    return found


def launches_of(row: AotConfig, arch: int) -> list[Launch]:
    """The launches of a configuration; none where it does not run by default, or no device stands for the architecture."""
    return _by_configuration(arch).get((row.kernel.__name__, row.label), [])


def estimates(row: AotConfig, arch: int, found: Resources) -> dict[str, Estimate]:
    """Model -> the estimate of a compiled configuration's launch in it."""
    return {
        launch.model: estimate(
            found.stream,
            found.matrix_instructions,
            row.num_warps,
            found.blocks_per_sm,
            launch.work,
            DEVICES[arch],
            found.execution,
        )
        for launch in launches_of(row, arch)
    }


def launches(arch: int, device: Device) -> Iterator[Launch]:
    """Every launch that has an estimate on an architecture, with grids as on the given device."""
    for model in MODELS:
        shape = DEIT[model]
        yield from _attention(model, shape, arch)
        yield from _streams(model, shape, arch, device)


def _attention(model: str, shape: Shape, arch: int) -> Iterator[Launch]:
    tokens, heads, head_dim = shape.tokens, BATCH * shape.heads, shape.channels // shape.heads
    width = heads * tokens * head_dim
    last = attention.tail(tokens, 64)
    case = attention.case(arch, head_dim, "bf16", last, describable=True)
    form = "_descriptor" if case.config.descriptors else ""

    def work(tiles: attention.Tiles, streamed: int, owned: int, cost: Cost, products: int) -> Workload:
        """streamed: tensors that a program reads all rows of; owned: those that it reads or writes its own rows of."""
        programs = cdiv(tokens, tiles.owned) * heads
        l2_bytes = programs * 2 * head_dim * (streamed * tokens + owned * tiles.owned)
        columns = (tokens - 1) // tiles.streamed * tiles.streamed + attention.tail(tokens, tiles.streamed)
        flops = programs * products * 2 * tiles.owned * columns * head_dim
        return Workload(programs, (tokens - 1) // tiles.streamed, cost, l2_bytes, flops)

    config, rows = case.config, 4 * heads * tokens
    forward = formulas.attention_forward(BATCH, tokens, shape.heads, head_dim)
    dq, dkv = Cost(6 * width * tokens, 12 * width + 2 * rows, 1), Cost(8 * width * tokens, 12 * width + 2 * rows, 1)
    yield Launch(f"attention_forward{form}_kernel", case.label, model, work(config.forward, 2, 2, forward, 2))
    yield Launch(f"attention_dq_backward{form}_kernel", case.label, model, work(config.dq, 2, 4, dq, 3), 0.6)
    yield Launch(f"attention_dkv_backward{form}_kernel", case.label, model, work(config.dkv, 2, 4, dkv, 4), 0.6)


def _streams(model: str, shape: Shape, arch: int, device: Device) -> Iterator[Launch]:
    channels, rows, hidden = shape.channels, BATCH * shape.tokens, shape.mlp
    plain, full = f"C={channels} bf16", f"C={channels} autocast"
    bf16 = dict(stream_bytes=2, branch_bytes=None)
    yield Launch(
        "layer_norm_forward_kernel",
        plain,
        model,
        Workload(rows, 0, formulas.layer_norm_forward(rows, channels, **bf16)),
    )
    yield Launch(
        "layer_norm_forward_kernel", full, model, Workload(rows, 0, formulas.layer_norm_forward(rows, channels))
    )
    programs = layer_norm.select_config(channels, arch).backward_programs_per_sm * device.multiprocessors
    backward = formulas.layer_norm_backward(rows, channels, **bf16)
    yield Launch("layer_norm_backward_kernel", plain, model, Workload(programs, rows / programs, backward))
    # dx_hat and x_hat in, the stream's gradient in and out, the branch's out
    folded = Cost(13 * rows * channels, (2 + 2 + 4 + 4 + 2) * rows * channels + 4 * rows, 1)
    yield Launch("folded_layer_norm_backward_kernel", full, model, Workload(rows, 0, folded))

    elements, config = rows * hidden, activation.select_config()
    yield Launch(
        "activation_forward_kernel",
        "gelu bf16",
        model,
        Workload(cdiv(elements, config.block), 0, Cost(14 * elements, 4 * elements, 1)),
    )
    columns = cdiv(hidden, config.columns)
    yield Launch(
        "activation_backward_kernel",
        "gelu bf16",
        model,
        _strips(rows, config.rows, columns, Cost(24 * elements, 8 * elements, 1), device),
    )

    step, width, _ = column_sums.STRIP_TILE  # of the gradients of an attention branch and of its qkv
    summed = Cost(4 * rows * channels, 2 * 4 * rows * channels, 1)
    strips = _strips(rows, step, cdiv(channels, width) + cdiv(3 * channels, width), summed, device)
    yield Launch("column_sums_backward_kernel", "two matrices", model, strips)

    size, patches = shape.tokens * channels, (shape.tokens - _PREFIX) * channels
    embedded = Cost(2 * BATCH * size, BATCH * (2 * patches + 4 * size), 1)
    for kernel, elements in (
        ("patch_embedding_forward_kernel", patch_embedding.ELEMENTS),
        ("patch_embedding_backward_kernel", patch_embedding.backward_elements(4)),
    ):
        cut = patch_embedding.select_config(BATCH, size, device.multiprocessors, elements)
        programs, trips = cut.blocks * cut.strips, cut.images_per_strip / patch_embedding.IMAGES
        yield Launch(kernel, "autocast", model, Workload(programs, trips, embedded))


def _strips(rows: int, step: int, columns: int, cost: Cost, device: Device) -> Workload:
    """A kernel that walks down strips of rows, cut as `column_sums.row_strips` cuts them."""
    steps = cdiv(rows, step)
    trips = cdiv(steps, min(steps, cdiv(8 * device.multiprocessors, columns)))
    return Workload(columns * cdiv(steps, trips), trips, cost)
