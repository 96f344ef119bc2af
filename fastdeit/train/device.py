"""Where and how a run computes: device, precision, threads, determinism."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.utils.deterministic

from fastdeit.train.config import Config


def select_device(config: Config) -> torch.device:
    """config.device, or a GPU if there is one. Raises ValueError where it does not exist."""
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not there; PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The context of a forward pass: bf16 if precision says so, or on a GPU by default."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


@contextlib.contextmanager
def reproducible(config: Config) -> Iterator[None]:
    """Deterministic algorithms where PyTorch has them, and the run's number of threads; afterwards as it was.

    The order of sums on a CPU depends on the number of threads, so that equal bits need an equal number.
    """
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
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
