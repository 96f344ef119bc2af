"""Where and how a run computes: device, precision, threads, determinism."""

import contextlib
import re
from collections.abc import Iterator

import torch
import torch.utils.deterministic

from fastdeit.train.config import Config
from fastdeit.train.distributed import SINGLE, World


def select_device(config: Config, world: World = SINGLE) -> torch.device:
    """config.device, or a GPU if there is one, of several processes each its own. Raises ValueError where it does not exist."""
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and world.size > 1:
        name = f"cuda:{world.local_rank}"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not there; PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def wait_for(device: torch.device) -> None:
    """Returns when device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The context of a forward pass: bf16 or fp16 if precision says so, on a GPU bf16 by default."""
    low = config.precision in ("bf16", "fp16") or (config.precision == "auto" and device.type == "cuda")
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=low)


def create_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler | None:
    """Scales the loss so that small gradients survive fp16; None in other precisions, which have fp32's range."""
    return torch.amp.GradScaler(device.type) if config.precision == "fp16" else None


@contextlib.contextmanager
def reproducible(config: Config) -> Iterator[None]:
    """Deterministic algorithms where PyTorch has them, and the run's number of threads; afterwards as it was.

    The order of sums on a CPU depends on the number of threads, so that equal bits need an equal number.
    """
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # cuBLAS needs no variable for this: PyTorch gives it a workspace per handle and stream. Where CUBLAS_WORKSPACE_CONFIG is set,
    # PyTorch 2.11 parses it at every product, 60 to 200 us of host time.
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_num_threads(threads)
