"""Student, teacher and readouts."""

import pytest
import timm
import torch

from fastdeit.train.checkpoints import save_weights
from fastdeit.train.config import Config
from fastdeit.train.models import create_student, create_teacher, head_logits

CPU = torch.device("cpu")
SMALL = Config(
    img_size=16, model_kwargs=dict(patch_size=8, embed_dim=32, num_heads=1, depth=1), teacher_model="regnetx_002"
)


def test_the_seed_decides_the_initial_weights():
    torch.manual_seed(7)
    first = create_student(SMALL, 3, CPU).state_dict()
    again, other = (create_student(SMALL.replace(seed=seed), 3, CPU).state_dict() for seed in (0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_the_student_is_accelerated_unless_told_otherwise():
    assert type(create_student(SMALL, 3, CPU).blocks[0]).__module__.startswith("fastdeit")
    assert type(create_student(SMALL.replace(accelerate=False), 3, CPU).blocks[0]).__module__.startswith("timm")


def test_both_heads_together_are_what_the_model_predicts():
    model = create_student(SMALL, 3, CPU).eval()
    images = torch.randn(2, 3, 16, 16)
    readouts = head_logits(model, images)
    assert list(readouts) == ["class", "distillation", "softmax", "both"]
    softmaxes = readouts["class"].softmax(1) + readouts["distillation"].softmax(1)
    torch.testing.assert_close(readouts["softmax"].exp(), softmaxes)
    assert torch.equal(readouts["both"], model(images))
    model.train()
    class_logits, distillation_logits = timm_pair(model, images)
    torch.testing.assert_close(readouts["class"], class_logits)
    torch.testing.assert_close(readouts["distillation"], distillation_logits)


def timm_pair(model, images):
    """The pair that timm's model returns in distilled training, without stochastic depth."""
    for module in model.modules():
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
    return model(images)


def test_any_other_model_has_one_readout():
    model = timm.create_model("regnetx_002", num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(head_logits(model, images)["top1"], model(images))


def test_distillation_needs_a_distillation_head():
    with pytest.raises(ValueError, match="model: deit_tiny_patch16_224 has no distillation token"):
        create_student(SMALL.replace(model="deit_tiny_patch16_224"), 3, CPU)


def test_an_unknown_model_is_named_with_close_ones():
    with pytest.raises(ValueError, match=r"model: timm has no model 'deit_small_distilled'; close: deit_small_dist"):
        create_student(SMALL.replace(model="deit_small_distilled"), 3, CPU)


def test_an_argument_that_the_model_does_not_take_is_named():
    with pytest.raises(ValueError, match=r"model: timm\.create_model.*colour"):
        create_student(SMALL.replace(model_kwargs=dict(colour=1)), 3, CPU)


@pytest.fixture
def teacher_weights(tmp_path):
    model = timm.create_model("regnetx_002", num_classes=3)
    save_weights(tmp_path / "teacher.safetensors", model.state_dict(), SMALL, ("a", "b", "c"))
    return tmp_path / "teacher.safetensors", model


def test_the_teacher_does_not_learn(teacher_weights):
    path, model = teacher_weights
    teacher = create_teacher(SMALL.replace(teacher_checkpoint=str(path)), 3, CPU)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(teacher(images), model.eval()(images))


def test_weights_of_another_teacher_are_refused(teacher_weights):
    with pytest.raises(ValueError, match=r"teacher\.safetensors: from another model"):
        create_teacher(SMALL.replace(teacher_model="regnety_002", teacher_checkpoint=str(teacher_weights[0])), 3, CPU)
