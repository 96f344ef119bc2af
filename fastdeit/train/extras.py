"""The libraries of the extra `train`, asked for before any work starts."""

import importlib

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
    missing = []
    for module, distribution in LIBRARIES.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(distribution)
    if missing:
        raise ImportError(f"training needs {', '.join(missing)}: pip install fastdeit[train]")
