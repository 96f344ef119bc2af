"""Disagreement and token cosines against what they are by definition."""

import itertools

import pytest
import torch
from torch import nn

from fastdeit.train.analysis import disagreement, matrix, token_cosines
from fastdeit.train.models import create_student

CPU = torch.device("cpu")


@pytest.fixture
def student(small_config):
    return create_student(small_config, 3, CPU)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, 16, 16, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for size in (4, 3)
    ]


class Always(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return nn.functional.one_hot(torch.full((len(images),), self.answer), 3).float()


def test_disagreement_is_the_share_of_different_decisions(student, batches, small_config):
    pairs = disagreement(student, Always(2), batches, small_config, CPU)
    names = ["ground truth", "teacher", "class", "distillation", "softmax", "both"]
    assert list(pairs) == list(itertools.combinations(names, 2))
    classes = torch.cat([c for _, c in batches])
    assert pairs["ground truth", "teacher"] == pytest.approx((classes != 2).double().mean().item())
    with torch.no_grad():
        own = torch.cat([student.eval()(images).argmax(1) for images, _ in batches])
    assert pairs["ground truth", "both"] == pytest.approx((own != classes).double().mean().item())
    assert pairs["teacher", "both"] == pytest.approx((own != 2).double().mean().item())


def test_a_model_agrees_with_itself(student, batches, small_config):
    pairs = disagreement(student, student, batches, small_config, CPU)
    assert pairs["teacher", "both"] == 0.0


def test_without_a_teacher_and_without_a_second_head(batches, small_config):
    pairs = disagreement(Always(0), None, batches, small_config, CPU)
    assert list(pairs) == [("ground truth", "top1")]


def test_modes_are_left_as_they_were(student, batches, small_config):
    teacher = Always(0).train()
    student.train()
    disagreement(student, teacher, batches, small_config, CPU)
    token_cosines(student, batches, small_config, CPU)
    assert student.training and teacher.training


def test_cosines_are_of_the_tokens_after_each_block(student, batches, small_config):
    found, seen = [], []
    for block in student.blocks:
        block.register_forward_hook(lambda _m, _i, tokens: found.append(tokens))
    cosines = token_cosines(student, batches, small_config, CPU)
    for block in range(len(student.blocks)):
        tokens = torch.cat(found[block :: len(student.blocks)])
        seen.append(nn.functional.cosine_similarity(tokens[:, 0], tokens[:, 1], dim=-1).mean().item())
    assert cosines[1:] == pytest.approx(seen, abs=1e-6)
    with torch.no_grad():
        student.dist_token.copy_(-2 * student.cls_token)
    assert token_cosines(student, batches, small_config, CPU)[0] == pytest.approx(-1)


def test_one_token_alone_is_refused(batches, small_config):
    with pytest.raises(ValueError, match="Always has no distillation token"):
        token_cosines(Always(0), batches, small_config, CPU)


def test_the_matrix_is_symmetric():
    names, rows = matrix({("a", "b"): 0.1, ("a", "c"): 0.2, ("b", "c"): 0.3})
    assert names == ["a", "b", "c"]
    assert rows == [[0, 0.1, 0.2], [0.1, 0, 0.3], [0.2, 0.3, 0]]
