"""What attention's launchers hand to the CUDA driver. Run by run_checks.py over the stand-in for the driver."""

import time
from unittest import mock

import torch

from fastdeit.aot.stub_driver import driver
from fastdeit.aot.stub_driver.driver import record, tensor_map
from fastdeit.kernels.attention import backward as backward_file
from fastdeit.kernels.attention import forward as forward_file
from fastdeit.kernels.attention.backward import attention_backward, attention_qkv_backward
from fastdeit.kernels.attention.config import select_config
from fastdeit.kernels.attention.forward import attention_forward, attention_qkv_forward
from fastdeit.kernels.runtime.launch import launch

driver.activate()
BUDGETS = {False: 8.0, True: 15.0}  # microseconds a launch on a quiet machine, without and with descriptors
GENEROUS = 5

BATCH, TOKENS, HEADS = 2, 198, 3


def packed(head_dim, descriptors):
    qkv = torch.zeros(BATCH, TOKENS, 3 * HEADS * head_dim, dtype=torch.bfloat16)
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


def check_descriptors_show_heads_tokens_and_columns():
    qkv, out, _, (launched, *_) = launches_of(64, True)
    assert launched.kernel == "attention_forward_descriptor_kernel"
    assert launched.grid == (4 * BATCH * HEADS, 1, 1)
    maps = [tensor_map(a) for a in launched.arguments if len(a) == 128]
    assert [m.address for m in maps] == [qkv.data_ptr()] * 3 + [out.data_ptr()]
    assert [m.shape for m in maps] == [(BATCH, 3 * HEADS, TOKENS, 64)] * 3 + [(BATCH, HEADS, TOKENS, 64)]
    assert [m.box for m in maps] == [(1, 1, 64, 64), (1, 1, 64, 64), (1, 1, 16, 64), (1, 1, 64, 64)]
    width = 3 * HEADS * 64 * 2
    assert [m.strides for m in maps[:3]] == [(TOKENS * width, 128, width)] * 3


def check_backward_writes_the_packed_gradient_in_place():
    _, _, dqkv, launched = launches_of(64, True)
    dq, dkv = launched[1:]
    assert [dq.kernel, dkv.kernel] == [
        "attention_dq_backward_descriptor_kernel",
        "attention_dkv_backward_descriptor_kernel",
    ]
    for each in (dq, dkv):
        assert dqkv.data_ptr() in [tensor_map(a).address for a in each.arguments if len(a) == 128]


def check_a_head_dim_in_two_pieces_has_two_descriptors_a_tile():
    *_, launched = launches_of(80, True)
    boxes = [tensor_map(a).box[-1] for a in launched[0].arguments if len(a) == 128]
    assert boxes == [64, 16] * 4


def check_pointers_launch_forward_and_backward():
    *_, launched = launches_of(64, False)
    names = ["attention_forward_kernel", "attention_dq_backward_kernel", "attention_dkv_backward_kernel"]
    assert [each.kernel for each in launched] == names


def check_separate_inputs_launch_forward_and_backward():
    q = torch.zeros(BATCH, HEADS, TOKENS, 64, dtype=torch.bfloat16).transpose(1, 2)
    with record() as launched:
        out, lse = attention_qkv_forward(q, q, q, 0.125)
        attention_qkv_backward(out, q, q, q, out, lse, 0.125, keys_wanted=False)
    assert [each.kernel for each in launched] == ["attention_forward_kernel", "attention_dq_backward_kernel"]


def check_the_host_cost_of_a_launch_is_near_its_budget():
    for descriptors, budget in BUDGETS.items():
        qkv, config = packed(64, descriptors)
        kept = []
        with (
            mock.patch.object(forward_file, "launch", lambda *args, kept=kept: kept.append(args)),
            mock.patch.object(backward_file, "launch", lambda *args, kept=kept: kept.append(args)),
        ):
            out, lse = attention_forward(qkv, HEADS, 0.125, config)
            attention_backward(out, qkv, out, lse, HEADS, 0.125, config)
        assert len(kept) == 3
        for arguments in kept:
            cost = least_microseconds(lambda arguments=arguments: launch(*arguments))
            assert cost <= GENEROUS * budget, f"{arguments[0]}: {cost:.1f} us of processor time, budget {budget}"


def least_microseconds(call):
    """Processor time, so that other processes do not count."""
    for _ in range(20):
        call()
    runs = []
    for _ in range(10):
        start = time.process_time()
        for _ in range(100):
            call()
        runs.append(time.process_time() - start)
    return min(runs) / 100 * 1e6
