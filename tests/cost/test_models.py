"""Whole-model costs against PyTorch's own counts, counts by hand, and figures worked out elsewhere."""

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastdeit.cost import formulas as costs
from fastdeit.cost.models import (
    DEIT,
    EXECUTIONS,
    PRECISIONS,
    Shape,
    part_seconds,
    parts,
    seconds,
    total,
    training_flops_per_image,
)

TINY = Shape(channels=8, heads=2, depth=3, tokens=6, prefix_tokens=2, patch_size=4, classes=5)


def named(found):
    return {part.name: part for part in found}


def timms(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize(
    "name, shape, size",
    [
        ("deit_tiny_distilled_patch16_224", DEIT["Ti"], 224),
        ("deit_small_distilled_patch16_224", DEIT["S"], 224),
        ("deit_base_distilled_patch16_384", DEIT["B"].at(384), 384),
        ("deit3_large_patch16_224", Shape(1024, 16, 24, tokens=197, prefix_tokens=1, classifiers=1), 224),
    ],
)
def test_matrix_arithmetic_is_what_pytorch_counts(name, shape, size):
    model = timms(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(2, 3, size, size, device="meta"))
    ours = total(parts(shape, 2, "eager", training=False))
    assert ours.flops == counter.get_total_flops()


def test_training_is_three_times_a_forward_pass():
    forward = total(parts(TINY, 1, "eager", training=False)).flops
    assert training_flops_per_image(TINY) == 3 * forward


FREE = {"view", "_unsafe_view", "t", "transpose", "unbind", "select", "permute", "reshape", "expand", "detach", "empty"}


class Launches(TorchDispatchMode):
    """Counts operations that compute; views and allocations launch nothing."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in FREE
        return function(*args, **(kwargs or {}))


def test_an_eager_block_launches_what_the_formula_says():
    block = timm.create_model("deit_tiny_distilled_patch16_224", depth=1).blocks[0].bfloat16().eval()
    x = torch.zeros(1, 198, 192, dtype=torch.bfloat16)
    with torch.no_grad(), Launches() as launches:
        block(x)
    outside = ("patch embedding", "heads and loss")
    found = [p for p in parts(DEIT["Ti"], 1, "eager", "bf16", training=False) if p.name not in outside]
    assert launches.count == sum(part.forward.launches for part in found)


def test_a_linear_layer_by_hand():
    """12 rows of 8 channels to 24: 2 bytes an element, weight gradients of 4."""
    qkv = named(parts(TINY, 2, "eager", training=True))["qkv"]
    rows, inputs, outputs = 2 * 6, 8, 24
    assert qkv.forward == costs.Cost(
        2 * rows * inputs * outputs, 2 * rows * (inputs + outputs) + 2 * inputs * outputs, 1
    )
    assert qkv.backward.flops == 2 * qkv.forward.flops
    bias = 2 * rows * outputs
    assert qkv.backward.bytes == 2 * 2 * rows * (inputs + outputs) + (2 + 2 + 4) * inputs * outputs + bias
    assert qkv.count == 3


@pytest.mark.parametrize(
    "execution, precision, forward, backward",
    [("eager", "amp", 56, 96), ("eager", "bf16", 28, 40), ("compile", "amp", 24, 44), ("fastdeit", "amp", 24, 28)],
)
def test_pointwise_bytes_of_a_block_by_hand(execution, precision, forward, backward):
    part = named(parts(TINY, 2, execution, precision, training=True))["norms and additions"]
    elements = 2 * 6 * 8
    assert (part.forward.bytes, part.backward.bytes) == (forward * elements, backward * elements)


def test_attention_at_its_best_is_the_ops_own_cost():
    mine = named(parts(DEIT["B"].at(224), 256, "epilogues", training=True))["attention"]
    assert mine.forward == costs.attention_forward(256, 198, 12, 64)
    least = costs.attention_backward(256, 198, 12, 64)
    assert (mine.backward.flops, mine.backward.bytes) == (least.flops, least.bytes)


def test_attentions_gradient_as_it_ships_is_two_kernels():
    """Scores and their gradient twice: seven products; q, k, v and the output's gradient twice (16), output (2), result (6)."""
    forward, backward = (
        getattr(named(parts(TINY, 2, "fastdeit", training=True))["attention"], k) for k in ("forward", "backward")
    )
    elements, lse = 2 * 6 * 8, 4 * 2 * 2 * 6
    assert backward == costs.Cost(7 * forward.flops // 2, (8 + 2 + 2 + 8 + 4) * elements + lse, 2)


def test_the_last_block_still_reads_keys_and_values_of_all_tokens():
    """Two queries of six: keys and values (4 bytes) of all, queries and output (4) of two; a product for each."""
    found = named(parts(TINY, 2, "fastdeit", training=False))
    all_, few = 2 * 6 * 8, 2 * 2 * 8
    assert found["last block: attention"].forward.bytes == 4 * all_ + 4 * few
    keys_values = (2 + 4) * all_ + 2 * 8 * 16
    query = (2 + 2) * few + 2 * 8 * 8
    assert found["last block: qkv"].forward.bytes == keys_values + query
    assert found["last block: qkv"].forward.launches == 2
    assert found["last block: fc1"].forward.bytes == (2 + 8) * few + 2 * 8 * 32


@pytest.mark.parametrize(("precision", "out", "copy"), [("amp", 4, 0), ("bf16", 2, 4)])
def test_the_embedding_by_hand(precision, out, copy):
    """2 images of 4 patches and 2 prefix tokens of 8 channels: the product, one kernel from it to the tokens, and one back."""
    part = named(parts(TINY, 2, "fastdeit", precision, training=True))["patch embedding"]
    pixels, tokens = 3 * TINY.patch_size**2, 2 * 6 * 8
    product = 2 * (2 * 4) * (pixels + 8)
    assert part.forward.bytes == product + copy * (2 * 4) * pixels + (2 + out) * tokens
    assert part.backward.bytes == product + (out + 2) * tokens
    assert part.forward.flops == part.backward.flops == 2 * (2 * 4) * pixels * 8


def test_attention_forward_of_deit_b_moves_311_megabytes():
    cost = costs.attention_forward(256, 197, 12, 64, keep_lse=False)
    assert round(cost.bytes / 1e6) == 310 and round(cost.flops / 1e9, 1) == 30.5


# Thousands of images a second at 600 TFLOP/s and 4.3 TB/s, batches of 256 at 224 pixels, from an independent accounting.
KNOWN = {
    ("Ti", False, "eager", "amp"): 87,
    ("Ti", False, "eager", "bf16"): 118,
    ("S", False, "eager", "amp"): 33.7,
    ("S", False, "eager", "bf16"): 42.3,
    ("B", False, "eager", "amp"): 11.5,
    ("B", False, "eager", "bf16"): 13.3,
    ("Ti", True, "eager", "amp"): 26.3,
    ("Ti", True, "eager", "bf16"): 34.4,
    ("S", True, "eager", "amp"): 10.7,
    ("S", True, "eager", "bf16"): 13.3,
    ("B", True, "eager", "amp"): 3.70,
    ("B", True, "eager", "bf16"): 4.27,
}


@pytest.mark.parametrize("key", KNOWN, ids=lambda key: f"{key[0]}-{'training' if key[1] else 'inference'}-{key[3]}")
def test_eager_rooflines_agree_with_an_independent_accounting(key):
    model, training, execution, precision = key
    found = parts(DEIT[model], 256, execution, precision, training=training)
    assert 256 / seconds(found, 600e12, 4.3e12) / 1e3 == pytest.approx(KNOWN[key], rel=0.01)


def test_prefix_tokens_alone_in_the_last_block_save_seven_percent():
    """Of DeiT-B's arithmetic 6.9%: all of one block in twelve but its keys and values."""
    whole = total(parts(DEIT["B"], 1, "eager", "bf16", training=False)).flops
    pruned = total(parts(DEIT["B"], 1, "fastdeit", "bf16", training=False)).flops
    assert 1 - pruned / whole == pytest.approx(0.069, abs=0.002)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", DEIT)
def test_each_fusion_moves_less(model, precision, training):
    found = [total(parts(DEIT[model], 64, execution, precision, training=training)) for execution in EXECUTIONS]
    assert found[0].bytes > found[1].bytes > found[2].bytes > found[3].bytes
    assert found[0].launches > max(cost.launches for cost in found[1:])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_forward_pass_has_no_backward(execution):
    assert all(part.backward == costs.Cost(0, 0, 0) for part in parts(TINY, 2, execution, training=False))


def test_a_part_takes_the_longer_of_arithmetic_and_traffic():
    qkv = named(parts(DEIT["B"], 256, "eager", training=False))["qkv"]
    assert part_seconds(qkv, 1e12, 1e30) == pytest.approx(12 * qkv.forward.flops / 1e12)
    assert part_seconds(qkv, 1e30, 1e12) == pytest.approx(12 * qkv.forward.bytes / 1e12)
    norms = named(parts(DEIT["B"], 256, "eager", training=False))["norms and additions"]
    assert part_seconds(norms, 1.0, 1e12) == pytest.approx(12 * norms.forward.bytes / 1e12)  # no matrix arithmetic


@pytest.mark.parametrize("options", [dict(execution="fast"), dict(execution="eager", precision="fp16")])
def test_what_is_not_there_is_named(options):
    with pytest.raises(ValueError, match="expected one of"):
        parts(TINY, 1, training=False, **options)
