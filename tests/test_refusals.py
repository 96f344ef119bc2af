"""A compiler and a driver that refuse: ops go over to PyTorch and training goes on. These tests run on the fake CUDA runtime."""

import ctypes
import gc
import threading

import pytest
import torch
from triton.runtime.jit import JITFunction

import fastdeit
from fastdeit import backends, ops, refusals
from fastdeit.kernels.runtime import launch

pytestmark = pytest.mark.fake_device


def forget_compiled():
    """No kernel is compiled; also none that was launched by Triton's public interface, of which launch._kernels does not know."""
    for kernel in gc.get_objects():
        if type(kernel) is JITFunction:
            kernel.device_caches.clear()
    launch._kernels.clear()
    refusals.forget()


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch, tmp_path):
    """No refusal is on record, and no kernel is compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forget_compiled()
    yield
    forget_compiled()  # what was made under a refusing compiler


@pytest.fixture
def compiler_refuses(monkeypatch):
    """compiler_refuses(part): ptxas fails for kernels with that part in their name."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.errors import PTXASError

    plain = CUDABackend.make_cubin

    def refuse(part):
        def make_cubin(self, source, metadata, *rest):
            if part in metadata["name"]:
                raise PTXASError("`ptxas` failed with error code 255\nno such architecture")
            return plain(self, source, metadata, *rest)

        monkeypatch.setattr(CUDABackend, "make_cubin", make_cubin)

    return refuse


@pytest.fixture
def driver_refuses(monkeypatch):
    """driver_refuses(error): loading a kernel raises it."""
    from triton.runtime.driver import driver

    def refuse(error):
        def load_binary(*_):
            raise error

        monkeypatch.setattr(driver.active.utils, "load_binary", load_binary)

    return refuse


def cuda(*shape, dtype=torch.bfloat16, grad=False):
    return torch.zeros(*shape, device="cuda", dtype=dtype, requires_grad=grad)


def is_fused(y):
    return y.grad_fn.name().startswith(("_Attention", "fastdeit_"))


def test_a_refused_kernel_hands_its_op_over_and_says_so_once(compiler_refuses, capsys):
    compiler_refuses("attention_forward")
    qkv = cuda(2, 17, 192, grad=True)
    for _ in range(2):
        y = ops.attention(qkv, 1)
        assert not is_fused(y)
        y.sum().backward()
    assert qkv.grad.shape == qkv.shape
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastdeit: attention_forward_kernel cannot run on this GPU: PTXASError: ")
    assert refusals.REPORT_COMMAND in line
    assert "refused on this machine: attention_forward_kernel" in backends.why_reference(qkv, kernels=("attention",))
    assert backends.why_reference(qkv, kernels=("norm",)) is None


def test_a_backward_that_is_refused_is_noticed_before_anything_depends_on_it(compiler_refuses, capsys):
    compiler_refuses("dkv_backward")
    with torch.no_grad():
        ops.attention(cuda(2, 17, 192), 1)  # forward alone needs no backward
    assert capsys.readouterr().err == ""
    y = ops.attention(cuda(2, 17, 192, grad=True), 1)
    assert not is_fused(y) and "attention_dkv_backward_kernel cannot run" in capsys.readouterr().err
    y.sum().backward()


def test_kernels_that_nothing_refuses_stay(capsys):
    from fastdeit.testing import fake_cuda

    qkv = cuda(2, 17, 192, grad=True)
    with fake_cuda.record("triton_launch") as events:
        y = ops.attention(qkv, 1)
    assert is_fused(y) and [event.name for event in events] == ["attention_forward_kernel"]  # backward was not run
    with fake_cuda.record("triton_launch") as events:
        y.sum().backward()
    assert [event.name for event in events] == ["attention_dq_backward_kernel", "attention_dkv_backward_kernel"]
    assert qkv.grad is not None and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words", ["no kernel image is available for execution on the device", "device kernel image is invalid"]
)
def test_a_driver_that_refuses_to_load(driver_refuses, capsys, words):
    driver_refuses(RuntimeError(f"Triton Error [CUDA]: {words}"))
    assert not is_fused(ops.attention(cuda(2, 17, 192, grad=True), 1))
    assert words in capsys.readouterr().err


