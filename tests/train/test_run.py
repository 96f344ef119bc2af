"""A run's folder, and that interrupting it changes nothing."""

import csv
import json
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastdeit.train import run
from fastdeit.train.checkpoints import load_state
from fastdeit.train.config import config_from
from fastdeit.train.engine import Trainer
from fastdeit.train.monitor import NonFiniteLossError


def summary(folder):
    with (folder / "summary.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "data_wait", "mfu")}
            for row in csv.DictReader(file)
        ]


def same_files(a, b, name):
    a, b = load_file(a / name), load_file(b / name)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


WEIGHTS = ("last.safetensors", "best.safetensors", "ema.safetensors", "teacher/last.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "whole"


@pytest.fixture
def whole(uninterrupted, small_config):
    """The folder of a run from start to end, made once."""
    if not uninterrupted.exists():
        run.train(small_config, uninterrupted)
    return uninterrupted


def test_a_run_leaves_its_folder(whole, small_config):
    found = {str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()}
    student = {
        "last.safetensors",
        "best.safetensors",
        "last.state.pt",
        "previous.state.pt",
        "summary.csv",
        "curves.png",
    }
    once = {"args.yaml", "ema.safetensors", "report.md", "report.html", "results.json"}
    assert found == student | {f"teacher/{name}" for name in student} | once
    saved = config_from(yaml.safe_load((whole / "args.yaml").read_text()))
    assert saved.decoder != "auto" and saved.replace(decoder="auto") == small_config
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = summary(whole)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] and len(summary(whole / "teacher")) == 2
    assert {"train_loss", "val_loss", "lr", "top1_class", "top1_distillation", "top1_both", "ema_top1_both"} <= set(
        rows[0]
    )


def test_the_report_says_what_the_summary_says(whole):
    results = json.loads((whole / "results.json").read_text())
    last = summary(whole)[-1]
    for name in ("class", "distillation", "softmax", "both"):
        assert str(results["top1"]["last epoch"][name]) == last[f"top1_{name}"]
        assert str(results["top1"]["moving average"][name]) == last[f"ema_top1_{name}"]
    wrong = {b: share for a, b, share in results["disagreement"] if a == "ground truth"}
    assert 100 * (1 - wrong["both"]) == pytest.approx(float(last["top1_both"]))
    assert 100 * (1 - wrong["teacher"]) == pytest.approx(results["teacher_top1"])
    assert len(results["token_cosines"]) == 3


def test_trackers_are_told_each_epoch_of_the_student(small_config, tmp_path, monkeypatch):
    class Told:
        rows, closed = [], False

        def log(self, row):
            self.rows.append(row["epoch"])

        def close(self):
            self.closed = True

    told = Told()
    monkeypatch.setattr(run, "create_trackers", lambda config, folder, first: [told])
    run.train(small_config, tmp_path / "run")
    assert told.rows == [0, 1, 2] and told.closed


