"""The fake runtime's library, built from the C sources of this folder on first use."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("source")
NAME = "libcuda.so.1"
LINK_NAME = "libcuda.so"  # by which Triton up to 3.5 links its launchers
CUDA_MAJOR = "13"  # whose structures and signatures the sources have
_FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,-soname,{NAME}", "-Wl,-z,nodelete")


@functools.cache
def why_unavailable() -> str | None:
    """None where the library can be built and torch can run on it, else what is missing."""
    if sys.platform != "linux":
        return f"it preloads a library, which works on Linux only (this is {sys.platform})"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if torch.version.cuda.split(".")[0] != CUDA_MAJOR:
        return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, not CUDA {CUDA_MAJOR}"
    if compiler() is None:
        return "no C compiler (gcc or clang)"
    for header in ("cuda.h", "cuda_runtime_api.h", "cublasLt.h", "crt/host_defines.h"):
        if not any((folder / header).exists() for folder in _include_folders()):
            return f"no {header} in the wheels of NVIDIA and Triton"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's C headers are not installed, which Triton builds its launchers with"
    return None


def build() -> Path:
    """The folder that holds the library, in Triton's cache. It is compiled unless that was done from the same sources.

    Raises:
        OSError: it cannot be built here; the message says what is missing.
    """
    if reason := why_unavailable():
        raise OSError(f"the fake CUDA runtime is not available: {reason}")
    from triton import knobs

    sources = sorted(SOURCES.glob("*.c"))
    command = (compiler(), *_FLAGS, *(f"-I{folder}" for folder in _include_folders()), *map(str, sources))
    content = b"".join(path.read_bytes() for path in (*sources, *sorted(SOURCES.glob("*.h"))))
    digest = hashlib.sha256(repr(command).encode() + content).hexdigest()[:16]
    folder = Path(knobs.cache.dir) / f"fake-cuda-{digest}"
    if not (folder / NAME).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # so that no other process finds half a library
            output = Path(temporary) / NAME
            made = subprocess.run([*command, "-o", str(output), "-lpthread", "-ldl"], capture_output=True, text=True)
            if made.returncode:
                raise OSError(f"compiling the fake CUDA runtime failed:\n{made.stderr}")
            os.replace(output, folder / NAME)
    with contextlib.suppress(FileExistsError):
        (folder / LINK_NAME).symlink_to(NAME)
    return folder


def compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("clang")


def _include_folders() -> list[Path]:
    """Folders of headers in the wheels: NVIDIA's first, then Triton's older ones for what is missing."""
    nvidia, triton = importlib.util.find_spec("nvidia"), importlib.util.find_spec("triton")
    folders = [
        Path(path) / f"cu{CUDA_MAJOR}/include" for path in ((nvidia and nvidia.submodule_search_locations) or ())
    ]
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/include")
    return folders
