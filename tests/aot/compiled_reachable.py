"""Which configurations calls reach: drawn and written down without a GPU. Run by run_checks.py, with kernels to be compiled."""

import random

import torch

from fastdeit import backends, ops
from fastdeit.aot import catalog, reachable


def check_a_launch_is_written_down_as_the_catalog_lists_it():
    """The kernel of a contiguous bf16 qkv is one that ships; of an odd one, another."""
    shipped = {catalog.row_key(row, 90) for row in catalog.aot_configs(90, ("attention.forward",))}
    with torch.no_grad(), reachable.recorded_launches(90) as rows:
        ops.attention(torch.zeros(256, 144, 3 * 64, dtype=torch.bfloat16), 1)
        ops.attention(torch.zeros(256, 144, 3 * 64 + 8, dtype=torch.bfloat16)[..., 1:-7], 1)
    aligned, odd = rows
    assert catalog.row_key(aligned, 90) in shipped and aligned.kernel.__name__ == "attention_forward_descriptor_kernel"
    assert catalog.row_key(odd, 90) not in shipped and odd.unaligned == ("q_ptr", "k_ptr", "v_ptr")


def check_a_sample_is_seeded_and_holds_what_the_catalog_does_not():
    for arch in (86, 90):
        seeded_sample(arch)


def seeded_sample(arch):
    rows = reachable.sample(arch, 6)
    keys = [catalog.row_key(row, arch) for row in rows]
    assert keys == [catalog.row_key(row, arch) for row in reachable.sample(arch, 6)]
    assert len(set(keys)) == 6 and len({row.kernel.__name__ for row in rows}) > 2
    if arch in catalog.ARCHITECTURES:
        assert not set(keys) & {catalog.row_key(row, arch) for row in catalog.aot_configs(arch)}


def check_draws_reach_every_kind_of_call():
    draw, kernels, unaligned, dtypes = random.Random(0), set(), 0, set()
    for _ in range(150):
        for row in reachable.reached(draw, 90):
            kernels.add(row.kernel.__name__)
            unaligned += bool(row.unaligned)
            dtypes |= set(row.signature.values())
    assert {"*fp32", "*fp16", "*bf16", "*i64", "i32"} <= dtypes and unaligned
    for part in ("attention_dq", "attention_dkv", "layer_norm_backward", "activation", "distillation", "patch", "fold"):
        assert any(part in kernel for kernel in kernels), part
    assert backends.why_reference(torch.zeros(1)) == "tensors on cpu"  # as before
