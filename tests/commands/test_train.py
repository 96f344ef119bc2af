"""fastdeit train and fastdeit eval as a user calls them."""

import pytest

from fastdeit.commands import cli
from fastdeit.train.config import FIELDS, load_config

SHORT = [
    "--threads",
    "1",
    "--batch-size",
    "32",
    "--lr",
    "4e-3",
    "--teacher-epochs",
    "2",
    "--epochs",
    "4",
    "--warmup-epochs",
    "1",
]
SMALL = [
    "--model-kwargs",
    "{patch_size: 8, embed_dim: 96, num_heads: 3, depth: 1}",
    "--teacher-model",
    "regnetx_002",
    "--teacher-kwargs",
    "{depth: 8, stem_width: 8}",
]
CHANCE, DEVIATION = 10.0, 1.6  # of guesses at 360 images of 10 classes, in percent


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert cli.main(["train", "--output", str(folder), *SHORT, *SMALL]) == 0
    return folder


def figures(text):
    """Label to last number of the printed table's rows."""
    rows = (line.rsplit(maxsplit=1) for line in text.splitlines())
    return {row[0].strip(): row[1] for row in rows if len(row) == 2 and row[0].startswith(("class", "dist", "both"))}


def test_a_shortened_default_run_learns_and_eval_says_the_same(digits_run, capsys):
    """Table 3's readout: far above chance after a few epochs, the same from the checkpoint alone."""
    import csv

    with (digits_run / "summary.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert all(float(last[f"top1_{head}"]) > CHANCE + 12 * DEVIATION for head in ("class", "distillation", "both"))
    assert cli.main(["eval", "--checkpoint", str(digits_run / "last.safetensors")]) == 0
    assert figures(capsys.readouterr().out) == {
        "class head": f"{float(last['top1_class']):.2f}",
        "distillation head": f"{float(last['top1_distillation']):.2f}",
        "both heads together": f"{float(last['top1_both']):.2f}",
    }


def test_eval_takes_a_folder(digits_run, capsys):
    assert cli.main(["eval", "--checkpoint", str(digits_run)]) == 0
    whole = figures(capsys.readouterr().out)
    assert cli.main(["eval", "--checkpoint", str(digits_run / "last.safetensors")]) == 0
    assert figures(capsys.readouterr().out) == whole


def test_eval_takes_the_teacher_too(digits_run, capsys):
    assert cli.main(["eval", "--checkpoint", str(digits_run / "teacher" / "last.safetensors")]) == 0
    assert "top-1" in capsys.readouterr().out.splitlines()[-1]


def test_eval_of_a_truncated_checkpoint_is_one_line(digits_run, tmp_path, capsys):
    path = tmp_path / "cut.safetensors"
    path.write_bytes((digits_run / "last.safetensors").read_bytes()[:-8])
    assert cli.main(["eval", "--checkpoint", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastdeit eval: {path}: cannot be read") and err.count("\n") == 1


def test_eval_on_images_of_other_classes_is_refused(digits_run, image_folder, capsys):
    assert cli.main(["eval", "--checkpoint", str(digits_run), "--data", str(image_folder)]) == 2
    assert "lacks 0, 1, 2, 3, 4 and 5 more and has digit-0, digit-1, digit-2 besides" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_overwritten(digits_run, capsys):
    before = {p: p.stat().st_mtime_ns for p in digits_run.rglob("*")}
    assert cli.main(["train", "--output", str(digits_run), *SHORT]) == 2
    assert "holds a run already; continue it with --resume auto" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in digits_run.rglob("*")} == before


def test_resume_takes_the_runs_own_configuration(digits_run, capsys):
    """Nothing but the folder is given, and the finished run only prints its results again."""
    assert cli.main(["train", "--resume", "auto", "--output", str(digits_run)]) == 0
    assert cli.main(["train", "--resume", str(digits_run / "last.state.pt")]) == 0
    out = capsys.readouterr().out
    assert "epoch   4/4" not in out and out.count("both heads together") == 2


def test_resume_with_another_field_is_refused(digits_run, capsys):
    assert cli.main(["train", "--resume", str(digits_run / "last.state.pt"), "--lr", "0.5"]) == 2
    assert "another configuration: lr (0.004 there, 0.5 now)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--resume", "nowhere.pt"], "resume: nowhere.pt is neither `auto` nor a file"),
        (["--epochs", "0"], "epochs: expected a value at least 1, got 0"),
        (["--config", "nothing"], "config: 'nothing' is neither a file nor one of"),
        (["--data", "nowhere"], "data: nowhere is neither `digits` nor a folder"),
        (["--device", "cuda:99"], "device: cuda:99 is not there"),
        (["--model-kwargs", "{depth: x"], "model_kwargs: '{depth: x' is not YAML"),
        (["--output", f"{__file__}/run"], f"output: {__file__} is a file, expected a folder"),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastdeit train: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--aa", "nope"], "aa: timm cannot make 'nope'"),
        (["--sched", "nope"], "sched: timm cannot make 'nope'"),
        (["--opt", "nope"], "opt: timm cannot make 'nope'"),
        (["--model", "deit_tiny_patch16_225"], "model: timm has no model 'deit_tiny_patch16_225'; close: deit_tiny"),
        (["--teacher-model", "regnety_2"], "teacher_model: timm has no model 'regnety_2'; close: regnety"),
        (["--teacher-epochs", "0", "--teacher-checkpoint", "no.pt"], "teacher_checkpoint: no.pt: no such checkpoint"),
    ],
)
def test_what_timm_does_not_know_is_named_and_nothing_is_written(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastdeit train: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_only_one_thing_can_be_done_instead_of_training(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--dry-run", "--throughput"])
    assert "--throughput: not allowed with argument --dry-run" in capsys.readouterr().err


def test_a_run_that_its_file_places_is_not_overwritten_either(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.state.pt").touch()
    (tmp_path / "mine.yaml").write_text(f"output: {tmp_path / 'out'}\n")
    assert cli.main(["train", "--config", str(tmp_path / "mine.yaml")]) == 2
    assert "out holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, near",
    [
        ("--epoch", "--epochs"),
        ("--teacher", "--teacher_lr"),
        ("--mix-up", "--mixup"),
        ("--distillation_alpa", "--distillation_alpha"),
    ],
)
def test_an_unknown_field_is_refused_before_anything_loads(option, near, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", option, "3"])
    assert stop.value.code == 2
    assert f"unrecognized arguments: {option} 3; did you mean {near}?" in capsys.readouterr().err


def test_an_unknown_field_in_a_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("learning_rate: 1\n")
    assert cli.main(["train", "--config", "mine.yaml"]) == 2
    assert "unknown field learning_rate" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_every_field_is_an_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in out for name in FIELDS)


def test_a_switch_needs_no_value(capsys):
    assert cli.main(["train", "--dry-run", "--compile", "--cuda-graphs", "--drop-path-uniform", "false", *SHORT]) == 0
    out = capsys.readouterr().out
    assert "\ncompile: true\n" in out and "\ncuda_graphs: true\n" in out and "\ndrop_path_uniform: false\n" in out


def test_a_dry_run_describes_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--dry-run", "--lr", "2e-3", "--drop_path", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "lr: 0.002\n" in out and "drop_path: 0.1\n" in out
    config = load_config()
    assert f"1437 training and 360 validation images of 10 classes; {1437 // config.batch_size} updates" in out
    assert "weight decay 0: " in out and "weight decay 0.05: " in out and "    dist_token\n" in out
    assert f"     0  {config.warmup_lr:.4e}" in out
    assert " GB  weights\n" in out and " GB  state of adamw\n" in out and " GB  activations\n" in out
    assert "GPU-hours for the student, by arithmetic" in out and "for the teacher" in out
    assert not list(tmp_path.iterdir())


def test_data_is_measured_and_nothing_is_written(small_config, tmp_path, monkeypatch, capsys):
    import yaml

    from fastdeit.train import measure

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure.measure_data, "__defaults__", (0.1,))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small_config.as_dict()))
    assert cli.main(["train", "--measure-data", "--config", "small.yaml"]) == 0
    out = capsys.readouterr().out
    assert "images/s with 0 workers" in out and "is the bottleneck" in out
    assert [p.name for p in tmp_path.iterdir()] == ["small.yaml"]


