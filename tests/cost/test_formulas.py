"""Cost formulas against counts made by hand."""

import pytest

from fastdeit.cost import formulas as costs

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


def test_an_activation_in_the_product_spares_an_mlp_one_reading_of_its_pre_activation():
    rows, channels, hidden = 198, 192, 768
    fused = costs.linear_forward(rows, channels, hidden, preactivation=True)
    fused += costs.linear_forward(rows, hidden, channels)
    apart = costs.mlp_forward(rows, channels, hidden)
    assert (apart.bytes - fused.bytes, apart.flops, apart.launches - fused.launches) == (
        2 * rows * hidden,
        fused.flops,
        1,
    )


def test_a_residual_in_the_product_is_read_and_written_in_its_own_width():
    plain, added = (costs.linear_forward(10, 6, 4, residual_bytes=width) for width in (None, 4))
    assert added.bytes - plain.bytes == 10 * 4 * (2 * 4 - 2)


def test_the_gradient_through_an_activation_moves_three_hidden_streams():
    assert costs.activation_gradient(10, 6, 24) == costs.Cost(2 * 10 * 6 * 24, 2 * (10 * 6 + 6 * 24 + 3 * 10 * 24), 2)


def test_an_mlp_branch_in_one_kernel_moves_12_of_48_bytes_a_token_and_channel():
    rows, channels, hidden = 198, 192, 768
    apart = costs.layer_norm_forward(rows, channels) + costs.mlp_forward(rows, channels, hidden)
    whole = costs.fused_mlp_forward(rows, channels, hidden, stream_bytes=4)
    weights, statistics = 4 * channels * hidden, 8 * rows
    assert apart.bytes == 48 * rows * channels + weights + statistics
    assert whole == costs.Cost(apart.flops, 12 * rows * channels + weights, 1)
    assert costs.fused_mlp_forward(rows, channels, hidden).bytes == 4 * rows * channels + weights


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


def test_two_layers_of_augmentation_move_seven_bytes_a_value():
    """uint8 in, out, in again; float32 out. An equalized image is read once more."""
    values = 1024 * 3 * 224 * 224
    assert costs.augment(1024, 3, 224, 224) == costs.Cost(0, 7 * values, 4)
    assert costs.augment(1024, 3, 224, 224, tabled=1024).bytes == 8 * values
    assert costs.augment(1, 1, 2, 2, layers=0, bicubic=1, out_bytes=1) == costs.Cost(4 * 84, 4 * 2, 2)
