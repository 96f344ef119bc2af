"""What fine-tuning starts from where the weights are of other classes or have no distillation token."""

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from fastdeit.train.checkpoints import save_weights
from fastdeit.train.config import Config, config_from
from fastdeit.train.models import create_student

CPU = torch.device("cpu")
SMALL = Config(
    img_size=16, model_kwargs=dict(patch_size=8, embed_dim=32, num_heads=1, depth=1), teacher_model="regnetx_002"
)
NAMES = ("a", "b", "c")


def started(path, classes=NAMES, **changes):
    config = SMALL.replace(finetune=str(path), seed=3, **changes)
    return create_student(config, len(classes), CPU, initial_weights=True, classes=classes)


@pytest.fixture
def checkpoint(tmp_path):
    source = create_student(SMALL.replace(seed=7), 3, CPU)
    save_weights(tmp_path / "source.safetensors", source.state_dict(), SMALL, NAMES)
    return tmp_path / "source.safetensors", source


def test_heads_for_the_same_names_are_taken_over(checkpoint, capsys):
    path, source = checkpoint
    model = started(path)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "classes, words",
    [
        (("a", "b", "d"), "the data lacks c and has d besides"),
        (("a", "c", "b"), "has another order: class 1 is c, not b"),
    ],
)
def test_heads_for_other_names_are_refused_or_started_anew(checkpoint, capsys, classes, words):
    path, source = checkpoint
    with pytest.raises(
        ValueError, match=rf"finetune: .*source\.safetensors has heads for other classes: .*{words}; finetune_new"
    ):
        started(path, classes)
    model = started(path, classes, finetune_new_head=True)
    fresh = create_student(SMALL.replace(seed=3), 3, CPU).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (fresh if name.startswith("head") else source.state_dict())[name]), name
    assert (
        "head.weight, head.bias, head_dist.weight, head_dist.bias start from initial values" in capsys.readouterr().err
    )


def test_heads_for_another_number_of_classes_start_anew_and_are_named(checkpoint, capsys):
    path, source = checkpoint
    model = started(path, ("a", "b"))
    assert model.head.weight.shape == (2, 32) and torch.equal(
        model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight
    )
    assert (
        "head.weight, head.bias, head_dist.weight, head_dist.bias start from initial values" in capsys.readouterr().err
    )


def test_weights_of_others_name_no_classes(tmp_path):
    source = create_student(SMALL.replace(seed=7), 3, CPU)
    torch.save({"model": source.state_dict()}, tmp_path / "deit.pth")
    assert torch.equal(started(tmp_path / "deit.pth").head.weight, source.head.weight)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("size", [16, 32])
def test_a_plain_model_gives_a_distilled_one_all_but_the_distillation_token(tmp_path, capsys, size, wrapped):
    """Token, its position and its head are those that the recipe starts from; patches' positions are timm's interpolation."""
    torch.manual_seed(1)
    plain = timm.create_model("deit_tiny_patch16_224", num_classes=3, img_size=16, **SMALL.model_kwargs)
    weights = plain.state_dict()
    torch.save({"model": weights} if wrapped else weights, tmp_path / "plain.pth")
    model = started(tmp_path / "plain.pth", img_size=size).state_dict()
    fresh = create_student(SMALL.replace(seed=3, img_size=size), 3, CPU).state_dict()
    for name, tensor in model.items():
        if name == "pos_embed":
            assert torch.equal(tensor[:, :1], weights[name][:, :1])
            assert torch.equal(tensor[:, 1:2], fresh[name][:, 1:2])
            patches = resample_abs_pos_embed(weights[name][:, 1:], (size // 8, size // 8), num_prefix_tokens=0)
            torch.testing.assert_close(tensor[:, 2:], patches)
        else:
            assert torch.equal(tensor, fresh[name] if "dist" in name else weights[name]), name
    err = capsys.readouterr().err
    assert (
        "plain.pth has no distillation token: dist_token, its position and head_dist start from initial values" in err
    )


PLAIN = dict(model="deit_tiny_patch16_224", distillation_type="none", teacher_model=None)


def test_the_one_head_of_a_plain_model_is_compared_by_name(tmp_path):
    config = SMALL.replace(seed=7, **PLAIN)
    save_weights(tmp_path / "plain.safetensors", create_student(config, 3, CPU).state_dict(), config, NAMES)
    with pytest.raises(ValueError, match=r"has heads for other classes: .*the data has another order"):
        started(tmp_path / "plain.safetensors", ("a", "c", "b"))


def test_a_plain_model_starts_a_plain_one(tmp_path):
    source = create_student(SMALL.replace(seed=7, **PLAIN), 3, CPU).state_dict()
    torch.save(source, tmp_path / "plain.pth")
    model = started(tmp_path / "plain.pth", **PLAIN).state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.items())


def test_averaged_weights_beside_the_trained_ones_are_left(tmp_path):
    trained, averaged = (create_student(SMALL.replace(seed=seed), 3, CPU).state_dict() for seed in (7, 8))
    torch.save({"model": trained, "model_ema": averaged}, tmp_path / "both.pth")
    assert torch.equal(started(tmp_path / "both.pth").head.weight, trained["head.weight"])


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"finetune: .*gone\.pth: no such checkpoint"):
        started(tmp_path / "gone.pth")


def test_a_distilled_model_does_not_fit_a_plain_one(checkpoint):
    with pytest.raises(ValueError, match=r"finetune: .*source\.safetensors: .*"):
        started(checkpoint[0], **PLAIN)


@pytest.mark.parametrize("content", [{"model": 3}, [1, 2], {"epoch": 5}, {"model": {"head.weight": "text"}}])
def test_a_file_of_something_else_is_named(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"finetune: .*odd\.pth: "):
        started(tmp_path / "odd.pth")


def test_new_heads_without_weights_to_start_from_are_a_contradiction():
    with pytest.raises(ValueError, match="finetune_new_head: belongs to finetune, which is not given"):
        config_from(dict(finetune_new_head=True))