def test_new_runs_are_numbered_and_auto_finds_the_last(tmp_path, monkeypatch):
    from fastdeit.commands.train import latest_folder, new_folder

    monkeypatch.chdir(tmp_path)
    config = load_config()
    assert latest_folder(config) is None
    for expected in ("runs/digits", "runs/digits-2", "runs/digits-3"):
        folder = new_folder(config)
        assert str(folder) == expected
        folder.mkdir(parents=True)
        (folder / "last.state.pt").touch()
        assert latest_folder(config) == folder


def test_a_missing_extra_says_how_to_install_it(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "fastdeit train: training needs scikit-learn: pip install 'fastdeit[train]'\n"
    assert cli.main(["eval", "--checkpoint", "x"]) == 2
    assert "pip install 'fastdeit[train]'" in capsys.readouterr().err


def test_auto_takes_the_run_whose_state_is_newest(tmp_path, monkeypatch):
    """Whatever its number, and whether or not those before it are there; of one that has not saved yet, its lock counts."""
    import os

    from fastdeit.commands.train import latest_folder, new_folder

    monkeypatch.chdir(tmp_path)
    config = load_config()
    runs = tmp_path / "runs"
    for name, file, written in (
        ("digits", "last.state.pt", 30),
        ("digits-3", "last.state.pt", 20),
        ("digits-4", "teacher/previous.state.pt", 40),
        ("digits-5", "args.yaml", 90),  # of a run that ended before it saved anything
        ("digits-x", "last.state.pt", 90),  # another configuration's
        ("other", "last.state.pt", 90),
    ):
        path = runs / name / file
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (written, written))
    assert latest_folder(config).name == "digits-4" and new_folder(config).name == "digits-2"
    (runs / "digits-4/last.state.pt").touch()
    os.utime(runs / "digits-4/last.state.pt", (10, 10))
    assert latest_folder(config).name == "digits-4"
    os.utime(runs / "digits/last.state.pt", (50, 50))
    assert latest_folder(config).name == "digits"
    os.utime(runs / "digits-3/last.state.pt", (50, 50))
    assert latest_folder(config).name == "digits-3"  # the higher number of two
    (runs / "digits-2").mkdir()
    (runs / "digits-2/run.lock").touch()
    assert latest_folder(config).name == "digits-2" and new_folder(config).name == "digits-5"
    assert latest_folder(config.replace(output="elsewhere")).name == "elsewhere"
