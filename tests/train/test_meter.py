"""The meter with a clock that the test turns."""

import pytest
import torch

from fastdeit.train import meter
from fastdeit.train.meter import Meter, peak_flops, postfix


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def slow_loader(clock, seconds, count):
    for i in range(count):
        clock.now += seconds
        yield i


def test_rate_waiting_and_utilisation(clock):
    measured = Meter(images_per_step=8, flops_per_image=1e9, peak=2e11, clock=clock)
    for _ in measured.batches(slow_loader(clock, 0.25, 4)):
        clock.now += 0.75
    assert measured.reading() == pytest.approx({"images_per_second": 8, "data_wait": 0.25, "mfu": 0.04})
    assert postfix(measured.reading()) == "8 images/s, MFU 4.0%, waiting for data 25%"


def test_a_restart_forgets(clock):
    measured = Meter(8, clock=clock)
    for _ in measured.batches(slow_loader(clock, 1, 2)):
        pass
    clock.now += 50  # an evaluation
    measured.restart()
    assert measured.reading() == {} and postfix({}) == ""
    for _ in measured.batches(slow_loader(clock, 0, 2)):
        clock.now += 2
    assert measured.reading() == {"images_per_second": 4, "data_wait": 0}


def test_without_a_known_peak_there_is_no_utilisation(clock):
    measured = Meter(8, flops_per_image=1e9, peak=None, clock=clock)
    for _ in measured.batches(slow_loader(clock, 1, 1)):
        pass
    assert set(measured.reading()) == {"images_per_second", "data_wait"}


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", None),
    ],
)
def test_peaks_go_by_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_a_cpu_has_no_peak():
    assert meter.peak_flops(torch.device("cpu")) is None
