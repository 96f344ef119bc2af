"""Rates of loader and step, and what they say."""

import pytest
import torch

from fastdeit.train import measure
from fastdeit.train.data_stages import STAGES, measure_stages
from fastdeit.train.datasets import load_data
from fastdeit.train.loading import TrainLoader
from fastdeit.train.measure import DataRates, measure_data
from fastdeit.train.sampling import EpochBatches


def test_both_rates_are_measured(make_small_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    rates = measure_data(make_small_config(), seconds=0.2)
    assert rates.loader > 0 and rates.step > 0 and (rates.device, rates.workers) == ("cpu", 0)
    assert not list(tmp_path.iterdir()) and torch.get_num_threads() == before


def test_a_slow_loader_is_found(make_small_config, monkeypatch):
    import time

    from fastdeit.train.datasets import Images

    read = Images.source_of

    def slow(images, index):
        time.sleep(0.02)
        return read(images, index)

    monkeypatch.setattr(Images, "source_of", slow)
    monkeypatch.setattr(measure, "WARM_UP", 1)
    rates = measure_data(make_small_config(), seconds=0.5)
    assert 0 < rates.loader <= 50 and rates.bottleneck == "loader"


@pytest.mark.parametrize(
    "loader, step, text",
    [
        (500.0, 2000.0, "The loader is the bottleneck: cuda would wait 75 % of the time."),
        (3000.0, 2000.0, "cuda is the bottleneck: the loader is 1.50 times as fast."),
    ],
)
def test_the_verdict(loader, step, text):
    assert text in str(DataRates(loader, step, "cuda", 8))


def test_stages_of_the_loader(make_small_config):

    config = make_small_config(aa="rand-m9-mstd0.5-inc1")
    train = load_data(config).train
    loader = TrainLoader(train, EpochBatches(len(train), 32, 0), config, torch.device("cpu"))
    stages = measure_stages(loader, config, images=64)
    assert tuple(stages.ms) == STAGES and all(value > 0 for value in stages.ms.values()) and stages.cores >= 1
    text = stages.report(2000 / stages.total)
    assert "the step takes" in text and "which are 2.0 cores of loading" in text
    assert all(name in text for name in STAGES)


def test_a_data_set_of_ones_own_has_no_stages(make_small_config):

    images = torch.utils.data.TensorDataset(torch.zeros(64, 1, 16, 16), torch.zeros(64, dtype=torch.int64))
    config = make_small_config()
    loader = TrainLoader(images, EpochBatches(64, 32, 0), config, torch.device("cpu"))
    assert measure_stages(loader, config) is None
