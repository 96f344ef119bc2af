"""Files of an optimized model that run without fastdeit: an exported program, AOTInductor's package, ONNX."""

import os
from pathlib import Path

import torch

from fastdeit import backends
from fastdeit.inference.architecture import FORMATS as QUANTIZED
from fastdeit.inference.model import OptimizedModel
from fastdeit.inference.onnx_form import OPSET, OnnxForm

FORMATS = {
    "safetensors": "weights and a description, for fastdeit.load_optimized",
    "pt2": "torch.export's program, for torch.export.load",
    "aoti": "AOTInductor's package, for torch._inductor.aoti_load_package and C++",
    "onnx": "an ONNX file, checked in ONNX Runtime",
}
LARGEST_BATCH = 4096
# Of logits in ONNX Runtime, relative RMS: it sums in another order, and casts to 8 bits on its way.
_TOLERANCES = {"bf16": 0.02, "fp16": 0.005, "fp8": 0.1, "int8": 0.1}


def export_optimized(model: OptimizedModel, path: str | os.PathLike[str], form: str) -> None:
    """Writes a model, on the CPU, as a file of PyTorch's or ONNX's own operations, for batches of 1 to LARGEST_BATCH images.

    Args:
        form: one of FORMATS.

    Raises:
        ValueError: form is another or does not take the model's precision, or ONNX Runtime computes something else.
        ImportError: onnx, onnxscript or onnxruntime are missing.
    """
    if form not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
    if form == "aoti" and model.options.precision in QUANTIZED:
        raise ValueError(
            f"format: aoti takes bf16 and fp16, not {model.options.precision}: Inductor's C++ for 8-bit layers does not compile "
            "on a CPU; pt2 and onnx take every precision"
        )
    if form == "safetensors":
        model.save(path)
    elif form == "onnx":
        _export_onnx(model, Path(path))
    elif form == "pt2":
        torch.export.save(_program(model, model), path)
    else:
        torch._inductor.aoti_compile_and_package(_program(model, model), package_path=os.fspath(path))


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


def _export_onnx(model: OptimizedModel, path: Path) -> None:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, which torch.onnx needs
    except ImportError as error:
        raise ImportError(f"format: onnx needs pip install onnx onnxscript onnxruntime ({error})") from error
    exported = torch.onnx.export(_program(model, OnnxForm(model)), dynamo=True, verbose=False, opset_version=OPSET)
    assert exported is not None  # None is for an export to a file
    exported.save(path)
    images = example(model, 3)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected = model(images).float()
    distance = ((torch.from_numpy(found).float() - expected).norm() / expected.norm()).item()
    if not distance <= _TOLERANCES[model.options.precision]:
        path.unlink()
        raise ValueError(
            f"format: ONNX Runtime's logits are {distance:.1%} from the model's (relative RMS): nothing was written"
        )
