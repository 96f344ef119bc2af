"""Rates and limits of the GPUs that estimates are made for, one per architecture. docs/instruction-stream.md has the sources."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Rates of one GPU; of one multiprocessor and clock where nothing else is said."""

    name: str
    multiprocessors: int
    gigahertz: float
    memory_tb_per_s: float  # that a copy reaches
    l2_tb_per_s: float
    latency_ns: float  # of a load that misses the L2 cache, under load
    matrix_flops: int  # bf16 and fp16 with fp32 sums
    matrix_share: float  # of that rate, what a large matrix product reaches
    mma_sync_share: float  # of that rate, what products by mma.sync reach
    fp32_lanes: int
    integer_lanes: int = 64
    uniform_lanes: int = 64  # threads of the warps that one clock serves
    special_lanes: int = 16
    shuffle_lanes: int = 32
    shared_bytes: int = 128


DEVICES = {
    80: Device("A100 SXM4 80 GB", 108, 1.41, 1.8, 4.5, 550, 2048, 0.85, 1.0, fp32_lanes=64),
    89: Device("RTX 4090", 128, 2.52, 0.93, 5.0, 450, 512, 0.95, 1.0, fp32_lanes=128),
    90: Device("H200 SXM", 132, 1.75, 4.3, 5.5, 600, 4096, 0.835, 0.62, fp32_lanes=128),
    100: Device("B200", 148, 1.85, 7.2, 9.0, 650, 8192, 0.8, 0.31, fp32_lanes=128),
}
