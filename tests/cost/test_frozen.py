"""Costs of frozen models: bytes by hand, launches as the models launch, and the ratios that the design expects."""

import pytest
import timm
import torch

import fastdeit
from fastdeit.cost.frozen import PRECISIONS, PRODUCT_RATES, frozen_parts, product_rate
from fastdeit.cost.models import DEIT, Shape, parts, seconds, total
from fastdeit.testing import fake_cuda

TINY = Shape(channels=8, heads=2, depth=3, tokens=6, prefix_tokens=2, patch_size=4, classes=5)


def named(precision, **options):
    return {part.name: part for part in frozen_parts(TINY, 2, precision, **options)}


def test_an_fp8_block_by_hand():
    """12 rows of 8 channels, 32 hidden ones; of the last block 4 rows."""
    plain, found = named("bf16"), named("fp8", rate=2.0)
    elements = 12 * 8
    saved = {
        "norms and additions": 2 * elements,
        "qkv": elements + 3 * 64,
        "proj": elements + 64,
        "fc1": elements + 8 * 32,
        "activation": 12 * 32,
        "fc2": 12 * 32 + 8 * 32,
        "attention": elements,
        "patch embedding": 0,
        "heads and loss": 0,
        "last block: norms and additions": elements + 4 * 8,
        "last block: qkv": elements + 3 * 64,
        "last block: fc2": 4 * 32 + 8 * 32,
    }
    for name, fewer in saved.items():
        assert plain[name].forward.bytes - found[name].forward.bytes == fewer, name
    assert found["fc1"].forward.flops == plain["fc1"].forward.flops / 2
    assert found["attention"].forward.flops == plain["attention"].forward.flops


def test_an_int8_block_by_hand():
    plain, found = named("bf16"), named("int8", rate=2.0)
    elements = 12 * 8
    assert plain["proj"].forward.bytes - found["proj"].forward.bytes == elements + 64 - 2 * elements  # int32 written
    assert found["scales of proj"].forward.bytes == (4 + 2) * elements
    assert found["activation"].forward.bytes == (4 + 1) * 12 * 32
    assert "scales of fc1" not in found


def test_epilogues_of_both_formats_move_the_same():
    fp8, int8 = named("fp8", epilogues=True), named("int8", epilogues=True)
    assert fp8 == int8 and not any("scales" in name for name in fp8)
    plain = named("bf16", epilogues=True)
    assert plain["fc1"].forward.bytes - fp8["fc1"].forward.bytes == 12 * 8 + 8 * 32 + 12 * 32


@pytest.mark.fake_device
def test_launches_are_those_of_the_models():
    """Beyond those of bf16; counted at a batch whose integer products need no more rows."""
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=64, num_heads=2, depth=3)
    shape, counted, expected = Shape(64, 2, 3, tokens=6), {}, {}
    for precision in PRECISIONS:
        options = {"calibration": [(torch.randn(4, 3, 32, 32), torch.arange(4))]} if precision != "bf16" else {}
        fast = fastdeit.optimize_for_inference(model, precision, cuda_graphs="off", **options).cuda()
        images = torch.zeros(32, 3, 32, 32, device="cuda")
        fast(images)
        with fake_cuda.counting() as counts:
            fast(images)
        counted[precision] = counts["triton_launch"] + counts["gemm"]  # without copies of the prefix tokens
        expected[precision] = total(frozen_parts(shape, 32, precision)).launches
    differences = [{p: found[p] - found["bf16"] for p in PRECISIONS} for found in (counted, expected)]
    assert differences[0] == differences[1] == {"bf16": 0, "fp8": 0, "int8": 3 * 3 + 1}


def test_fp8_around_cublas_reaches_what_is_expected_of_an_h200():
    def ratio(model, precision, **options):
        times = (
            seconds(found, 600e12, 4.3e12)
            for found in (
                parts(DEIT[model], 256, "compile", "bf16", training=False),
                frozen_parts(DEIT[model], 256, precision, **options),
            )
        )
        compiled, ours = times
        return compiled / ours

    assert [ratio(model, "bf16") for model in ("B", "S", "Ti")] == pytest.approx([1.07, 1.06, 1.05], abs=0.006)
    assert [ratio(model, "fp8") for model in ("B", "S", "Ti")] == pytest.approx([1.48, 1.31, 1.19], abs=0.006)
    assert all(ratio(m, "fp8", epilogues=True) > ratio(m, "fp8") > ratio(m, "bf16") for m in ("B", "S", "Ti"))


def test_rates_go_by_the_width():
    assert [product_rate(width) for width in (64, 192, 300, 384, 768, 1024)] == [1.05, 1.05, 1.05, 1.25, 1.45, 1.45]
    assert set(PRODUCT_RATES.values()) == {1.05, 1.25, 1.45}
    with pytest.raises(ValueError, match="precision: expected one of bf16, fp8, int8, got 'fp16'"):
        frozen_parts(TINY, 1, "fp16")
