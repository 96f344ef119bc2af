"""What frozen models are timed beside: the same logits, or a row that says what is missing."""

import sys

import pytest
import timm
import torch

from fastdeit.benchmarks.baselines import frozen_baselines as baselines
from fastdeit.benchmarks.timing import NotInstalled, NotSupported, measure


@pytest.fixture
def model():
    made = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=64, num_heads=2, depth=2)
    return made.eval().bfloat16()


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32).bfloat16()


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def test_onnx_runtime_gives_timms_logits(model, images):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    candidate = baselines.onnx_runtime(model)
    first = candidate(images)
    assert candidate.host and relative(first, model(images)) < 0.02
    again = candidate(-images)
    assert relative(again, model(-images)) < 0.02 and relative(first, model(images)) < 0.02


@torch.no_grad()
def test_torchaos_quantization_is_near_timms_logits(model, images):
    pytest.importorskip("torchao")
    candidate = baselines.torchao(model, "int8", compile_=False)
    assert 1e-4 < relative(candidate(images), model.double()(images.double())) < 0.06


@pytest.mark.parametrize("name", ["torchao", "tensorrt", "onnx_runtime"])
def test_a_library_that_is_missing_is_named(model, images, monkeypatch, name):
    for module in ("torchao.quantization", "torch_tensorrt", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    candidate = baselines.torchao(model, "fp8") if name == "torchao" else getattr(baselines, name)(model)
    with pytest.raises(NotInstalled):
        candidate(images)


def test_a_runtime_without_its_provider_says_so(model, images, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(NotSupported, match="this onnxruntime has no CPUExecutionProvider"):
        baselines.onnx_runtime(model)(images)


def test_agreement_is_the_share_of_equal_classes():
    def candidate(logits):
        return logits.flip(-1) * torch.tensor([[1.0], [0.0], [1.0]]) + logits * torch.tensor([[0.0], [1.0], [0.0]])

    logits = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 4.0]])
    (row,) = measure(
        {"flipped": candidate},
        lambda: (logits,),
        turns=2,
        expected=lambda logits: (logits.double(),),
        agreement=True,
    )
    assert row.agreement == pytest.approx(1 / 3)
    assert row.logit_error == pytest.approx((34 / 31) ** 0.5)  # 1 + 1 + 16 + 16 over 1 + 4 + 9 + 1 + 16
