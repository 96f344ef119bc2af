"""Fused Triton kernels for training and running DeiT and ViT models in PyTorch."""

from fastdeit.backends import get_backend, set_backend, use_backend
from fastdeit.patching import accelerate, explain, restore

__version__ = "0.1.0"
__all__ = ["accelerate", "explain", "get_backend", "restore", "set_backend", "use_backend"]
