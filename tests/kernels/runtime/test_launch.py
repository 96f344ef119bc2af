"""What reaches the CUDA driver, and through which path."""

import contextlib
import dataclasses
import functools
import struct
from unittest import mock

import pytest
import timm
import torch
import triton
import triton.language as tl
from triton.knobs import runtime
from triton.tools.tensor_descriptor import TensorDescriptor

import fastdeit
from fastdeit.kernels.gemm import fused_mlp
from fastdeit.kernels.norm.layer_norm import layer_norm_backward, layer_norm_forward, layer_norm_forward_kernel
from fastdeit.kernels.runtime import launch as path
from fastdeit.kernels.runtime.launch import descriptor, launch
from fastdeit.kernels.runtime.refusal import KernelRefused
from fastdeit.testing.fake_cuda import record as record_events
from fastdeit.testing.fake_cuda import tensor_map

pytestmark = [
    pytest.mark.fake_device,
    pytest.mark.skipif(not path._DIRECT, reason=f"launches are direct on Triton {path._TESTED_VERSIONS} only"),
]
refuses = pytest.mark.fake_device(refusals=True)
zeros = functools.partial(torch.zeros, device="cuda")
record = functools.partial(record_events, "triton_launch")


@triton.jit(do_not_specialize=["n", "wide"])
def arguments_kernel(first_ptr, n, scale, absent_ptr, wide, last_ptr, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(first_ptr + i, i < n, other=0.0) * scale
    if absent_ptr is not None:
        x += tl.load(absent_ptr + i, i < n, other=0.0)
    tl.store(last_ptr + i, x + wide, i < n)


@triton.jit
def descriptor_kernel(x_desc, y_desc, ROWS: tl.constexpr):
    y_desc.store([0, tl.program_id(0) * ROWS, 0], x_desc.load([0, tl.program_id(0) * ROWS, 0]))


@triton.jit
def optional_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if a_ptr is not None:
        tl.store(out_ptr + i, tl.load(a_ptr + i))
    if b_ptr is not None:
        tl.store(out_ptr + i, -tl.load(b_ptr + i))


@functools.cache
def buffer(name):
    return zeros(256)


def launch_arguments(x=None, n=198, scale=0.5, absent=None, wide=7, y=None, grid=(3,)):
    x, y = (buffer(name) if t is None else t for name, t in (("x", x), ("y", y)))
    launch(arguments_kernel, grid, (x, n, scale, absent, wide, y), (64, True), 2)


@contextlib.contextmanager
def public_launches():
    """Counts the launches that take Triton's public way: first ones, and all where the direct call is not possible."""
    with mock.patch.object(path, "_launch_publicly", wraps=path._launch_publicly) as counter:
        yield counter


def raises(function, *args) -> str:
    try:
        function(*args)
    except Exception as error:
        return str(error)
    raise AssertionError("nothing was raised")


def pointer(t: torch.Tensor) -> bytes:
    return struct.pack("Q", t.data_ptr())


def test_arguments_arrive_in_the_order_of_the_signature():
    launch_arguments()
    with record() as launches:
        launch_arguments()
    (seen,) = launches
    scratch = (bytes(8), bytes(8))  # two pointers that Triton adds, unused here
    numbers = (struct.pack("i", 198), struct.pack("f", 0.5), struct.pack("i", 7))
    assert seen.arguments == (pointer(buffer("x")), *numbers, pointer(buffer("y")), *scratch), seen
    assert (seen.name, seen.grid, seen.block) == ("arguments_kernel", (3, 1, 1), (64, 1, 1))


def test_a_direct_launch_equals_the_public_one():
    x, weight = zeros(2, 198, 192), torch.ones(192, device="cuda")
    y, mean, rstd = zeros(2, 198, 192), zeros(396), zeros(396)
    strides = (x.stride(0), x.stride(1)) * 2
    args = (x, None, None, None, weight, None, None, y, mean, rstd, None, None, 198, 0, 0, *strides, 1e-6)
    with record() as launches, public_launches() as public:
        for _ in range(2):
            launch(layer_norm_forward_kernel, (396,), args, (192, 256, 16, True), 4)
    assert public.call_count == 1
    assert launches[0] == launches[1], launches


def test_a_repeated_launch_is_direct():
    launch_arguments()
    with public_launches() as public:
        for _ in range(3):
            launch_arguments()
    assert public.call_count == 0


def test_a_limit_of_registers_makes_a_variant_that_was_compiled_with_it():
    x, y = buffer("x"), buffer("y")
    compiled = path._register(arguments_kernel).compiled
    for maxnreg in (None, 32):
        launch(arguments_kernel, (3,), (x, 198, 0.5, None, 7, y), (32, False), 2, maxnreg=maxnreg)
    limits = [each.kernel.metadata.maxnreg for key, each in compiled.items() if (32, False) in key]
    assert limits == [None, 32]


def test_what_the_code_depends_on_makes_a_variant_of_its_own():
    x, y, shifted = buffer("x"), buffer("y"), zeros(257)[1:]
    assert shifted.data_ptr() % 16
    launch_arguments()
    for change in (dict(x=x.bfloat16()), dict(x=shifted), dict(y=shifted), dict(absent=x)):
        with public_launches() as public:
            launch_arguments(**change)
            launch_arguments(**change)
        assert public.call_count == 1, change
    with public_launches() as public:
        launch(arguments_kernel, (3,), (x, 198, 0.5, None, 7, y), (128, True), 2)
        launch(arguments_kernel, (3,), (x, 198, 0.5, None, 7, y), (64, True), 4)
        launch(arguments_kernel, (3,), (x, 198, 0.5, None, 7, y), (64, True), 2, 3)
    assert public.call_count == 3


def test_which_of_two_arguments_is_absent_makes_a_variant():
    x, y = buffer("x"), buffer("y")
    with public_launches() as public:
        for _ in range(2):
            launch(optional_kernel, (1,), (x, None, y), (64,), 1)
            launch(optional_kernel, (1,), (None, x, y), (64,), 1)
    assert public.call_count == 2


def test_a_launch_runs_on_the_device_of_its_tensors_by_a_variant_of_its_own():
    there = zeros(256, device="cuda:1")
    launch_arguments()
    with record() as launches, public_launches() as public:
        launch_arguments(x=there, y=there)
        launch_arguments(x=there, y=there)
    assert public.call_count == 1 and torch.cuda.current_device() == 0
    assert [seen.device for seen in launches] == [1, 1]


def test_a_launch_takes_the_current_stream():
    stream = torch.cuda.Stream()
    launch_arguments()
    with record() as launches, torch.cuda.stream(stream):
        launch_arguments()
    assert [seen.stream for seen in launches] == [stream.cuda_stream]


@refuses
def test_memory_of_another_device_is_refused():
    launch_arguments()
    assert "memory of device 1, launched on device 0" in raises(lambda: launch_arguments(y=zeros(256, device="cuda:1")))


def test_values_of_integers_make_no_variants():
    launch_arguments()
    with public_launches() as public:
        for n in (1, 16, 198):
            launch_arguments(n=n, wide=n)
    assert public.call_count == 0

    compiled = []
    with mock.patch.object(runtime, "jit_post_compile_hook", lambda **kwargs: compiled.append(kwargs["repr"])):
        for shape in ((1, 1, 192), (2, 16, 192), (2, 198, 192), (3, 197, 192)):
            layer_norm_forward(zeros(shape), torch.ones(192, device="cuda"), None, 1e-5, torch.float32)
    assert len(compiled) <= 1, compiled


def test_an_integer_beyond_32_bits_arrives_whole():
    launch_arguments()
    with record() as launches:
        launch_arguments(wide=2**31)
        launch_arguments(wide=-(2**31))
    sizes = [len(seen.arguments[3]) for seen in launches]
    values = [int.from_bytes(seen.arguments[3], "little", signed=True) for seen in launches]
    assert values == [2**31, -(2**31)] and sizes == [8, 4], launches


def test_an_integer_for_a_number_is_left_to_triton():
    with record() as launches:
        launch_arguments(scale=2)
        launch_arguments(scale=2)
    assert [seen.arguments[2] for seen in launches] == [struct.pack("i", 2)] * 2, launches


@pytest.mark.parametrize("aligned", [True, False])
def test_a_described_launch_is_compiled_as_one_that_is_made(aligned):
    pointers = path.Pointer(torch.float32, aligned), path.Pointer(torch.float16, True)
    with record() as launches:
        made = path.described_launch(
            arguments_kernel, (3, 2), (pointers[0], 198, 0.5, None, 7, pointers[1]), (128, True), 2
        )
    assert launches == [] and (made.grid, made.args, made.constexprs) == ((3, 2, 1), (), (128, True))
    x, y = zeros(264)[0 if aligned else 1 :], zeros(264, dtype=torch.float16)
    before = (
        set(map(id, path._kernels[id(arguments_kernel)].compiled)) if id(arguments_kernel) in path._kernels else set()
    )
    launch(arguments_kernel, (3, 2), (x, 198, 0.5, None, 7, y), (128, True), 2)
    compiled = path._kernels[id(arguments_kernel)].compiled
    (added,) = (each for key, each in compiled.items() if id(key) not in before)
    assert added == made.compiled and added.kernel is made.compiled.kernel


def test_a_described_launch_that_cannot_be_compiled_says_so(monkeypatch):
    def describe(warmup):
        monkeypatch.setattr(arguments_kernel, "warmup", warmup)
        args = (path.Pointer(torch.float32, True), 198, 0.5, None, 7, path.Pointer(torch.float16, True))
        return path.described_launch(arguments_kernel, (3,), args, (128, True), 2)

    def failing(error):
        def warmup(*_, **__):
            raise error

        return warmup

    assert describe(lambda *_, **__: None) is None  # a hook of Triton's took over
    with pytest.raises(KernelRefused, match="arguments_kernel cannot run on this GPU"):
        describe(failing(RuntimeError("PassManager::run failed")))
    with pytest.raises(ValueError, match="a mistake"):
        describe(failing(ValueError("a mistake")))


def test_launch_hooks_fire():
    launch_arguments()
    seen = []
    enter, leave = (lambda m: seen.append(m.get()["name"])), (lambda m: seen.append("done"))
    runtime.launch_enter_hook.add(enter)
    runtime.launch_exit_hook.add(leave)
    try:
        launch_arguments()
    finally:
        runtime.launch_enter_hook.remove(enter)
        runtime.launch_exit_hook.remove(leave)
    assert seen == ["arguments_kernel", "done"]
    with mock.patch.object(runtime, "launch_enter_hook", enter):
        launch_arguments()
    assert seen == ["arguments_kernel", "done", "arguments_kernel"]
    with mock.patch.object(runtime, "launch_enter_hook", None):
        launch_arguments()


def test_an_untested_triton_takes_the_public_way():
    launch_arguments()
    with mock.patch.object(path, "_DIRECT", False), public_launches() as public, record() as launches:
        launch_arguments()
    assert public.call_count == len(launches) == 1
    assert not "3.60.0".startswith(path._TESTED_VERSIONS) and not "4.0.0".startswith(path._TESTED_VERSIONS)


def test_descriptors_arrive_as_tensor_maps():
    x, y = zeros(2, 198, 192, dtype=torch.bfloat16), zeros(2, 198, 256, dtype=torch.bfloat16)[..., :192]
    for _ in range(2):
        with record() as launches:
            maps = (descriptor(x, [1, 64, 64]), descriptor(y, [1, 64, 64]))
            launch(descriptor_kernel, (4,), maps, (64,), 4)
        found = [tensor_map(a) for a in launches[0].arguments if len(a) == 128]
        assert [m.address for m in found] == [x.data_ptr(), y.data_ptr()]
        assert [m.shape for m in found] == [(2, 198, 192)] * 2
        assert [m.strides for m in found] == [(198 * 192 * 2, 192 * 2), (198 * 256 * 2, 256 * 2)]
        assert [m.box for m in found] == [(1, 64, 64)] * 2


def test_a_descriptor_is_what_triton_would_make():
    x = zeros(2, 198, 192, dtype=torch.bfloat16)
    ours, theirs = descriptor(x, [1, 64, 64]), TensorDescriptor.from_tensor(x, [1, 64, 64])
    assert ours.base is theirs.base
    for field in dataclasses.fields(TensorDescriptor)[1:]:
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


@refuses
def test_a_tensor_map_that_a_driver_would_refuse_is_refused():
    y = descriptor(zeros(1, 64, 64, dtype=torch.bfloat16), [1, 64, 64])

    def copy_from(x):
        launch(descriptor_kernel, (1,), (descriptor(x, [1, 64, 64]), y), (64,), 4)

    buffer = zeros(64 * 72 + 8, dtype=torch.bfloat16)
    copy_from(buffer[: 64 * 64].view(1, 64, 64))
    assert "base address is not 16-byte aligned" in raises(copy_from, buffer[1 : 64 * 64 + 1].view(1, 64, 64))
    assert "stride is not a multiple of 16" in raises(copy_from, buffer.as_strided((1, 64, 64), (64 * 66, 66, 1)))
    assert "base address" in raises(copy_from, buffer[:0].view(1, 0, 64))


@refuses
def test_a_grid_beyond_the_limits_is_refused():
    launch_arguments(grid=(1, 65535))
    assert "grid is outside the limits" in raises(lambda: launch_arguments(grid=(1, 65536)))


def test_layer_norm_launches_forward_and_backward():
    x, weight = zeros(2, 5, 192, dtype=torch.bfloat16), torch.ones(192, device="cuda")
    with record() as launches:
        for _ in range(2):
            _, y, mean, rstd = layer_norm_forward(x, weight, weight, 1e-6, torch.bfloat16)
            layer_norm_backward(
                y,
                x,
                mean,
                rstd,
                weight,
                dx_dtype=torch.bfloat16,
                dweight_dtype=torch.float32,
                dbias_dtype=torch.float32,
            )
    names = ["layer_norm_forward_kernel", "layer_norm_backward_kernel", "partial_sums_backward_kernel"]
    assert [seen.name for seen in launches] == names * 2


def test_a_whole_mlp_reads_its_weights_in_blocks_of_its_channels():
    x, branch = zeros(2, 99, 192), zeros(2, 99, 192, dtype=torch.bfloat16)
    w1, w2 = zeros(768, 192, dtype=torch.bfloat16), zeros(192, 768, dtype=torch.bfloat16)
    ones, b1 = torch.ones(192, device="cuda"), torch.ones(768, device="cuda")
    tall, pair = fused_mlp.candidates(90)
    for config, blocks in ((tall, 2), (pair, 4)):
        for _ in range(2):  # the first call compiles, the second takes the direct way
            with record() as launches, fused_mlp.use_fused_mlp(config):
                layers = (w1, b1, w2, ones, "gelu", torch.bfloat16)
                _, alone = fused_mlp.fused_mlp_forward(branch, *layers)
                norm = dict(norm=(ones, ones, 1e-6), branch=branch, gamma=ones)
                x_new, out = fused_mlp.fused_mlp_forward(x, *layers, **norm)
        assert [seen.grid for seen in launches] == [(blocks, 1, 1)] * 2
        written = [pointer(t) for t in (alone, x_new, out)]
        assert written[0] in launches[0].arguments and {*written[1:]} <= {*launches[1].arguments}
        maps = [tensor_map(a) for a in launches[1].arguments if len(a) == 128]
        if config is tall:
            assert [m.address for m in maps] == [t.data_ptr() for t in (w1, w1, w2, w2)]
            assert [m.box for m in maps] == [(64, 64), (64, 64), (128, 64), (64, 64)]
        else:
            assert not maps and {pointer(w1), pointer(w2)} <= {*launches[1].arguments}


def test_every_kernel_of_a_training_step_is_launched_directly_from_the_second_step_on():
    sizes = dict(img_size=32, depth=2, num_classes=10, init_values=0.1, drop_path_rate=0.5)
    model = fastdeit.accelerate(timm.create_model("deit_tiny_distilled_patch16_224", **sizes)).cuda().train()
    images = zeros(2, 3, 32, 32)

    def step():
        torch.manual_seed(0)
        with torch.autocast("cuda", torch.bfloat16):
            out = model(images)
        out.sum().backward()

    step()
    with record() as launches, public_launches() as public:
        step()
    assert public.call_count == 0
    kernels = {seen.name for seen in launches}
    expected = {"fold_forward_kernel", "fold_columns_backward_kernel", "fold_rows_backward_kernel"}
    expected |= {"patch_embedding_forward_kernel", "patch_embedding_backward_kernel", "layer_norm_forward_kernel"}
    expected |= {"activation_forward_kernel", "activation_backward_kernel", "folded_layer_norm_backward_kernel"}
    assert expected < kernels and any("attention" in name for name in kernels), kernels
