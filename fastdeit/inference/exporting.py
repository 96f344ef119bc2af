"""Files of an optimized model that run without fastdeit: an exported program, AOTInductor's package, ONNX."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from fastdeit import backends
from fastdeit.inference.architecture import FORMATS as QUANTIZED
from fastdeit.inference.inductor_form import InductorPairs
from fastdeit.inference.model import OptimizedModel
from fastdeit.inference.onnx_form import OPSET, OnnxPairs
from fastdeit.inference.pairs_form import PairsForm

FORMATS = {
    "safetensors": "weights and a description, for fastdeit.load_optimized",
    "pt2": "torch.export's program, for torch.export.load",
    "aoti": "AOTInductor's package, for torch._inductor.aoti_load_package and C++",
    "onnx": "an ONNX file, checked in ONNX Runtime",
}
LARGEST_BATCH = 4096
# Of logits in ONNX Runtime or Inductor's C++, relative RMS: they sum in another order, and cast to 8 bits on their way.
_TOLERANCES = {"bf16": 0.02, "fp16": 0.005, "fp8": 0.1, "int8": 0.1}


def export_optimized(model: OptimizedModel, path: str | os.PathLike[str], form: str) -> None:
    """Writes a model, on the CPU, as a file of PyTorch's or ONNX's own operations, for batches of 1 to LARGEST_BATCH images.

    Args:
        form: one of FORMATS.

    Raises:
        ValueError: form is another, or ONNX Runtime or the package compute something else.
        ImportError: onnx, onnxscript or onnxruntime are missing.
    """
    if form not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
    if form == "safetensors":
        model.save(path)
    elif form == "onnx":
        _export_onnx(model, Path(path))
    elif form == "pt2":
        torch.export.save(_program(model, model), path)
    else:
        _export_package(model, Path(path))


def example(model: OptimizedModel, batch: int = 2) -> torch.Tensor:
    """Images as the model takes them."""
    shape = (batch, model.architecture.in_chans, *model.architecture.img_size)
    generator = torch.Generator().manual_seed(0)
    if model.options.images == "uint8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator)


def _program(model: OptimizedModel, module: torch.nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with backends.use_backend("reference"), torch.no_grad():
        return torch.export.export(module, (example(model),), dynamic_shapes=({0: batch},))


def _export_package(model: OptimizedModel, path: Path) -> None:
    module = PairsForm(model, InductorPairs()) if model.options.precision in QUANTIZED else model
    torch._inductor.aoti_compile_and_package(_program(model, module), package_path=os.fspath(path))
    _check(model, path, "the package's", torch._inductor.aoti_load_package(os.fspath(path)))


def _export_onnx(model: OptimizedModel, path: Path) -> None:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, which torch.onnx needs
    except ImportError as error:
        raise ImportError(f"format: onnx needs pip install onnx onnxscript onnxruntime ({error})") from error
    exported = torch.onnx.export(
        _program(model, PairsForm(model, OnnxPairs())), dynamo=True, verbose=False, opset_version=OPSET
    )
    assert exported is not None  # None is for an export to a file
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    _check(model, path, "ONNX Runtime's", lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0]))


def _check(model: OptimizedModel, path: Path, whose: str, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raises ValueError, and removes the file, where its logits are not the model's."""
    images = example(model, 3)
    expected = model(images).float()
    distance = ((run(images).float() - expected).norm() / expected.norm()).item()
    if not distance <= _TOLERANCES[model.options.precision]:
        path.unlink()
        raise ValueError(
            f"format: {whose} logits are {distance:.1%} from the model's (relative RMS): nothing was written"
        )
