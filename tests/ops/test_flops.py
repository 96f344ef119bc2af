"""What PyTorch's FLOP counter counts of ops: the products that they make, by their formulas as one by one."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdeit import ops
from fastdeit.benchmarks.report.block_counts import kernels_left_out

B, N, C, H = 4, 6, 64, 128
X, ROWS, COLUMNS, SQUARE = (B, N, C), (C,), (H, C), (C, C)
SLOTS = dict(slots=torch.tensor([2, 0, 3, 1]), kept=3)
MLP = dict(w1=COLUMNS, b1=(H,), w2=(C, H), b2=ROWS)
ATTENTION = dict(qkv_weight=(3 * C, C), qkv_bias=(3 * C,), proj_weight=SQUARE, proj_bias=ROWS)
NORM = dict(x=X, branch=X, norm_weight=ROWS, norm_bias=ROWS)
ALL_SETS = 64  # of inputs that need gradients, from the 2^n there are; the last is that of all


def attention_branch(x, branch, g, b, *weights, **options):
    return ops.add_layer_norm_attention(x, branch, g, b, 1e-6, *weights, 2, **options)[1]


def mlp_branch(x, branch, g, b, *weights, **options):
    return ops.add_layer_norm_mlp(x, branch, g, b, 1e-6, *weights, **options)[1]


CASES = {
    "linear": (ops.linear, dict(x=X, weight=COLUMNS, bias=(H,)), {}),
    "linear, activated": (ops.linear, dict(x=X, weight=COLUMNS, bias=(H,), gamma=(H,)), dict(activation="gelu")),
    "linear, scaled": (ops.linear, dict(x=X, weight=COLUMNS, bias=(H,), gamma=(H,)), {}),
    "mlp": (ops.mlp, dict(x=X) | MLP, {}),
    "patches": (ops.patch_embedding, dict(images=(2, 3, 32, 32), weight=(C, 3, 8, 8), bias=ROWS), {}),
    "mlp branch": (mlp_branch, NORM | MLP | dict(gamma=ROWS), {}),
    "mlp branch, lean": (mlp_branch, NORM | MLP, dict(recompute="preactivation")),
    "mlp branch, subset": (mlp_branch, NORM | MLP, SLOTS),
    "attention branch": (attention_branch, NORM | ATTENTION | dict(gamma=ROWS), {}),
    "attention branch, subset": (attention_branch, NORM | ATTENTION, SLOTS),
}


def counted(op, tensors, options, precision, registered):
    """FLOPs of forward and backward; of attention's kernel only where the op is the registered one."""
    given = dict(tensors)
    keyword = {name: given.pop(name) for name in ("gamma",) if name in given}
    with kernels_left_out(registered=registered), FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp"):
            out = op(*given.values(), **keyword, **options)
        out.backward(torch.ones_like(out))
    return counter.get_total_flops()


@pytest.mark.parametrize("precision", ["amp", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_formulas_count_the_products_that_are_made(case, precision):
    op, shapes, options = CASES[case]
    dtype = torch.float32 if precision == "amp" else torch.bfloat16
    sets = [set(chosen) for n in range(1, len(shapes) + 1) for chosen in itertools.combinations(shapes, n)]
    step = -(-len(sets) // ALL_SETS)
    for needs in sets[::-step]:
        tensors = {name: torch.zeros(shape, dtype=dtype, requires_grad=name in needs) for name, shape in shapes.items()}
        expected = counted(op, tensors, options, precision, registered=False)
        if "attention" in case:
            kept = options.get("kept", B)
            beyond = needs & {"x", "branch", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias"}
            expected += (14 if beyond else 4) * kept * N * N * C
        assert counted(op, tensors, options, precision, registered=True) == expected > 0, needs
