"""`fastdeit env`: versions, GPU, driver and settings, to be put into a bug report."""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys

from fastdeit import __version__
from fastdeit.backends import get_backend

LIBRARIES = (
    "torch",
    "triton",
    "timm",
    "numpy",
    "torchvision",
    "pillow",
    "transformers",
    "safetensors",
    "pytest-benchmark",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints what an issue needs to name. Returns 0."""
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    width = max(map(len, found))
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in found.items()))
    return 0


def environment() -> dict[str, str]:
    """Names and values, in the order in which they are printed."""
    import torch

    found = {"fastdeit": __version__, "python": sys.version.split()[0], "platform": platform.platform()}
    found |= {name: _version(name) for name in LIBRARIES}
    found["torch built for"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    found |= _devices(torch)
    found["backend"] = get_backend()
    found["kernel launches"] = _launches()
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices(torch) -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"GPU": "none: models run the code of their library"}
    found = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found[f"GPU {index}"] = f"{properties.name}, {capability}, {memory}, {properties.multi_processor_count} SMs"
    found["driver"] = _driver()
    return found


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown: nvidia-smi does not run"


def _launches() -> str:
    try:
        from fastdeit.kernels.runtime.launch import launches_directly
    except ImportError as error:
        return f"none: {error}"
    if launches_directly():
        return "direct: this version of Triton was tested"
    return "by Triton's public interface, which takes more host time: this version of Triton was not tested"
