"""`ops.attention_quantize` and `ops.attention_qkv_quantize`: rounding to the bit, numerics, paths, bad input."""

import dataclasses

import pytest
import torch

from fastdeit import backends, ops, testing
from fastdeit.kernels.attention import config as attention_config
from fastdeit.kernels.attention import forward as kernels
from fastdeit.kernels.attention.config import select_config
from fastdeit.kernels.runtime.architecture import architecture
from fastdeit.testing import assert_close_to_oracle, fake_cuda, interpreter_active, kernel_device
from tests.ops.test_quantization import FINITE, FLOAT8, FORMATS, defined, needs_float8

DEVICE = kernel_device()
BOUND = {FLOAT8: 448.0, torch.int8: 127.0}
SCALE = torch.tensor([0.0625])


@pytest.fixture(params=["pointers", "descriptors"])
def form(request, monkeypatch):
    """The kernel that a GPU with descriptors runs on many samples, whatever runs here."""
    if request.param == "descriptors" and not interpreter_active() and architecture(torch.empty(0, device=DEVICE)) < 90:
        pytest.skip("tensor descriptors need capability 9.0")

    def select(batch, heads, queries, keys, head_dim, itemsize, arch, multiprocessors, describable):
        describable = describable and request.param == "descriptors"
        return select_config(1024, 1, queries, keys, head_dim, 2, 90, 132, describable)

    monkeypatch.setattr(kernels, "select_config", select)
    return request.param


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(DEVICE, dtype)


def close(got, q, k, v, out_scale, dtype):
    """Asserts the contract on 8 bits in steps of the scale, against float64 that is not rounded."""
    plain = ops.attention_qkv_quantize_reference(q, k, v, out_scale, dtype=dtype)
    exact = ops.attention_qkv_reference(*(t.double() for t in (q, k, v))) / out_scale.double()
    assert got.dtype == dtype and got.is_contiguous()
    assert_close_to_oracle("out", got.float(), exact.clamp(-BOUND[dtype], BOUND[dtype]), plain.float())


