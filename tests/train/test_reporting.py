"""The table, the summary and the curves."""

import csv

from fastdeit.train.reporting import epoch_line, results_table, write_curves, write_summary

HISTORY = [
    dict(epoch=e, train_loss=2.0 - e, val_loss=1.5 - e, top1_class=50.0 + e, top1_distillation=51.0, top1_both=52.0)
    for e in range(2)
]


def test_the_table_has_a_row_per_readout_and_a_column_per_set_of_weights():
    last = {"loss": 0.1, "class": 95.0, "distillation": 96.125, "both": 97.0}
    table = results_table({"last epoch": last, "moving average": dict(last, both=98.0)}, ("regnety_002", 99.0))
    rows = [line.split() for line in table.splitlines()]
    assert rows == [
        ["validation", "top-1", "(%)", "last", "epoch", "moving", "average"],
        ["teacher", "(regnety_002)", "99.00"],
        ["class", "head", "95.00", "95.00"],
        ["distillation", "head", "96.12", "96.12"],
        ["both", "heads", "together", "97.00", "98.00"],
    ]


def test_a_line_has_every_readout_and_a_lone_one_without_its_name():
    assert epoch_line(dict(HISTORY[0], lr=0.1), 2).endswith("top-1: class 50.00  distillation 51.00  both 52.00")
    assert epoch_line(dict(epoch=0, train_loss=1.0, lr=0.1, top1_top1=97.0), 2).endswith("top-1: 97.00")


def test_the_summary_reads_back(tmp_path):
    write_summary(tmp_path / "summary.csv", HISTORY)
    with (tmp_path / "summary.csv").open() as file:
        assert [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)] == HISTORY


def test_one_epoch_is_seen_in_the_curves_and_epochs_are_counted_from_1(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **options: drawn.append(figure) or save(figure, *args, **options)
    )
    write_curves(tmp_path / "curves.png", HISTORY[:1], teacher_top1=None)
    lines = [line for axes in drawn[0].axes for line in axes.lines]
    assert all(line.get_marker() != "None" and list(line.get_xdata()) == [1] for line in lines) and len(lines) == 5


def test_the_curves_are_a_picture(tmp_path):
    from PIL import Image

    write_curves(tmp_path / "curves.png", HISTORY, teacher_top1=98.0)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.width > 600 and len(image.convert("L").getcolors()) > 10
