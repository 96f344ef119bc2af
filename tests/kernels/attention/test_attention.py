"""The attention kernels' tables and launchers: pure choices, grids, offsets, and that the gate compiles what is launched."""

import pytest
import torch

from fastdeit import backends, ops
from fastdeit.kernels.attention import backward as attention_backward
from fastdeit.kernels.attention import config as attention_config
from fastdeit.kernels.attention import forward as attention
from fastdeit.kernels.attention.config import HEAD_DIM_SPLITS, one_program_tiles, select_config, tail
from fastdeit.kernels.attention.views import vector_units
from fastdeit.kernels.runtime import architecture
from fastdeit.kernels.runtime.architecture import LIMITS
from fastdeit.ops.attention_op import HEAD_DIMS
from fastdeit.testing import interpreter_active

# (width, heads) of timm's vision transformers, Ti to the giants, and their usual numbers of tokens.
WIDTHS = [
    (192, 3),
    (384, 6),
    (768, 12),
    (1024, 16),
    (1152, 16),
    (1280, 16),
    (1408, 16),
    (1664, 16),
    (1536, 12),
    (384, 8),
]
WIDTHS += [(192, 4), (192, 6), (512, 16), (528, 11), (576, 8), (640, 10), (704, 8), (768, 8), (832, 8), (1536, 16)]
TOKENS = [
    1,
    37,
    50,
    65,
    101,
    145,
    196,
    197,
    198,
    201,
    256,
    257,
    261,
    325,
    442,
    577,
    578,
    730,
    785,
    1025,
    1370,
    2305,
    4096,
]


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_shape_of_timm_has_a_configuration(arch, itemsize):
    for width, heads in WIDTHS:
        head_dim = width // heads
        assert head_dim in HEAD_DIMS
        for tokens in TOKENS:
            for batch in (1, 8, 256):
                for packed in (False, True):
                    shape = (batch, heads, tokens, tokens, head_dim, itemsize, arch, 132, packed)
                    config = select_config(*shape)
                    assert config == select_config.__wrapped__(*shape), "a pure function"
                    for tiles in (config.forward, config.dq, config.dkv):
                        assert (
                            tiles.owned in (32, 64, 128)
                            and tiles.streamed in (16, 32, 64)
                            and tiles.num_warps in (4, 8)
                        )
                    assert not config.descriptors or (90 <= arch < 120 and packed and itemsize == 2)


def test_pieces_cover_every_head_dim_at_the_least_width():
    assert tuple(HEAD_DIM_SPLITS) == HEAD_DIMS
    for head_dim, (main, rest) in HEAD_DIM_SPLITS.items():
        assert head_dim <= main + rest < head_dim + 32
        assert all(piece & (piece - 1) == 0 for piece in (main, rest))


def test_large_grids_on_hopper_take_descriptors_and_small_ones_smaller_tiles():
    large = select_config(256, 12, 197, 197, 64, 2, 90, 132, True)
    small = select_config(1, 3, 197, 197, 64, 2, 90, 132, True)
    assert large.descriptors and large.forward.owned == large.dq.owned == 128 and large.dkv.owned == 64
    assert not small.descriptors and small.forward.owned == 32


@pytest.mark.parametrize(
    "batch, tokens, head_dim, tall",
    [
        (256, 198, 64, True),
        (256, 578, 64, True),
        (256, 257, 64, False),
        (16, 198, 64, True),
        (8, 198, 64, False),
        (256, 198, 80, False),
    ],
)
def test_tiles_of_128_queries_where_they_add_no_rows_and_fill_the_machine(batch, tokens, head_dim, tall):
    config = select_config(batch, 12, tokens, tokens, head_dim, 2, 90, 132, True)
    assert config.descriptors and config.forward.owned == config.dq.owned == (128 if tall else 64)


@pytest.mark.parametrize("fenced", [False, True])
def test_loads_over_pointers_are_copied_asynchronously_only_where_a_fence_follows(fenced, monkeypatch):
    monkeypatch.setattr(architecture, "_copies_are_fenced", lambda: fenced)
    for itemsize in (2, 4):
        config = select_config.__wrapped__(256, 12, 197, 197, 64, itemsize, 90, 132, False)
        assert {t.num_stages for t in (config.forward, config.dq, config.dkv)} == {2 if fenced else 1}
    assert select_config.__wrapped__(256, 12, 197, 197, 64, 2, 80, 108, False).forward.num_stages == 2
    assert select_config.__wrapped__(1, 3, 197, 197, 64, 2, 90, 132, False).forward.num_stages == 2  # mma.sync
    assert select_config.__wrapped__(256, 12, 197, 197, 64, 2, 90, 132, True).forward.num_stages == 2  # bulk copies


def test_triton_3_4_takes_pointers_on_sm_90(monkeypatch):
    """There it does not compile dQ over descriptors. Its catalog has a row for every head dimension that is launched so."""
    monkeypatch.setattr(attention_config, "triton_version", lambda: (3, 4, 0))
    for head_dim in HEAD_DIMS:
        shape = (256, 12, 197, 197, head_dim, 2)
        assert not select_config.__wrapped__(*shape, 90, 132, True).descriptors
        assert select_config.__wrapped__(*shape, 100, 148, True).descriptors
    select_config.cache_clear()
    cases = list(attention_config.aot_cases(90))
    select_config.cache_clear()
    assert not any(case.config.descriptors for case in cases) and {case.head_dim for case in cases} == set(HEAD_DIMS)
    assert len({case.label for case in cases}) == len(cases)