def attending_to_itself(v, heads):
    """The packed qkv (B, N, 3 * H * D) for v (B, N, H * D), N at most D, of which each token gets its own v exactly."""
    batch, tokens, width = v.shape
    one_hot = 16 * torch.eye(tokens, width // heads, dtype=v.dtype).repeat(batch, 1, heads)
    return torch.cat((one_hot, one_hot, v), 2).to(DEVICE)


@FORMATS
@pytest.mark.parametrize("out_scale", [0.0625, 0.037])
def test_every_bfloat16_is_rounded_as_the_format_defines(dtype, out_scale, form):
    v = torch.cat((FINITE, FINITE[: 2**16 - len(FINITE)])).view(2, 64, 512)
    given = torch.tensor([out_scale], device=DEVICE)
    with backends.use_backend("triton"), testing.poisoned_memory():
        got = ops.attention_quantize(attending_to_itself(v, 8), 8, given, scale=1.0, dtype=dtype)
    assert torch.equal(got.cpu().float(), defined(v.float() * (1 / given.cpu()), dtype))


@FORMATS
@pytest.mark.parametrize("head_dim", [32, 72, 80, 96])
def test_heads_in_two_pieces_and_heads_that_no_descriptor_of_bytes_expresses(head_dim, dtype, form):
    v = 8 * torch.randn(2, 32, 2 * head_dim).bfloat16()
    with backends.use_backend("triton"), testing.poisoned_memory():
        got = ops.attention_quantize(attending_to_itself(v, 2), 2, SCALE.to(DEVICE), scale=1.0, dtype=dtype)
    assert torch.equal(got.cpu().float(), defined(v.float() / SCALE, dtype))


@FORMATS
@pytest.mark.parametrize("tokens", [1, 17, 64, 65, 198])
def test_packed(tokens, dtype, form):
    qkv, given = randn(2 if tokens < 64 else 1, tokens, 3 * 2 * 64), SCALE.to(DEVICE)
    with backends.use_backend("triton"), testing.poisoned_memory():
        got = ops.attention_quantize(qkv, 2, given, dtype=dtype)
    close(got.unflatten(-1, (2, 64)), *qkv.unflatten(-1, (3, 2, 64)).unbind(2), given, dtype)


@FORMATS
@pytest.mark.parametrize("input_dtype", [torch.float16, torch.bfloat16])
def test_queries_of_some_tokens(input_dtype, dtype):
    q = randn(2, 2, 2, 64, dtype=input_dtype)
    k, v = randn(2, 70, 2, 2, 64, dtype=input_dtype).unbind(2)
    given = SCALE.to(DEVICE)
    with backends.use_backend("triton"), testing.poisoned_memory():
        got = ops.attention_qkv_quantize(q, k, v, given, dtype=dtype)
    close(got, q, k, v, given, dtype)


@FORMATS
def test_what_does_not_fit_becomes_the_largest_value(dtype):
    qkv = torch.ones(1, 5, 96, device=DEVICE, dtype=torch.bfloat16)
    qkv[..., 64:80], qkv[..., 80:] = 1e4, -1e4
    with backends.use_backend("triton"):
        got = ops.attention_quantize(qkv, 1, SCALE.to(DEVICE), dtype=dtype).float()
    assert (got[..., :16] == BOUND[dtype]).all() and (got[..., 16:] == -BOUND[dtype]).all()


@needs_float8
def test_a_nan_stays_one_in_float8():
    qkv = randn(1, 5, 96)
    qkv[0, 3, 70] = torch.nan
    with backends.use_backend("triton"):
        got = ops.attention_quantize(qkv, 1, SCALE.to(DEVICE), dtype=FLOAT8).float()
    assert got[..., 6].isnan().all() and got.isnan().sum() == 5


def test_under_autocast_the_low_dtype_is_attended_to():
    qkv, given = randn(1, 9, 96, dtype=torch.float32), SCALE.to(DEVICE)
    separate = qkv.unflatten(-1, (3, 1, 32)).unbind(2)
    with backends.use_backend("triton"):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            got = ops.attention_quantize(qkv, 1, given, dtype=torch.int8)
            got_separate = ops.attention_qkv_quantize(*separate, given, dtype=torch.int8)
        expected = ops.attention_quantize(qkv.bfloat16(), 1, given, dtype=torch.int8)
    assert torch.equal(got, expected) and torch.equal(got_separate.flatten(2), expected)


def test_registered_and_eager_paths_give_the_same_bits(monkeypatch):
    qkv, given = randn(2, 18, 3 * 2 * 32), SCALE.to(DEVICE)
    separate = qkv.unflatten(-1, (3, 2, 32)).unbind(2)

    def run():
        with backends.use_backend("triton"):
            return (
                ops.attention_quantize(qkv, 2, given, dtype=torch.int8),
                ops.attention_qkv_quantize(*separate, given, dtype=torch.int8),
            )

    eager = run()
    assert torch.equal(eager[0], eager[1].flatten(2))
    monkeypatch.setattr(backends, "registered_path", lambda *_: True)
    assert all(torch.equal(a, b) for a, b in zip(eager, run(), strict=True))


def test_registered_ops_pass_opcheck():
    qkv, given = randn(2, 3, 3 * 2 * 32), SCALE.to(DEVICE)
    torch.library.opcheck(torch.ops.fastdeit.attention_quantize, (qkv, 2, given, 0.2, torch.int8))
    q, k, v = (randn(2, 2, 3, 32).transpose(1, 2) for _ in range(3))
    torch.library.opcheck(torch.ops.fastdeit.attention_qkv_quantize, (q, k, v, given, 0.2, torch.int8))


@pytest.mark.skipif(not interpreter_active() and DEVICE.type == "cpu", reason="counts of the PTX machine's launches")
def test_flops_are_counted_as_those_of_attention(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    qkv, given = randn(2, 18, 3 * 2 * 32), SCALE.to(DEVICE)
    separate = qkv.unflatten(-1, (3, 2, 32)).unbind(2)
    with backends.use_backend("triton"):
        for call in (
            lambda: ops.attention_quantize(qkv, 2, given, dtype=torch.int8),
            lambda: ops.attention_qkv_quantize(*separate, given, dtype=torch.int8),
        ):
            with FlopCounterMode(display=False) as counter:
                call()
            assert counter.get_total_flops() == 4 * 2 * 18 * 18 * 64


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_where_the_kernel_does_not_run_attention_and_rescale_do(backend):
    """At head dimension 40 and, on a CPU, at any."""
    with backends.use_backend(backend):
        for head_dim in (40, 64):
            qkv, given = randn(2, 9, 3 * head_dim), SCALE.to(DEVICE)
            if DEVICE.type == "cuda" and head_dim == 64 and backend == "auto":
                continue
            got = ops.attention_quantize(qkv, 1, given, dtype=torch.int8)
            expected = ops.attention_quantize_reference(qkv, 1, given, dtype=torch.int8)
            assert torch.equal(got, expected)
            separate = qkv.unflatten(-1, (3, 1, head_dim)).unbind(2)
            got = ops.attention_qkv_quantize(*separate, given, dtype=torch.int8)
            assert torch.equal(got.flatten(2), expected)


def test_without_keys_the_result_is_that_of_pytorch():
    q, kv = randn(2, 3, 1, 32), randn(2, 0, 1, 32)
    got = ops.attention_qkv_quantize(q, kv, kv, SCALE.to(DEVICE), dtype=torch.int8)
    assert torch.equal(got, ops.attention_qkv_quantize_reference(q, kv, kv, SCALE.to(DEVICE), dtype=torch.int8))


@pytest.mark.parametrize("shape", [(0, 5, 96), (2, 0, 96)])
def test_without_tokens_there_is_nothing(shape):
    qkv = randn(*shape)
    with backends.use_backend("triton"):
        got = ops.attention_quantize(qkv, 1, SCALE.to(DEVICE), dtype=torch.int8)
    assert got.shape == (*shape[:2], 32) and got.dtype == torch.int8


# ---- what is launched


@pytest.mark.fake_device
@pytest.mark.parametrize(
    ("head_dim", "kernel"),
    [(64, "attention_forward_descriptor_kernel"), (72, "attention_forward_kernel")],
)
def test_one_kernel_writes_bytes(head_dim, kernel):
    qkv = torch.zeros(64, 198, 3 * 3 * head_dim, dtype=torch.bfloat16, device="cuda")
    given = torch.ones(1, device="cuda")
    for _ in range(2):  # the first call compiles, the second takes the direct way
        with fake_cuda.record("triton_launch") as launched:
            out = ops.attention_quantize(qkv, 3, given, dtype=FLOAT8)
    assert [each.name for each in launched] == [kernel]
    maps = [fake_cuda.tensor_map(a) for a in launched[0].arguments if len(a) == 128]
    if head_dim == 64:
        assert maps[-1].address == out.data_ptr() and maps[-1].strides == (198 * 192, 64, 192)


@pytest.mark.fake_device
def test_what_was_measured_slower_is_left_to_pytorch(monkeypatch):
    qkv, given = torch.zeros(2, 198, 192, dtype=torch.bfloat16, device="cuda"), torch.ones(1, device="cuda")
    around = dataclasses.replace(attention_config.around(64, 198, 2, False), gradients=torch.is_grad_enabled())
    monkeypatch.setattr(attention_config, "SDPA_PREFERRED", {90: (around,)})
    with fake_cuda.record("triton_launch") as launched:
        ops.attention_quantize(qkv, 1, given, dtype=FLOAT8)
    assert [each.name for each in launched] == ["rescale_kernel"]


# ---- bad input

QKV, HEADS = torch.ones(2, 3, 96), torch.ones(2, 3, 1, 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(dtype=torch.uint8), TypeError, r"dtype: expected one of .*, got torch\.uint8"),
        (dict(dtype=None), TypeError, "dtype: expected one of .*, got None"),
        (dict(out_scale=0.1), TypeError, "out_scale: expected a float32 tensor, got float"),
        (dict(out_scale=None), TypeError, "out_scale: expected a float32 tensor, got NoneType"),
        (dict(out_scale=torch.ones(3)), ValueError, r"out_scale: expected shape \(1,\), got \(3,\)"),
        (dict(out_scale=torch.ones(1, device="meta")), ValueError, "out_scale: expected device cpu, got meta"),
        (dict(scale=torch.inf), ValueError, "scale: expected a finite number"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = dict(out_scale=torch.ones(1), dtype=torch.int8)
    for op, given in (
        (ops.attention_quantize, dict(qkv=QKV, num_heads=1)),
        (ops.attention_qkv_quantize, dict(q=HEADS, k=HEADS, v=HEADS)),
    ):
        op(**given, **good)
        with pytest.raises(error, match=message):
            op(**given, **good | change)


def test_inputs_are_checked_as_those_of_attention():
    options = dict(out_scale=torch.ones(1), dtype=torch.int8)
    with pytest.raises(ValueError, match="qkv: expected a last dimension 3 \\* H \\* D"):
        ops.attention_quantize(QKV, 5, **options)
    with pytest.raises(ValueError, match="v: expected the shape of k"):
        ops.attention_qkv_quantize(HEADS, HEADS, HEADS[:, :2], **options)