def test_a_missing_tracker_is_named_before_anything_is_written(small_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        run.train(small_config.replace(wandb="deit"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_same_seed_gives_the_same_bits(whole, small_config, tmp_path):
    run.train(small_config, tmp_path / "again")
    assert all(same_files(whole, tmp_path / "again", name) for name in WEIGHTS)
    assert summary(whole) == summary(tmp_path / "again")


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("at", ["teacher, in epoch 1", "student, in epoch 1", "student, after the state of epoch 1"])
def test_an_interrupted_run_resumes_to_the_same_bits(whole, small_config, tmp_path, monkeypatch, at):
    train_epoch, export = Trainer.train_epoch, run.Fit._export
    who = "regnetx" if at.startswith("teacher") else "deit"

    def interrupted_epoch(trainer, epoch, progress):
        loss = train_epoch(trainer, epoch, progress)
        if trainer.config.model.startswith(who) and epoch == 1:
            raise Interrupted
        return loss

    def interrupted_export(fit):
        if fit.config.model.startswith(who) and len(fit.history) == 2:
            raise Interrupted
        export(fit)

    with monkeypatch.context() as patch:
        if "after" in at:
            patch.setattr(run.Fit, "_export", interrupted_export)
        else:
            patch.setattr(Trainer, "train_epoch", interrupted_epoch)
        with pytest.raises(Interrupted):
            run.train(small_config, tmp_path)
    run.train(small_config, tmp_path, resume=True)
    assert all(same_files(whole, tmp_path, name) for name in WEIGHTS)
    assert summary(whole) == summary(tmp_path)


def test_a_finished_run_resumed_stays_as_it_is(whole, small_config, monkeypatch):
    before = {name: (whole / name).read_bytes() for name in WEIGHTS}
    monkeypatch.setattr(Trainer, "train_epoch", lambda *args: pytest.fail("trained again"))
    result = run.train(small_config, whole, resume=True)
    assert {name: (whole / name).read_bytes() for name in WEIGHTS} == before
    assert str(result.last["both"]) == summary(whole)[-1]["top1_both"]


def test_a_state_of_another_configuration_is_refused_and_kept(whole, small_config):
    before = (whole / "args.yaml").read_text()
    with pytest.raises(
        ValueError, match=r"last\.state\.pt: from a run with another configuration: seed \(0 there, 9 now\)"
    ):
        run.train(small_config.replace(seed=9), whole, resume=True)
    assert (whole / "args.yaml").read_text() == before


def test_a_truncated_state_is_refused_and_kept(whole, small_config, tmp_path):
    content = (whole / "last.state.pt").read_bytes()[:-1000]
    (tmp_path / "last.state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.state\.pt: cannot be read .*truncated"):
        run.train(small_config, tmp_path, resume=True)
    assert (tmp_path / "last.state.pt").read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(whole, small_config, tmp_path, monkeypatch):
    train_step = Trainer._train_step

    def diverge(trainer, epoch, images, classes):
        if trainer.config.model.startswith("deit") and trainer.step == 4:
            with torch.no_grad():
                trainer.model.head.bias.fill_(float("nan"))
        return train_step(trainer, epoch, images, classes)

    monkeypatch.setattr(Trainer, "_train_step", diverge)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 4 \(epoch 1\); the last finite one was \d"):
        run.train(small_config, tmp_path)
    state = load_state(tmp_path / "last.state.pt")
    assert state["epoch"] == 1 and all(t.isfinite().all() for t in state["model"].values())
    assert len(summary(tmp_path)) == 1 and summary(tmp_path) == summary(whole)[:1]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data="none"), "data: none is neither"),
        (dict(batch_size=98), "batch_size: 98 is more than the 96 training images"),
        (dict(opt="nothing"), "opt: timm cannot make 'nothing'"),
        (dict(model="deit_tiny_patch16_224"), "model: deit_tiny_patch16_224 has no distillation token"),
        (dict(teacher_epochs=0, teacher_checkpoint="none.safetensors"), "none.safetensors: no such checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(small_config, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run.train(small_config.replace(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_teacher_serves_another_run(whole, small_config, tmp_path):
    """Its weights in place of training it again give the same student."""
    weights = str(whole / "teacher" / "last.safetensors")
    run.train(small_config.replace(teacher_epochs=0, teacher_checkpoint=weights), tmp_path)
    assert same_files(whole, tmp_path, "last.safetensors") and summary(whole) == summary(tmp_path)


def test_fine_tuning_at_a_higher_resolution_goes_on_distilling(whole, small_config, tmp_path):
    """Student and teacher both see the larger images; the weights are those of the run before, positions interpolated."""
    config = small_config.replace(
        img_size=32,
        epochs=1,
        warmup_epochs=0,
        teacher_epochs=0,
        lr=1e-12,
        warmup_lr=0.0,
        min_lr=0.0,
        model_ema_decay=0.0,
        finetune=str(whole / "last.safetensors"),
        teacher_checkpoint=str(whole / "teacher" / "last.safetensors"),
    )
    result = run.train(config, tmp_path)
    assert result.teacher_top1 is not None and {"class", "distillation", "both"} <= set(result.last)
    before, after = (load_file(folder / "last.safetensors") for folder in (whole, tmp_path))
    assert after["pos_embed"].shape[1] == 16 + 2
    for name in before.keys() - {"pos_embed"}:
        torch.testing.assert_close(after[name], before[name], atol=1e-9, rtol=0)


def test_without_distillation_there_is_one_readout_and_no_teacher(small_config, tmp_path):
    config = small_config.replace(
        distillation_type="none", model="deit_tiny_patch16_224", epochs=2, model_ema_decay=0.0, teacher_epochs=0
    )
    result = run.train(config, tmp_path)
    assert set(result.last) == {"loss", "top1"} and result.ema is None and result.teacher_top1 is None
    assert not (tmp_path / "teacher").exists() and not (tmp_path / "ema.safetensors").exists()


def test_threads_and_determinism_are_as_before_afterwards(small_config, tmp_path):
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ValueError):
        run.train(small_config.replace(data=str(tmp_path / "none"), threads=before[0] + 1), tmp_path / "out")
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
