"""`fastdeit export`: programs, packages and ONNX files that compute what the model computes, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastdeit
from fastdeit import optimize_for_inference
from fastdeit.commands.cli import main
from fastdeit.inference.exporting import example, export_optimized
from fastdeit.inference.inductor_form import InductorPairs, rounded_to_e4m3


@pytest.fixture
def made(small, raw_images):
    def make(precision, images="uint8"):
        calibration = [(raw_images if images == "uint8" else raw_images / 128 - 1, torch.arange(6))]
        given = {} if precision in ("bf16", "fp16") else dict(calibration=calibration)
        return optimize_for_inference(small(depth=1), precision, images=images, **given)

    return make


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_an_exported_program_computes_the_same_for_any_batch(made, raw_images, tmp_path, precision):
    fast, path = made(precision), tmp_path / "deit.pt2"
    export_optimized(fast, path, "pt2")
    loaded = torch.export.load(path).module()
    for batch in (raw_images[:1], raw_images):
        assert torch.equal(loaded(batch), fast(batch))
    assert not [node for node in loaded.graph.nodes if "fastdeit" in str(node.target)]  # loads without fastdeit


@pytest.mark.parametrize(("precision", "dtype", "pairs"), [("fp16", "float16", 0), ("fp8", "float32", 5)])
def test_an_onnx_file(made, raw_images, tmp_path, precision, dtype, pairs):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    fast, path = made(precision), tmp_path / "deit.onnx"
    export_optimized(fast, path, "onnx")
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: raw_images.numpy()})
    expected = fast(raw_images).float()
    assert found.dtype.name == dtype
    assert (torch.from_numpy(found).float() - expected).norm() <= 0.05 * expected.norm()
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("QuantizeLinear") == (4 if pairs else 0) and kinds.count("DequantizeLinear") >= pairs


def test_an_onnx_file_that_computes_something_else_is_not_written(made, tmp_path, monkeypatch):
    onnxruntime, path = pytest.importorskip("onnxruntime"), tmp_path / "deit.onnx"
    session = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="images")], run=lambda *_: [np.ones((3, 10))])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **options: session)
    monkeypatch.setattr(
        torch.onnx, "export", lambda *_, **options: SimpleNamespace(save=lambda path: path.write_text(""))
    )
    monkeypatch.setattr("fastdeit.inference.exporting._program", lambda *_: None)
    with pytest.raises(ValueError, match=r"ONNX Runtime's logits are .* nothing was written"):
        export_optimized(made("bf16"), path, "onnx")
    assert not path.exists()


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_a_package_of_aotinductor_is_made_of_the_same_program(made, tmp_path, monkeypatch, precision):
    packaged = []
    monkeypatch.setattr(
        torch._inductor,
        "aoti_compile_and_package",
        lambda program, package_path: packaged.append((program, package_path)),
    )
    fast = made(precision, "float")
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: packaged[0][0].module())
    export_optimized(fast, tmp_path / "deit.pt2", "aoti")
    ((program, path),) = packaged
    assert path == str(tmp_path / "deit.pt2")
    got, expected = program.module()(example(fast, 3)).float(), fast(example(fast, 3)).float()
    assert (got - expected).norm() <= (0 if precision == "bf16" else 0.02) * expected.norm()
    kinds = {node.meta["val"].dtype for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    assert torch.float8_e4m3fn not in kinds  # which Inductor's C++ does not have
    stored = [tensor for tensor in program.state_dict.values() if tensor.dtype in (torch.uint8, torch.int8)]
    assert len(stored) == (0 if precision == "bf16" else 4)


def test_a_package_that_computes_something_else_is_not_kept(made, tmp_path, monkeypatch):
    path = tmp_path / "deit.pt2"
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, package_path: path.write_text(""))
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: lambda images: torch.ones(3, 10))
    with pytest.raises(ValueError, match=r"format: the package's logits are .* nothing was written"):
        export_optimized(made("fp8"), path, "aoti")
    assert not path.exists()


def test_float32_values_are_rounded_as_float8_is_defined():
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    between = torch.randn(20_000) * torch.logspace(-5, 3, 20_000)
    steps = torch.arange(-256, 257) / 2.0**11  # ties of the smallest values
    for y in (halves, halves.nextafter(torch.zeros(())), between, steps):
        y = y[~y.isnan()]
        expected = y.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        assert torch.equal(rounded_to_e4m3(y), expected)
    assert rounded_to_e4m3(torch.tensor([float("nan")])).isnan().all()
    every = torch.arange(256).to(torch.uint8)
    values = InductorPairs().dequantize_weight(every[:, None], torch.ones(256), torch.float8_e4m3fn)[:, 0]
    finite = every % 128 != 127
    assert torch.equal(values[finite], every.view(torch.float8_e4m3fn).float()[finite])


@pytest.mark.parametrize(
    ("precision", "form", "message"),
    [
        ("bf16", "tflite", "format: expected one of safetensors, pt2, aoti, onnx, got 'tflite'"),
    ],
)
def test_what_a_format_does_not_take(made, tmp_path, precision, form, message):
    with pytest.raises(ValueError, match=message):
        export_optimized(made(precision), tmp_path / "deit", form)


def test_from_a_checkpoint_to_predictions(small_checkpoint, image_folder, tmp_path, capsys):
    """The file has the run's preparation of images and names of classes, and says what the checkpoint says."""
    picture, file = str(next((image_folder / "val" / "digit-1").iterdir())), str(tmp_path / "deit")
    assert main(["export", str(small_checkpoint), "--precision", "fp16", "--images", "uint8", "--output", file]) == 0
    assert "fp16, weights of 0.1 MiB" in capsys.readouterr().out
    printed = []
    for source in (["--checkpoint", str(small_checkpoint)], ["--optimized", file]):
        assert main(["predict", *source, picture]) == 0
        printed.append(capsys.readouterr().out.split())
    assert printed[0][0] == printed[1][0] and sorted(printed[0][3::3]) == sorted(printed[1][3::3])
    assert fastdeit.load_optimized(file).preprocessing.class_names == ("digit-0", "digit-1", "digit-2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp8"], "--calibration: expected a folder of images, from which fp8 has its scales"),
        (
            ["--precision", "fp16", "--exclude", "blocks.0"],
            "--calibration, --exclude: are for fp8 and int8, not for fp16",
        ),
        (["--readout", "class", "--precision", "int8", "--calibration", "missing"], "missing: no such image"),
    ],
)
def test_what_the_command_refuses(small_checkpoint, tmp_path, capsys, options, message):
    assert main(["export", str(small_checkpoint), "--output", str(tmp_path / "deit"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "deit").exists()


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert main(["export", "deit_tinny", "--output", str(tmp_path / "deit")]) == 2
    assert main(["export", "missing.safetensors", "--output", str(tmp_path / "deit")]) == 2
    printed = capsys.readouterr().err
    assert "deit_tinny" in printed and "missing.safetensors" in printed


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp16", "fp8", "int8"])
def test_a_package_compiles_and_takes_other_batches(made, raw_images, tmp_path, precision):
    fast, path = made(precision), tmp_path / "deit.pt2"
    export_optimized(fast, path, "aoti")
    run = torch._inductor.aoti_load_package(str(path))
    for batch in (raw_images[:1], raw_images):
        got, expected = run(batch).float(), fast(batch).float()
        assert got.shape == expected.shape
        assert (got - expected).norm() <= (0.005 if precision == "fp16" else 0.1) * expected.norm()
