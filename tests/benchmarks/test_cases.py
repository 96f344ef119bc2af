"""What matters most is measured first."""

from fastdeit.benchmarks.cases import by_importance, label


def test_values_that_stand_first_come_first():
    cases = by_importance(["a", "b"], [1, 2, 3])
    assert cases == [("a", 1), ("a", 2), ("b", 1), ("a", 3), ("b", 2), ("b", 3)]


def test_a_label_names_every_value():
    assert label(((197, 12, 64), 256, "forward")) == "197x12x64-256-forward"
