"""What trackers are told, with stand-ins for the packages, which are optional."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from fastdeit.train.tracking import check_packages, create_trackers

ROW = {"epoch": 3, "train_loss": 1.5, "top1_both": 70.0}


@pytest.fixture
def told(monkeypatch):
    """Installs both stand-ins; what they are told, in order."""
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append(("writer", folder, purge_step))

        def add_scalar(self, *arguments):
            calls.append(arguments)

        def flush(self):
            calls.append("flush")

        def close(self):
            calls.append("close")

    def init(**options):
        calls.append(options)
        return SimpleNamespace(
            log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finish")
        )

    for name, attributes in (("torch.utils.tensorboard", {"SummaryWriter": SummaryWriter}), ("wandb", {"init": init})):
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_by_default_nothing_is_tracked(small_config, tmp_path, told):
    assert create_trackers(small_config, tmp_path, 0) == [] and told == []


def test_tensorboard_is_told_each_figure_by_epoch(small_config, tmp_path, told):
    (tracker,) = create_trackers(small_config.replace(tensorboard=True), tmp_path, 3)
    tracker.log(ROW)
    tracker.close()
    first = ("writer", str(tmp_path / "tensorboard"), 3)
    assert told == [first, ("train_loss", 1.5, 3), ("top1_both", 70.0, 3), "flush", "close"]


def test_wandb_goes_on_in_the_same_run(small_config, tmp_path, told):
    config = small_config.replace(wandb="deit", name="mine")
    for _ in range(2):
        (tracker,) = create_trackers(config, tmp_path, 0)
        tracker.log(ROW)
        tracker.close()
    (first, *logged), again = told[:3], told[3]
    assert first == again and first["resume"] == "allow"
    assert (first["project"], first["name"], first["config"]) == ("deit", "mine", config.as_dict())
    assert logged == [({"train_loss": 1.5, "top1_both": 70.0}, 3), "finish"]
    (tmp_path / "other").mkdir()
    create_trackers(config, tmp_path / "other", 0)
    assert told[-1]["id"] != first["id"]


@pytest.mark.parametrize("change", [{"tensorboard": True}, {"wandb": "deit"}])
def test_a_missing_package_is_named(small_config, monkeypatch, change):
    (package,) = change
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs the package {package}: pip install {package}"):
        check_packages(small_config.replace(**change))


def test_packages_that_are_there_or_not_asked_for_are_no_error(small_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    check_packages(small_config)
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    check_packages(small_config.replace(wandb="deit"))
