"""The libraries of the extra `train`, asked for before any work starts."""

from importlib.util import find_spec

LIBRARIES = {
    "torchvision": "torchvision",
    "matplotlib": "matplotlib",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
}


def check_extras() -> None:
    """Raises ImportError that names every missing library of the extra and how to install it."""
    missing = [distribution for module, distribution in LIBRARIES.items() if find_spec(module) is None]
    if missing:
        raise ImportError(f"training needs {', '.join(missing)}: pip install 'fastdeit[train]'")
