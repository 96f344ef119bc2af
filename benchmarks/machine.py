"""The machine that figures were measured on: versions, GPU, driver and clocks."""

import contextlib
import importlib.metadata
import platform
import subprocess
from typing import Any

import torch

import fastdeit

BASELINES = ("liger-kernel", "flash-attn", "xformers", "transformer-engine", "vit-pytorch", "transformers", "torchao")
BASELINES += ("onnxruntime", "onnxruntime-gpu", "torch-tensorrt")


def environment() -> dict[str, Any]:
    """What the figures depend on: GPU, driver, clocks, versions."""
    facts: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    facts |= {"fastdeit": fastdeit.__version__, "torch": torch.__version__}  # torch's own names the CUDA build too
    for name in ("timm", "triton", *BASELINES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cudnn"] = torch.backends.cudnn.version()
        facts |= _nvidia_smi()
    else:
        facts["cpu"] = platform.processor() or platform.machine()
    return facts


def clocks() -> dict[str, str]:
    """Present clocks and temperature of the GPU; empty without one."""
    query = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    return _nvidia_smi(query) if torch.cuda.is_available() else {}


def _nvidia_smi(query: str = "driver_version,clocks.max.sm,clocks.max.mem") -> dict[str, str]:
    uuid = str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-")
    chosen = f"--id=GPU-{uuid}"  # nvidia-smi counts hidden devices too
    command = ["nvidia-smi", chosen, f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(query.split(","), (value.strip() for value in line.split(",")), strict=False))
