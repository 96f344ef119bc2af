"""What attention's launchers hand to the CUDA driver."""

import functools

import pytest
import torch

from fastdeit.kernels.attention.backward import attention_backward, attention_qkv_backward
from fastdeit.kernels.attention.config import select_config
from fastdeit.kernels.attention.forward import attention_forward, attention_qkv_forward
from fastdeit.testing.fake_cuda import record as record_events
from fastdeit.testing.fake_cuda import tensor_map

pytestmark = pytest.mark.fake_device
record = functools.partial(record_events, "triton_launch")

BATCH, TOKENS, HEADS = 2, 198, 3


def packed(head_dim, descriptors):
    qkv = torch.zeros(BATCH, TOKENS, 3 * HEADS * head_dim, dtype=torch.bfloat16, device="cuda")
    config = select_config(1024, HEADS, TOKENS, TOKENS, head_dim, 2, 90, 132, descriptors)
    assert config.descriptors == descriptors
    return qkv, config


def launches_of(head_dim, descriptors):
    qkv, config = packed(head_dim, descriptors)
    for _ in range(2):  # the first call compiles, the second takes the direct way
        with record() as launches:
            out, lse = attention_forward(qkv, HEADS, 0.125, config)
            dqkv = attention_backward(out, qkv, out, lse, HEADS, 0.125, config)
    return qkv, out, dqkv, launches


def test_descriptors_show_heads_tokens_and_columns():
    qkv, out, _, (launched, *_) = launches_of(64, True)
    assert launched.name == "attention_forward_descriptor_kernel"
    assert launched.grid == (2 * BATCH * HEADS, 1, 1)
    maps = [tensor_map(a) for a in launched.arguments if len(a) == 128]
    assert [m.address for m in maps] == [qkv.data_ptr()] * 3 + [out.data_ptr()]
    assert [m.shape for m in maps] == [(BATCH, 3 * HEADS, TOKENS, 64)] * 3 + [(BATCH, HEADS, TOKENS, 64)]
    assert [m.box for m in maps] == [(1, 1, 128, 64), (1, 1, 64, 64), (1, 1, 16, 64), (1, 1, 128, 64)]
    width = 3 * HEADS * 64 * 2
    assert [m.strides for m in maps[:3]] == [(TOKENS * width, 128, width)] * 3


def test_backward_writes_the_packed_gradient_in_place():
    _, _, dqkv, launched = launches_of(64, True)
    dq, dkv = launched[1:]
    assert [dq.name, dkv.name] == [
        "attention_dq_backward_descriptor_kernel",
        "attention_dkv_backward_descriptor_kernel",
    ]
    for each in (dq, dkv):
        assert dqkv.data_ptr() in [tensor_map(a).address for a in each.arguments if len(a) == 128]


def test_a_head_dim_in_two_pieces_has_two_descriptors_a_tile():
    *_, launched = launches_of(80, True)
    boxes = [tensor_map(a).box[-1] for a in launched[0].arguments if len(a) == 128]
    assert boxes == [64, 16] * 4


def test_pointers_launch_forward_and_backward():
    *_, launched = launches_of(64, False)
    names = ["attention_forward_kernel", "attention_dq_backward_kernel", "attention_dkv_backward_kernel"]
    assert [each.name for each in launched] == names


def test_separate_inputs_launch_forward_and_backward():
    q = torch.zeros(BATCH, HEADS, TOKENS, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    with record() as launched:
        out, lse = attention_qkv_forward(q, q, q, 0.125)
        attention_qkv_backward(out, q, q, q, out, lse, 0.125, key_value_grads=False)
    assert [each.name for each in launched] == ["attention_forward_kernel", "attention_dq_backward_kernel"]