def test_backward_runs_as_two_kernels_until_the_table_says_otherwise(monkeypatch):
    shape = (256, 12, 197, 197, 64, 2, 90, 132, True)
    assert select_config(*shape).one_program is None
    monkeypatch.setitem(attention_config.ONE_PROGRAM_BACKWARD_TOKENS, 90, 256)
    assert select_config.__wrapped__(*shape).one_program == one_program_tiles(197)
    for other in ((256, 12, 577, 577, 64, 2, 90, 132, True), (256, 12, 197, 197, 80, 2, 90, 132, True)):
        assert select_config.__wrapped__(*other).one_program is None


@pytest.mark.parametrize("block", [16, 32, 64])
def test_tail_holds_what_the_full_blocks_leave(block):
    for length in range(1, 4097):
        rest = length - (length - 1) // block * block
        assert 1 <= rest <= tail(length, block) <= max(block, 16)
        assert tail(length, block) < max(2 * rest, 17)


@pytest.mark.parametrize(("tokens", "columns"), [(197, 208), (198, 208), (577, 592), (578, 592), (257, 272), (64, 64)])
def test_columns_computed(tokens, columns):
    assert (tokens - 1) // 64 * 64 + tail(tokens, 64) == columns


def test_vectors_are_as_wide_as_every_stride_allows():
    assert vector_units(2, 64, (0, 192, 64)) == (8, (0, 24, 8))
    assert vector_units(4, 64, (0, 192, 64)) == (4, (0, 48, 16))
    assert vector_units(2, 72, (1000, 201, 64)) == (1, (1000, 201, 64))
    assert vector_units(2, 64, (1000, 196, 64))[0] == 4


# ---- launches, recorded instead of run


@pytest.fixture
def launches(monkeypatch):
    """Every (kernel, grid, arguments, constants) that the launchers launch, on tensors without memory."""
    recorded = []

    def record(kernel, grid, args, constexprs, num_warps, num_stages=1, maxnreg=None):
        assert len(args) + len(constexprs) == len(kernel.arg_names)
        recorded.append((kernel, grid, args, (constexprs, num_warps, num_stages, maxnreg)))

    monkeypatch.setattr(attention, "launch", record)
    monkeypatch.setattr(attention_backward, "launch", record)
    return recorded


def run_both(batch, tokens, heads, head_dim, packed=True):
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    lse = meta(batch, heads, tokens, dtype=torch.float32)
    if packed:
        qkv, out = meta(batch, tokens, 3 * heads * head_dim), meta(batch, tokens, heads * head_dim)
        attention.attention_forward(qkv, heads, 0.125)
        attention_backward.attention_backward(out, qkv, out, lse, heads, 0.125)
    else:
        q = meta(batch, tokens, heads, head_dim)
        attention.attention_qkv_forward(q, q, q, 0.125)
        attention_backward.attention_qkv_backward(q, q, q, q, q, lse, 0.125)


@pytest.mark.parametrize("packed", [True, False])
def test_any_number_of_heads_fits_the_grid(launches, packed):
    run_both(70_000, 198, 3, 64, packed)
    tiles = (2, 2, 4) if packed else (4, 4, 4)  # of 128 or 64 rows
    assert [grid for _, grid, _, _ in launches] == [(count * 70_000 * 3,) for count in tiles]


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("tokens", [197, 577])
@pytest.mark.parametrize("packed", [True, False])
def test_what_deit_launches_is_what_the_gate_compiles(launches, monkeypatch, arch, batch, tokens, packed):
    monkeypatch.setattr(attention, "architecture", lambda _: arch)
    run_both(batch, tokens, 3, 64, packed)
    compiled = {
        (row.kernel.__name__, tuple(row.constexprs.values()), row.num_warps, row.num_stages, row.maxnreg)
        for file in (attention, attention_backward)
        for row in file.aot_configs(arch)
        if "bf16" in row.label
    }
    assert {(kernel.__name__, *options) for kernel, _, _, options in launches} <= compiled


def test_configurations_are_few_and_named_apart():
    rows = [
        (arch, row.kernel.__name__, row.label)
        for arch in (80, 89, 90, 100)
        for file in (attention, attention_backward)
        for row in file.aot_configs(arch)
    ]
    assert len(rows) == len(set(rows)) <= 130


@pytest.mark.skipif(not interpreter_active(), reason="the interpreter reads host memory that nothing has to fill")
def test_samples_past_two_to_the_31_elements():
    """The batch stride fits 32 bits, the third sample's offset does not."""
    stride = 2**30
    memory = torch.empty(2 * stride + 5 * 192, dtype=torch.float16)  # the pages between the samples are never touched
    qkv = memory.as_strided((3, 5, 192), (stride, 192, 1)).copy_(torch.randn(3, 5, 192))
    near = qkv.clone(memory_format=torch.contiguous_format).requires_grad_()
    far = qkv.requires_grad_()
    with backends.use_backend("triton"):
        results = []
        for each in (far, near):
            out = ops.attention(each, 1)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), each)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
