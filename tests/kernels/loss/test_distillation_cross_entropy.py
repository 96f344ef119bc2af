"""The distillation loss's kernels: configurations, the teacher's label, what forward keeps, and how rows are loaded."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from fastdeit.kernels.loss import distillation_cross_entropy as kernels
from fastdeit.testing import kernel_device, poisoned_memory

DEVICE = kernel_device()
INF, NAN = float("inf"), float("nan")


def forward(logits, dist_logits, target, teacher, kind="hard", base="cross_entropy", tau=1.0, reduction="mean"):
    options = (kind, base, 0.5, tau, 0.0, "numel", reduction)
    with poisoned_memory():
        return kernels.distillation_cross_entropy_forward(logits, dist_logits, target, teacher, *options, torch.float32)


@pytest.mark.parametrize("classes", [1, 2, 10, 1000, 1024, 1025, 2048, 2049, 21841, 30000])
def test_a_thread_holds_at_most_eight_classes_of_a_row(classes):
    config = kernels.select_config(classes)
    assert config.block >= min(classes, 2048)
    assert config.block <= 8 * 32 * config.num_warps or config.num_warps == 1
    assert config.num_warps <= 8


@pytest.mark.parametrize("classes", [1, 10, 1000, 2048, 2049, 21841])
def test_a_block_is_no_longer_than_it_must_be(classes):
    block = kernels.select_config(classes).block
    assert block == 2048 or block // 2 < classes


def label_of(teacher):
    rows, classes = teacher.shape
    target = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    logits = torch.zeros(rows, classes, device=DEVICE)
    _, _, labels = forward(logits, logits.clone(), target, teacher)
    return labels.tolist()


ROWS = {
    "a tie": [1.0, 5.0, 5.0, 5.0, 2.0],
    "all equal": [3.0] * 5,
    "negative": [-4.0, -2.0, -3.0, -2.0, -9.0],
    "zeros of both signs": [-1.0, -0.0, 0.0, -0.0, -1.0],
    "zeros of both signs, the positive first": [-1.0, 0.0, -0.0, 0.0, -1.0],
    "a NaN": [1.0, 9.0, NAN, 2.0, NAN],
    "a NaN beside infinity": [INF, 9.0, 1.0, NAN, INF],
    "a NaN with its sign set": [1.0, 9.0, 1.0, -NAN, 0.0],
    "infinities": [-INF, 1.0, INF, INF, 3.0],
    "minus infinity alone": [-INF] * 5,
    "the last": [-INF, -INF, -INF, -INF, -1e38],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_teachers_label_is_torch_argmax(dtype):
    teacher = torch.tensor(list(ROWS.values()), device=DEVICE).to(dtype)
    assert dict(zip(ROWS, label_of(teacher), strict=True)) == dict(zip(ROWS, teacher.argmax(1).tolist(), strict=True))


@pytest.mark.parametrize("repeats", [2, 3])
def test_the_first_of_equal_maxima_wins_across_blocks(repeats):
    teacher = torch.randn(2, 2048, device=DEVICE).repeat(1, repeats)
    assert label_of(teacher) == teacher[:, :2048].argmax(1).tolist()


def test_a_nan_in_the_last_block_is_the_teachers_label():
    teacher = torch.randn(1, 5000, device=DEVICE)
    teacher[0, 10], teacher[0, 4321], teacher[0, 4400] = INF, NAN, NAN
    assert label_of(teacher) == [4321]


def test_out_of_range_labels_are_marked_for_backward():
    logits, target = torch.randn(3, 7, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    *_, labels = forward(logits, logits.clone(), target, torch.tensor([6, 7, -3], device=DEVICE))
    assert labels.tolist() == [6, -1, -1]


@pytest.mark.parametrize("classes", [24, 5000])
def test_forward_keeps_maxima_log_sums_and_the_targets_mass(classes):
    z, d, t = 3 * torch.randn(3, 2, classes, device=DEVICE)
    y = torch.rand(2, classes, device=DEVICE)
    _, statistics, _ = forward(z, d, y, t, kind="soft", tau=2.0)
    expected = []
    for x, tau in ((z, 1.0), (d, 2.0), (t, 2.0)):
        maximum = x.amax(1)
        expected += [maximum, ((x - maximum[:, None]) / tau).exp().sum(1).log()]
    expected.insert(2, y.sum(1))
    torch.testing.assert_close(statistics, torch.stack(expected, dim=1))


def test_rows_far_into_a_buffer_past_two_to_the_31_elements():
    """Row offsets are 64-bit: a stride of 2^30 elements, of memory that is reserved and never touched but in three rows."""
    stride, classes = 2**30, 8
    try:
        buffer = torch.empty(2 * stride + classes, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4 GB cannot be reserved here")
    logits = buffer.as_strided((3, classes), (stride, 1))
    logits.copy_(torch.randn(3, classes))
    target = torch.tensor([1, 2, 3], device=DEVICE)
    got, _, _ = forward(logits, None, target, None, kind="none", reduction="none")
    expected, _, _ = forward(logits.contiguous(), None, target, None, kind="none", reduction="none")
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("classes", "strides", "vector"),
    [(1000, (1000,), 8), (1024, (1024,), 16), (1000, (1002,), 2), (1000, (1001,), 1), (21841, (21841,), 1)],
)
def test_the_vector_width_divides_classes_and_strides(classes, strides, vector):
    tensors = [torch.empty(0).as_strided((2, 0), (stride, 1)) for stride in strides]
    assert kernels._vector(classes, *tensors) == vector


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_shipped_configurations_are_those_the_launchers_choose(arch):
    rows = list(kernels.aot_configs(arch))
    assert 4 * len(rows) <= 60
    for row in rows:
        if "C" in row.constexprs:
            config = kernels.select_config(row.constexprs["C"])
            assert (row.constexprs["BLOCK"], row.num_warps) == (config.block, config.num_warps)
        arguments = set(row.signature) | set(row.constexprs)
        absent = [name for name in row.kernel.arg_names if name not in arguments]
        assert arguments <= set(row.kernel.arg_names) and all(name.endswith("_ptr") for name in absent)


def test_rows_of_a_thousand_classes_are_loaded_and_stored_16_bytes_at_a_time():
    """An alignment hint on a stride is lost when the helper that gives it is inlined; one on the offset is not."""
    program = """
        import re
        from fastdeit.aot import catalog
        from fastdeit.kernels.loss import distillation_cross_entropy as kernels
        for row in list(kernels.aot_configs(90))[:2]:
            ptx = catalog.compile_binary(row, 90).asm["ptx"]
            print(len(re.findall(r"(?:ld|st)\\.global\\.v4\\.b32", ptx)), len(re.findall(r"(?:ld|st)\\.global\\.b16", ptx)))
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wide, narrow), (wide_backward, narrow_backward) = (map(int, line.split()) for line in done.stdout.splitlines())
    # bf16 logits of both heads and teacher and fp32 targets, and the one logit of the label; then two heads, targets, two gradients
    assert (wide, narrow) == (5, 1) and (wide_backward, narrow_backward) == (6, 0)
