"""How deep LayerNorm's backward is pipelined."""

import pytest

from fastdeit.kernels.norm.layer_norm import MAX_CHANNELS, select_config
from fastdeit.kernels.runtime.architecture import LIMITS
from fastdeit.kernels.runtime.launch import next_power_of_2


@pytest.mark.parametrize("channels", [192, 384, 768, 1024, 1280, 4096])
@pytest.mark.parametrize("element_bytes", [4, 8, 12])  # two bf16 streams, two of fp32, autocast with everything
def test_32_kilobytes_are_in_flight_and_fit_shared_memory(channels, element_bytes):
    config = select_config(channels, 90)
    stages = config.backward_stages(channels, element_bytes)
    assert (stages - 1) * config.backward_programs_per_sm * channels * element_bytes >= 32768
    held = (stages - 1) * next_power_of_2(channels) * element_bytes
    assert all(held <= limits.shared_per_block for limits in LIMITS.values())


def test_the_widest_rows_are_not_pipelined():
    assert select_config(MAX_CHANNELS, 90).backward_stages(MAX_CHANNELS, 4) == 1
