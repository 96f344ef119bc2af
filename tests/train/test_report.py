"""results.json and report.md of finished runs."""

import json

import pytest

from fastdeit.train.report import REPORT, RESULTS, citations, write_results

COLUMNS = {
    "last epoch": {"loss": 0.5, "class": 70.0, "distillation": 71.0, "softmax": 72.5, "both": 72.0},
    "moving average": {"loss": 0.4, "class": 73.0, "distillation": 74.0, "softmax": 74.5, "both": 75.0},
}
PAIRS = {("ground truth", "teacher"): 0.1, ("ground truth", "class"): 0.25, ("teacher", "class"): 0.125}


def finish(folder, config, top1=72.0, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    columns = {title: dict(column) for title, column in COLUMNS.items()}
    columns["last epoch"]["both"] = top1
    write_results(folder, config.replace(**changes).as_dict(), "a CPU", columns, 90.0, PAIRS, [0.06, 0.5, 0.93])
    return (folder / REPORT).read_text()


def rows(text, title):
    """The table below a heading, as lists of cells."""
    section = text.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_the_report_has_every_figure(tmp_path, small_config):
    text = finish(tmp_path / "run", small_config)
    assert rows(text, "Validation top-1 (%)") == [
        ["", "last epoch", "moving average"],
        [f"teacher ({small_config.teacher_model})", "90.00", "90.00"],
        ["class head", "70.00", "73.00"],
        ["distillation head", "71.00", "74.00"],
        ["sum of softmaxes", "72.50", "74.50"],
        ["both heads together", "72.00", "75.00"],
    ]
    assert rows(text, "Who disagrees with whom") == [
        ["", "ground truth", "teacher", "class head"],
        ["ground truth", "0.0", "10.0", "25.0"],
        ["teacher", "10.0", "0.0", "12.5"],
        ["class head", "25.0", "12.5", "0.0"],
    ]
    assert rows(text, "How alike the two tokens are") == [
        ["", "learned", "block 1", "block 2"],
        ["cosine", "0.060", "0.500", "0.930"],
    ]
    assert "touvron2021training" in text and "torch " in text and "seeds" not in text


def test_the_results_read_back(tmp_path, small_config):
    finish(tmp_path / "run", small_config)
    results = json.loads((tmp_path / "run" / RESULTS).read_text())
    assert results["config"] == small_config.as_dict()
    assert results["top1"] == COLUMNS and results["teacher_top1"] == 90.0
    assert {(a, b): share for a, b, share in results["disagreement"]} == PAIRS


def test_runs_that_differ_in_the_seed_alone_are_summed_up(tmp_path, small_config):
    finish(tmp_path / "a", small_config, 70.0)
    finish(tmp_path / "b", small_config, 73.0, seed=1, workers=2, output="elsewhere")
    finish(tmp_path / "c", small_config, 10.0, seed=2, lr=0.5)  # not a repetition
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / RESULTS).write_text("{}")  # not ours
    text = finish(tmp_path / "e", small_config, 76.0, seed=3)
    table = rows(text, "Over 3 seeds")
    assert table[0] == ["", "mean ± deviation", "seed 0", "seed 1", "seed 3"]
    assert ["both heads together, last epoch", "73.00 ± 3.00", "70.00", "73.00", "76.00"] in table
    assert ["class head, last epoch", "70.00 ± 0.00", "70.00", "70.00", "70.00"] in table


def test_the_same_seed_twice_counts_once(tmp_path, small_config):
    finish(tmp_path / "a", small_config, 70.0)
    assert "seeds" not in finish(tmp_path / "b", small_config, 73.0)


@pytest.mark.parametrize("model, deit3", [("deit3_base_patch16_224", True), ("deit_base_patch16_224", False)])
def test_what_was_used_is_cited(small_config, model, deit3):
    text = "\n".join(citations(small_config.replace(model=model).as_dict()))
    assert "touvron2021training" in text and ("touvron2022deit" in text) is deit3
