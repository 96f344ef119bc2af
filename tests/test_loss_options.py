"""The losses' options are wrong where they are given, not in the first step; labels may be of a criterion's own kind."""

import pytest
import torch
from torch import nn

from fastdeit.losses import DistillationCrossEntropy, DistillationLoss

GOOD = dict(
    base_criterion=nn.CrossEntropyLoss(), teacher_model=nn.Linear(4, 3), distillation_type="hard", alpha=0.5, tau=1.0
)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(distillation_type="medium"), ValueError, "distillation_type: expected one of none, .* got 'medium'"),
        (dict(alpha=-0.1), ValueError, r"alpha: expected a weight in \[0, 1\], got -0.1"),
        (dict(alpha="0.5"), TypeError, "alpha: expected a number, got str"),
        (dict(tau=0.0), ValueError, "tau: expected a finite temperature > 0, got 0.0"),
        (dict(tau=float("inf")), ValueError, "tau: .* got inf"),
        (dict(tau=None), TypeError, "tau: expected a number, got NoneType"),
        (dict(teacher_model=None), ValueError, "teacher_model: expected a model with distillation_type 'hard'"),
        (dict(teacher_model="regnety_160"), TypeError, "teacher_model: expected a module or function, got str"),
        (dict(base_criterion=None), TypeError, "base_criterion: expected a module or function, got NoneType"),
    ],
)
def test_bad_options_of_deits_loss_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        DistillationLoss(**GOOD | changes)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("kind", "medium"),
        ("base", "hinge"),
        ("reduction", "median"),
        ("soft_divisor", "classes"),
        ("alpha", 2),
        ("tau", 0),
        ("label_smoothing", 1.0),
        ("alpha", None),
        ("tau", "3"),
    ],
)
def test_bad_options_of_the_cross_entropy_are_named_before_a_step(option, value):
    with pytest.raises((TypeError, ValueError), match=f"{option}: expected"):
        DistillationCrossEntropy(**{option: value})


def test_labels_of_a_criterions_own_kind_reach_it():
    class Mixed(nn.CrossEntropyLoss):
        """Mixup's two labels and the weight of the first."""

        def forward(self, outputs, labels):
            first, second, weight = labels
            return weight * super().forward(outputs, first) + (1 - weight) * super().forward(outputs, second)

    inputs, outputs = torch.randn(5, 4), torch.randn(2, 5, 3).unbind()
    labels = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 1, 0, 0, 2]), 0.3
    loss = DistillationLoss(**GOOD | dict(base_criterion=Mixed(), alpha=0.0))
    torch.testing.assert_close(loss(inputs, outputs, labels), Mixed()(outputs[0], labels))
