"""The products of every ViT's MLP: what is launched for them at full size, without running it, and results at real widths."""

import pytest
import torch

from fastdeit import ops
from fastdeit.aot.catalog import ARCHITECTURES, aot_configs
from fastdeit.kernels.gemm import backward as gemm_backward
from fastdeit.kernels.gemm import forward as gemm
from fastdeit.kernels.gemm import linear as kernels_linear
from fastdeit.kernels.gemm.config import EPILOGUES, Tile, candidates, use_gemm
from fastdeit.kernels.runtime import column_sums
from fastdeit.kernels.runtime.launch import cdiv
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device

DEVICE = kernel_device()

# Width and hidden width of timm's vision transformers, and ratios of 8/3 rounded to no multiple of anything.
WIDTHS = [(192, 768), (256, 1024), (256, 1280), (320, 1792), (384, 1536), (512, 2048), (640, 2560), (768, 2304)]
WIDTHS += [(768, 3072), (832, 2176), (896, 2304), (896, 3584), (1024, 4096), (1152, 4304), (1280, 5120), (1408, 6144)]
WIDTHS += [(1536, 6144), (1536, 8960), (1664, 8192), (192, 512), (384, 1024), (768, 2048), (1024, 2730), (1664, 4437)]
ROWS = (256 * 198, 577, 1)
OURS = ("triton", "tma")


def type_of(arg) -> str:
    """A launch's argument as a signature of the gate has it."""
    name = lambda tensor: {torch.bfloat16: "bf16", torch.float32: "fp32"}[tensor.dtype]  # noqa: E731
    if arg is None:
        return "None"
    return f"*{name(arg)}" if isinstance(arg, torch.Tensor) else f"tensordesc<{name(arg.base)}{arg.block_shape}>"


@pytest.fixture
def launches(monkeypatch) -> list[tuple]:
    """(kernel, grid, types, constexprs, warps, stages) of the products of ours, which are not run."""
    seen = []

    def launch(kernel, grid, args, constexprs, num_warps, num_stages=1):
        types = tuple(type_of(arg) for arg in args if not isinstance(arg, int))
        seen.append((kernel, grid, types, constexprs, num_warps, num_stages))

    for module in (gemm, gemm_backward):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(column_sums, "add_partial_sums", lambda *args: None)
    return seen


def multiply(epilogue: str, rows: int, channels: int, hidden: int) -> int:
    """The product of an MLP that has this epilogue, under autocast, on tensors without memory. Returns its columns."""

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    if epilogue == "derivative":
        given = empty(rows, channels), empty(channels, hidden), empty(rows, hidden)
        kernels_linear.activation_gradient(*given, "gelu", dbias_dtype=torch.float32)
        return hidden
    if epilogue == "residual":
        given = empty(rows, hidden), empty(channels, hidden), empty(channels)
        stream = dict(gamma=empty(channels, dtype=torch.float32), residual=empty(rows, channels, dtype=torch.float32))
        stream["drop_path_scale"] = empty(1, dtype=torch.float32)
        kernels_linear.linear_forward(*given, **stream, out_dtype=torch.float32)
        return channels
    given = empty(rows, channels), empty(hidden, channels), empty(hidden)
    kernels_linear.linear_forward(*given, activation="gelu", needs_z=epilogue == "activation_z")
    return hidden


def held_by_the_gate(arch: int) -> set[tuple]:
    """Kernel, types, tile, warps and stages of what is compiled ahead of time. A vector of 16 there stands for narrower ones."""
    held = set()
    for row in aot_configs(arch, ("gemm.forward", "gemm.backward")):
        given = [name for name in row.kernel.arg_names if name.endswith(("_ptr", "_desc"))]
        types = tuple(row.signature.get(name, "None") for name in given)
        tile = tuple(row.constexprs[size] for size in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        held.add((row.kernel, types, row.constexprs["ACTIVATION"], *tile, row.num_warps, row.num_stages))
    return held


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_width_takes_a_compiled_configuration_and_covers_its_result(arch, epilogue, launches, monkeypatch):
    monkeypatch.setattr(kernels_linear, "architecture", lambda x: arch)
    monkeypatch.setattr(kernels_linear, "activation_backward", lambda *args, **options: None)
    monkeypatch.setattr(kernels_linear, "activation_forward", lambda *args: None)
    monkeypatch.setattr(kernels_linear, "scale_add_forward", lambda *args: None)
    held = held_by_the_gate(arch)
    for choice in candidates(arch, epilogue):
        for channels, hidden in WIDTHS:
            for rows in ROWS:
                launches.clear()
                with use_gemm(choice.backend, choice.tile):
                    columns = multiply(epilogue, rows, channels, hidden)
                if choice.backend == "tma" and (channels % 8 or hidden % 8):  # rows that are no multiple of 16 bytes
                    assert not launches
                    continue
                ((kernel, (programs,), types, (activation, *sizes), warps, stages),) = launches
                assert (kernel, types, activation, *sizes[:3], warps, stages) in held
                tiles = cdiv(rows, sizes[0]) * cdiv(columns, sizes[1])
                assert programs == tiles if choice.backend == "triton" else 0 < programs <= tiles
                for vector in sizes[3:]:
                    assert vector in (1, 2, 4, 8, 16)
                    assert columns % vector == 0 and (
                        choice.backend == "tma" or channels % vector == hidden % vector == 0
                    )


@pytest.mark.parametrize(
    ("channels", "hidden", "backends"),
    [
        (192, 512, ("cublas", *OURS)),
        (384, 1536, OURS),
        pytest.param(1152, 4304, ("tma",), marks=pytest.mark.long),
        pytest.param(1664, 4437, ("triton",), marks=pytest.mark.long),
    ],
)
def test_real_widths_are_as_accurate_as_eager(channels, hidden, backends):
    """Five rows, which fill no tile; tiles as large as the interpreter likes them, weights that need no pass of their own."""

    def randn(*shape):
        return torch.randn(shape, device=DEVICE)

    def branch(function):
        return lambda x, norm_weight, norm_bias, *layers: function(x, None, norm_weight, norm_bias, 1e-6, *layers)[1]

    layers = randn(hidden, channels) * channels**-0.5, randn(hidden)
    layers += randn(channels, hidden) * hidden**-0.5, randn(channels)
    given = [t.half() for t in (randn(5, channels), 1 + 0.1 * randn(channels), 0.1 * randn(channels), *layers)]
    tile = Tile(16, 1024, 512) if DEVICE.type == "cpu" else None
    pair = [branch(f) for f in (ops.add_layer_norm_mlp, ops.add_layer_norm_mlp_reference)]
    for backend in backends:
        with use_gemm(backend, tile):
            assert_as_accurate_as_eager(*pair, *given)
