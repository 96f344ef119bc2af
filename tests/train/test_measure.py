"""Rates of loader and step, and what they say."""

import pytest
import torch

from fastdeit.train import measure
from fastdeit.train.measure import DataRates, measure_data


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
