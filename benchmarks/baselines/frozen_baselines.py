"""What people run a frozen vision transformer with, from timm's bf16 model: libraries that quantize or compile it, runtimes.

Each is made when it is first called, so that what is not installed, or not for this device, is a row that says so.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastdeit.benchmarks.baselines.op_baselines import autotuned, imported
from fastdeit.benchmarks.timing import NotSupported

_TORCHAO = {"fp8": "Float8DynamicActivationFloat8WeightConfig", "int8": "Int8DynamicActivationInt8WeightConfig"}


class Made:
    """A candidate, images -> logits, that `make` gives of the first call's images."""

    def __init__(self, make: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> None:
        self._make = make
        self._made: Callable[[Tensor], Tensor] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self._made is None:
            self._made = self._make(images)
        return self._made(images)


class OnItsOwn(Made):
    """One whose runtime launches by itself, so that it cannot be captured."""

    host = "another runtime launches"


def torchao(model: nn.Module, precision: str, compile_: bool = True) -> Made:
    """torchao's dynamic quantization of the linear layers in the blocks, one scale a token and output channel, and torch.compile.

    Args:
        precision: "fp8" or "int8".
    """

    def make(images: Tensor) -> Callable[[Tensor], Tensor]:
        quantize = imported("torchao.quantization", "quantize_")
        config = imported("torchao.quantization", _TORCHAO[precision])
        options = {"granularity": imported("torchao.quantization", "PerRow")()} if precision == "fp8" else {}
        if precision == "fp8" and images.is_cuda and torch.cuda.get_device_capability(images.device) < (8, 9):
            raise NotSupported("FP8 needs compute capability 8.9")
        ours = copy.deepcopy(model)
        quantize(ours.blocks, config(**options))
        return autotuned(ours) if compile_ else ours

    return Made(make)


def tensorrt(model: nn.Module) -> OnItsOwn:
    """Torch-TensorRT's compilation of the bf16 model for the first call's shape."""

    def make(images: Tensor) -> Callable[[Tensor], Tensor]:
        compile_ = imported("torch_tensorrt", "compile")
        ours = copy.deepcopy(model)
        return compile_(ours, ir="dynamo", inputs=[images], enabled_precisions={torch.bfloat16, torch.float32})

    return OnItsOwn(make)


def onnx_runtime(model: nn.Module) -> OnItsOwn:
    """ONNX Runtime on timm's model, in fp16 by its CUDA provider, or in fp32 on a CPU; inputs and outputs stay on the device."""

    def make(images: Tensor) -> Callable[[Tensor], Tensor]:
        session_class = imported("onnxruntime", "InferenceSession")
        imported("onnxscript", "ir")
        device = images.device.type
        provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device]
        if provider not in imported("onnxruntime", "get_available_providers")():
            raise NotSupported(f"this onnxruntime has no {provider}")
        low = torch.float16 if device == "cuda" else torch.float32
        ours = copy.deepcopy(model).to(low)
        stream = {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream)} if device == "cuda" else {}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            exported = torch.onnx.export(ours, (images.to(low),), dynamo=True, verbose=False)
            assert exported is not None  # None is for an export to a file
            exported.save(file)
            session = session_class(file, providers=[(provider, stream)])
        kind = np.float16 if low == torch.float16 else np.float32
        (given,), (result,) = session.get_inputs(), session.get_outputs()

        def run(images: Tensor) -> Tensor:
            x = images.to(low).contiguous()
            out = torch.empty(len(x), model.num_classes, dtype=low, device=x.device)
            binding = session.io_binding()
            where = device, x.device.index or 0, kind
            binding.bind_input(given.name, *where, tuple(x.shape), x.data_ptr())
            binding.bind_output(result.name, *where, tuple(out.shape), out.data_ptr())
            session.run_with_iobinding(binding)
            return out

        return run

    return OnItsOwn(make)