def test_too_few_resources_are_a_refusal(driver_refuses, capsys):
    from triton.runtime.errors import OutOfResources

    driver_refuses(OutOfResources(300_000, 100_000, "shared memory"))
    assert not is_fused(ops.attention(cuda(2, 17, 192, grad=True), 1))
    assert "out of resource: shared memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["an illegal memory access was encountered", "unspecified launch failure", "out of memory"]
)
def test_a_fault_of_the_device_is_none(driver_refuses, words):
    driver_refuses(RuntimeError(f"Triton Error [CUDA]: {words}"))
    with pytest.raises(RuntimeError, match=words):
        ops.attention(cuda(2, 17, 192), 1)
    assert refusals.why_refused("attention") is None


def test_under_triton_a_refusal_is_an_error(compiler_refuses):
    compiler_refuses("attention_forward")
    with (
        backends.use_backend("triton"),
        pytest.raises(
            RuntimeError, match=r"backend 'triton' cannot run here: attention_forward_kernel .* error code 255"
        ),
    ):
        ops.attention(cuda(2, 17, 192), 1)
    assert refusals.why_refused("attention") is None


def test_inside_a_capture_the_error_says_what_to_do(compiler_refuses):
    compiler_refuses("attention_forward")
    qkv, graph = cuda(2, 17, 192), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="call the model once before the capture"), torch.cuda.graph(graph):
        ops.attention(qkv, 1)


def test_what_every_op_uses_concerns_every_op(compiler_refuses):
    compiler_refuses("partial_sums")
    x, weight, bias = cuda(2, 17, 192, grad=True), cuda(192, grad=True), cuda(192, grad=True)
    y = ops.layer_norm(x, weight, bias)
    assert y.grad_fn.name() == "NativeLayerNormBackward0"
    assert "partial_sums" in backends.why_reference(x, kernels=("attention",))


def test_a_model_trains_on_and_explain_names_the_refusal(compiler_refuses, capsys):
    import timm

    compiler_refuses("attention_dq")
    model = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=32).cuda()
    fastdeit.accelerate(model)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(cuda(2, 3, 32, 32, dtype=torch.float32)).sum()
        loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(capsys.readouterr().err.splitlines()) == 1
    with torch.autocast("cuda", torch.bfloat16):
        reasons = {row.reason for row in fastdeit.explain(model) if "attn" in row.name}
    assert any("refused on this machine: attention_dq_backward_kernel" in reason for reason in reasons), reasons


def test_a_thread_s_first_work_may_be_a_descriptor():
    """Triton encodes descriptors before it makes sure of a context."""
    driver, found = ctypes.CDLL("libcuda.so.1"), {}
    qkv = cuda(2, 64, 192)

    def current() -> int:
        context = ctypes.c_void_p()
        assert driver.cuCtxGetCurrent(ctypes.byref(context)) == 0
        return context.value or 0

    def work():
        found["before"] = current()
        launch.descriptor(qkv, (1, 64, 64))
        found["after"] = current()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not found["before"] and found["after"]


def test_hooks_on_tensors_do_not_see_the_pass_that_compiles_backward():
    x = torch.zeros(2, 17, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.zeros(192, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    tokens, seen = x * 1, []
    for tensor in (tokens, weight):
        tensor.register_hook(lambda gradient: seen.append(gradient.shape))
    made = ops.layer_norm(tokens, weight, bias, 1e-6)
    assert refusals._compiled and seen == []
    made.sum().backward()
    assert set(seen) == {weight.shape, tokens.shape} and len(seen) == 2
