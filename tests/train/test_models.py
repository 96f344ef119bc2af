"""Student, teacher and readouts."""

import pytest
import timm
import torch
from torch import nn

from fastdeit.train.checkpoints import save_weights
from fastdeit.train.config import Config
from fastdeit.train.models import create_student, create_teacher, fold_batch_norm, has_distillation_head, head_logits

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


@pytest.mark.parametrize("memory", ["usual", "lean"])
def test_its_blocks_keep_what_the_configuration_says(memory):
    student = create_student(SMALL.replace(memory=memory), 3, CPU)
    assert {block.memory for block in student.blocks} == {memory}


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
    with pytest.raises(ValueError, match=r"model and model_kwargs: timm\.create_model.*colour"):
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


def checkpoint_of(model, path, **wrapped):
    torch.save({**wrapped, "model": model.state_dict()} if wrapped else model.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_another_resolution_and_other_classes_are_taken_up(tmp_path, suffix):
    """Every tensor but the heads as it was, positions as timm interpolates them."""
    import safetensors.torch
    from timm.layers import resample_abs_pos_embed

    source = create_student(SMALL.replace(seed=7), 5, CPU)
    path = tmp_path / f"source{suffix}"
    if suffix == ".pth":  # as facebookresearch/deit writes it
        checkpoint_of(source, path, epoch=3)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    target = create_student(
        SMALL.replace(img_size=2 * SMALL.img_size, finetune=str(path)), 3, CPU, initial_weights=True
    )
    fresh = create_student(SMALL.replace(img_size=2 * SMALL.img_size), 3, CPU)
    size = 2 * SMALL.img_size // SMALL.model_kwargs["patch_size"]
    positions = resample_abs_pos_embed(source.pos_embed, (size, size), num_prefix_tokens=2)
    torch.testing.assert_close(target.pos_embed, positions)
    for name, tensor in target.state_dict().items():
        if name.startswith("head"):
            assert torch.equal(tensor, fresh.state_dict()[name])
        elif name != "pos_embed":
            assert torch.equal(tensor, source.state_dict()[name]), name


def test_a_head_for_the_same_classes_is_kept(tmp_path):
    source = create_student(SMALL.replace(seed=7), 3, CPU)
    path = checkpoint_of(source, tmp_path / "source.pth")
    target = create_student(SMALL.replace(finetune=path), 3, CPU, initial_weights=True)
    assert torch.equal(target.head.weight, source.head.weight)
    assert torch.equal(target.head_dist.weight, source.head_dist.weight)


def test_fine_tuning_starts_from_whole_weights_of_the_same_model(tmp_path):
    deeper = SMALL.replace(model_kwargs=dict(SMALL.model_kwargs, depth=SMALL.model_kwargs["depth"] + 1))
    path = checkpoint_of(create_student(SMALL, 3, CPU), tmp_path / "source.pth")
    with pytest.raises(ValueError, match="from another model: it has no blocks"):
        create_student(deeper.replace(finetune=path), 3, CPU, initial_weights=True)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "source.pth").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.pth: cannot be read as a checkpoint"):
        create_student(SMALL.replace(finetune=str(tmp_path / "cut.pth")), 3, CPU, initial_weights=True)
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such checkpoint"):
        create_student(SMALL.replace(finetune=str(tmp_path / "none.pth")), 3, CPU, initial_weights=True)


def test_a_model_that_is_given_weights_needs_no_initial_ones():
    create_student(SMALL.replace(finetune="none.pth"), 3, CPU)


def test_a_uniform_drop_path_is_the_same_in_every_block():
    uniform = create_student(SMALL.replace(drop_path=0.3, drop_path_uniform=True), 3, CPU)
    rates = {drop.drop_prob for block in uniform.blocks for drop in (block.drop_path1, block.drop_path2)}
    assert rates == {0.3}
    rising = create_student(SMALL.replace(drop_path=0.3), 3, CPU)
    assert isinstance(rising.blocks[0].drop_path1, nn.Identity)


def test_distilling_into_the_class_token_needs_a_model_without_the_other():
    plain = SMALL.replace(model="deit_tiny_patch16_224", distil_class_token=True)
    assert not has_distillation_head(create_student(plain, 3, CPU))
    with pytest.raises(ValueError, match=r"distil_class_token: .* has a distillation token"):
        create_student(SMALL.replace(distil_class_token=True), 3, CPU)


@pytest.mark.parametrize("name", ["regnety_002", "resnet10t", "efficientnet_lite0"])
def test_folded_batch_norm_changes_rounding_alone(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    model, images = model.double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        before = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        torch.testing.assert_close(fold_batch_norm(model)(images), expected)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) < before or name != "regnety_002"


def test_weights_that_timm_does_not_have_are_an_error_of_the_field(small_config):
    config = small_config.replace(teacher_model="regnetz_005", teacher_kwargs={}, teacher_epochs=0)
    with pytest.raises(
        ValueError, match=r"teacher_model: timm's weights of 'regnetz_005' .*; teacher_checkpoint takes"
    ):
        create_teacher(config, 3, torch.device("cpu"))
