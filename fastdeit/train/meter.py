"""Speed of a run in progress: images per second, share of the GPU's peak, share of time spent waiting for data."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

# Dense bf16 TFLOP/s of the matrix units, from the makers' data sheets, by what PyTorch calls the GPU; the first match counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations a second of the device's data sheet; None for one that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


class Meter:
    """Measures the steps of a training loop between two readings.

    Args:
        images_per_step: by all processes together.
        flops_per_image: of forward and backward of the model that is trained; None if unknown.
        peak: of all devices together, operations a second; None if unknown.
        clock: in seconds.
    """

    def __init__(
        self,
        images_per_step: int,
        flops_per_image: float | None = None,
        peak: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.images_per_step = images_per_step
        self.flops_per_image = flops_per_image
        self.peak = peak
        self.clock = clock
        self.restart()

    def restart(self) -> None:
        """Begins a new reading, so that evaluation and checkpoints do not count."""
        self.steps, self.waited, self.started = 0, 0.0, self.clock()

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches; the time until each is there counts as waiting."""
        iterator = iter(loader)
        while True:
            asked = self.clock()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += self.clock() - asked
            yield batch
            self.steps += 1

    def reading(self) -> dict[str, float]:
        """Since the last restart: `images_per_second`, `data_wait` (a share of the time) and, where both are known, `mfu`.

        MFU, model FLOPs utilisation, is the share of the peak that the model's own arithmetic makes up (Chowdhery et al. 2022,
        "PaLM", appendix B): recomputation and the teacher do not count. On a GPU the clock runs ahead of the device by what is
        queued; over many steps that is little.
        """
        seconds = self.clock() - self.started
        if not self.steps or seconds <= 0:
            return {}
        rate = self.steps * self.images_per_step / seconds
        found = {"images_per_second": rate, "data_wait": self.waited / seconds}
        if self.flops_per_image and self.peak:
            found["mfu"] = rate * self.flops_per_image / self.peak
        return found


def postfix(reading: dict[str, float]) -> str:
    """A reading for the progress bar."""
    if not reading:
        return ""
    parts = [f"{reading['images_per_second']:,.0f} images/s"]
    if "mfu" in reading:
        parts.append(f"MFU {100 * reading['mfu']:.1f}%")
    parts.append(f"waiting for data {100 * reading['data_wait']:.0f}%")
    return ", ".join(parts)
