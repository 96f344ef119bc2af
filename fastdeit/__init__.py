"""Fused Triton kernels for training and running DeiT and ViT models in PyTorch."""

import importlib as _importlib
import sys as _sys
from importlib.machinery import PathFinder as _PathFinder
from importlib.util import module_from_spec as _module_from_spec
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

# In an installed package kernels and benchmarks are inside this directory; in a source tree they are beside it.
_here = _Path(__file__).resolve().parent
for _name in ("kernels", "benchmarks"):
    if not (_here / _name).is_dir() and f"{__name__}.{_name}" not in _sys.modules:
        _spec = _PathFinder.find_spec(f"{__name__}.{_name}", [str(_here.parent)])
        if _spec is None:
            raise ImportError(
                f"{_here}: the folder {_name}/ is neither inside it nor beside it; this copy is incomplete"
            )
        globals()[_name] = _sys.modules[_spec.name] = _module_from_spec(_spec)

from fastdeit.backends import get_backend, set_backend, use_backend

if _TYPE_CHECKING:
    from fastdeit import losses, nn, ops
    from fastdeit.inference.file import load_optimized
    from fastdeit.inference.optimizing import optimize_for_inference
    from fastdeit.plan.graphs import set_graphs
    from fastdeit.swap import accelerate, explain, restore

__version__ = "0.1.0"
__all__ = [
    "accelerate",
    "explain",
    "get_backend",
    "load_optimized",
    "losses",
    "nn",
    "ops",
    "optimize_for_inference",
    "restore",
    "set_backend",
    "set_graphs",
    "use_backend",
]

# Imported at their first use: they bring timm and Triton into the process.
_LAZY = {name: f"fastdeit.{name}" for name in ("losses", "nn", "ops")}
_LAZY |= dict.fromkeys(("accelerate", "explain", "restore"), "fastdeit.swap")
_LAZY["set_graphs"] = "fastdeit.plan.graphs"
_LAZY["load_optimized"] = "fastdeit.inference.file"
_LAZY["optimize_for_inference"] = "fastdeit.inference.optimizing"


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
