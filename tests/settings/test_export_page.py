"""The snippets of docs/export.md, run one after another, and ONNX files held to the model."""

import re
from pathlib import Path

import pytest
import torch

import fastdeit

PAGE = Path(__file__).parents[2] / "docs" / "export.md"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def snippets() -> dict[str, str]:
    """By heading; the first, without one, is what the others start from. Models are made small."""
    text = PAGE.read_text()
    for full, small in (
        ("pretrained=False", "pretrained=False, img_size=32, depth=1, embed_dim=64, num_heads=1, num_classes=5"),
        ("224, 224", "32, 32"),
    ):
        assert full in text
        text = text.replace(full, small)
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    sections = dict(zip(["", *parts[1::2]], parts[::2], strict=True))
    return {name: "\n".join(re.findall(r"```python.*?\n(.*?)```", text, re.DOTALL)) for name, text in sections.items()}


@pytest.fixture
def run(snippets, tmp_path, monkeypatch):
    """run(heading) -> the logits that its snippet ends with, and the model's."""

    def go(*headings):
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        names: dict = {}
        for heading in ("", *headings):
            exec(snippets[heading], names)
        with torch.no_grad():
            return torch.as_tensor(names["logits"]).detach(), names["model"](names["images"])

    return go


def test_every_section_has_a_snippet(snippets):
    assert list(snippets) == ["", "torch.export", "AOTInductor", "ONNX", "TorchScript"] and all(snippets.values())


def test_torch_export(run):
    torch.testing.assert_close(*run("torch.export"))


@pytest.mark.long
def test_aotinductor(run):
    torch.testing.assert_close(*run("torch.export", "AOTInductor"))


def test_onnx(run):
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    torch.testing.assert_close(*run("ONNX"))


def test_torchscript(run):
    torch.testing.assert_close(*run("TorchScript"))


def test_where_kernels_would_run_onnx_gets_pytorchs_operations(settings, small, kernels, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = fastdeit.accelerate(small(depth=1)).to(kernels, torch.float16).eval()
    images = settings.images(device=kernels, dtype=torch.float16)
    torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images).cpu(), rtol=1e-2, atol=2e-3)
