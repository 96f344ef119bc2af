"""Fused Triton kernels for training and running DeiT and ViT models in PyTorch."""

from fastdeit.backends import get_backend, set_backend, use_backend

__version__ = "0.1.0"
__all__ = ["get_backend", "set_backend", "use_backend"]
