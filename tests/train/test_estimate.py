"""Memory and time by arithmetic, against counts of real tensors and of the paper."""

import pytest
import torch

from fastdeit.train.config import Config, load_config
from fastdeit.train.estimate import describe_needs, gpu_hours, memory, teacher_gpu_hours
from fastdeit.train.models import create_student
from fastdeit.train.optimization import create_optimizer

TINY = dict(model_kwargs=dict(patch_size=8, embed_dim=32, num_heads=1, depth=2), img_size=16, teacher_kwargs={})


def student(**changes):
    config = load_config("digits").replace(**TINY, **changes)
    return config, create_student(config, 10, torch.device("cpu"))


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb", "lion"])
def test_memory_of_weights_and_optimizer_is_that_of_the_tensors(opt):
    config, model = student(opt=opt)
    optimizer = create_optimizer(config, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = sum(
        t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.dim()
    )
    found = memory(config, model)
    assert found["weights"] == found["gradients"] == sum(p.nbytes for p in model.parameters())
    assert found[f"state of {opt}"] == pytest.approx(kept)


def test_accumulation_and_checkpointing_keep_fewer_activations():
    config, model = student()
    whole, parts, again = (
        memory(c, model)["activations"]
        for c in (config, config.replace(grad_accum_steps=4), config.replace(grad_checkpointing=True))
    )
    assert parts == whole / 4 and again == whole * (4 * 2 + 36) / (36 * 2)


def test_hours_grow_with_updates_and_batch():
    config, model = student()
    hours = gpu_hours(config, model, 100)
    assert gpu_hours(config, model, 200) == pytest.approx(2 * hours)
    assert gpu_hours(config.replace(batch_size=128), model, 100) > 1.5 * hours


def test_the_teachers_arithmetic_is_the_papers():
    """RegNetY-16GF: 15.9 billion multiplications with addition for an image of 224 pixels."""
    config = Config(batch_size=1, teacher_model="regnety_160.deit_in1k")
    flops = 600e12 * 3600 * teacher_gpu_hours(config, 1000, 1)
    assert flops / 2 == pytest.approx(15.9e9, rel=0.02)


def test_models_without_costs_have_no_hours_but_memory():
    config, _ = student()
    lines = describe_needs(config, torch.nn.Linear(2, 2), 10, 5)
    assert any("no estimate for a Linear" in line for line in lines) and any("weights" in line for line in lines)


def test_cached_labels_cost_no_teacher():
    config, model = student()
    with_teacher, without = (
        "\n".join(describe_needs(c, model, 10, 5)) for c in (config, config.replace(teacher_cache="x.labels"))
    )
    assert "for the teacher" in with_teacher and "for the teacher" not in without
