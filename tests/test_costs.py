"""Cost formulas against counts made by hand."""

import pytest

from fastdeit import costs

B, C = 256, 1000


def test_hard_distillation_from_cached_labels_moves_12_bytes_per_class_of_a_row():
    """Two bf16 heads read forward, read again backward, two gradients written; beside them a few values per row."""
    options = dict(teacher_labels=True, target_bytes=8, teacher_bytes=2)
    forward = costs.distillation_cross_entropy_forward(B, C, **options)
    backward = costs.distillation_cross_entropy_backward(B, C, target_bytes=8)
    per_row = (8 + 2 + 4 + 4) + (8 + 4)  # labels, the row's loss twice; labels again
    assert (forward + backward).bytes == 12 * B * C + per_row * B


def test_one_head_for_both_terms_is_read_once():
    two = costs.distillation_cross_entropy_forward(B, C)
    one = costs.distillation_cross_entropy_forward(B, C, one_head=True)
    assert two.bytes - one.bytes == 2 * B * C and two.flops == one.flops


@pytest.mark.parametrize(("reduction", "launches"), [("mean", 3), ("sum", 3), ("none", 2)])
def test_launches_of_the_distillation_loss(reduction, launches):
    forward = costs.distillation_cross_entropy_forward(B, C, reduction=reduction)
    assert (forward + costs.distillation_cross_entropy_backward(B, C)).launches == launches


def test_a_soft_teacher_is_read_forward_and_backward():
    options = dict(kind="soft", soft_target=True, target_bytes=4, teacher_bytes=2)
    forward = costs.distillation_cross_entropy_forward(B, C, **options)
    backward = costs.distillation_cross_entropy_backward(B, C, **options)
    assert forward.bytes == (2 + 2 + 4 + 2) * B * C + 8 * B
    assert backward.bytes == (2 + 2 + 4 + 2 + 2 + 2) * B * C
