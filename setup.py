"""Metadata of the distribution; the tools' settings are in pyproject.toml.

``kernels`` and ``benchmarks`` lie beside ``fastdeit``. They are imported and installed as packages inside it: DIRECTORIES maps them
for every kind of build. In a tree that is not installed, ``fastdeit/__init__.py`` finds them.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent

# Lower bounds are the oldest versions that the tests have run on, not the oldest that might work.
CORE = [
    "numpy>=2.2",
    "torch>=2.8",
    "triton>=3.4; sys_platform == 'linux'",
    "timm>=1.0.26",
]
TRAIN = [
    "torchvision>=0.23",
    "matplotlib>=3.10",
    "pyyaml>=6.0",
    "safetensors>=0.8",
    "scikit-learn>=1.7",
    "tqdm>=4.67",
]
# Decoders of JPEG: without them torchvision or Pillow decodes.
LOADER = ["simplejpeg>=1.9", "nvidia-nvimgcodec-cu12>=0.9; sys_platform == 'linux'"]
BENCH = ["matplotlib>=3.10", "pytest>=9.0", "pytest-benchmark>=5.2"]
# Libraries whose models are accelerated too (docs/hosts.md), for the tests of that; none is needed to import fastdeit.
HOSTS = [
    "accelerate>=1.15",
    "open_clip_torch>=3.3",
    "peft>=0.21",
    "torchao>=0.16",  # PEFT 0.21 raises an error beside an older one
    "torchvision>=0.23",
    "transformers>=4.57",
    "vit-pytorch>=1.26",
]
TEST = [
    "litserve>=0.2.19",  # the server of docs/serve.md, on the loopback interface
    "mypy>=2.4",
    "onnx>=1.19",  # with the next two: a model is exported and run
    "onnxscript>=0.5",
    "onnxruntime>=1.23",
    "numpy<2.4",  # Triton 3.6's interpreter fails on loops with run-time bounds under numpy 2.4
    "pytest>=9.0",
    "pytest-benchmark>=5.2",
    "pytest-cov>=7.0",
    "pytest-xdist>=3.8",
    "ruff>=0.15",
    "scikit-image>=0.25",  # photographs to train on
    "setuptools>=65",  # the packaging tests build without isolation
    "wheel>=0.45",
]

# The site (`make docs`).
DOCS = ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]
# To execute examples/two_tokens.ipynb (`make notebook`).
NOTEBOOK = ["ipykernel>=6.29", "nbconvert>=7.16"]

# package -> its directory in this tree
DIRECTORIES = {"fastdeit": "fastdeit", "fastdeit.kernels": "kernels", "fastdeit.benchmarks": "benchmarks"}


def packages() -> list[str]:
    hidden = ["*__pycache__*", "results*", "kernels*", "benchmarks*"]
    inside = {name: find_namespace_packages(directory, exclude=hidden) for name, directory in DIRECTORIES.items()}
    return [*DIRECTORIES, *(f"{name}.{sub}" for name, subs in inside.items() for sub in subs)]


def version() -> str:
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "fastdeit/__init__.py").read_text(), re.MULTILINE).group(1)


setup(
    name="fastdeit",
    version=version(),
    description="Fused Triton kernels for training and running DeiT and ViT models in PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="fastdeit authors",
    python_requires=">=3.10",
    install_requires=CORE,
    extras_require={
        "train": TRAIN,
        "test": TEST,
        "bench": BENCH,
        "loader": LOADER,
        "hosts": HOSTS,
        "docs": DOCS,
        "notebook": NOTEBOOK,
    },
    packages=packages(),
    package_dir=DIRECTORIES,
    package_data={"": ["*.c", "*.h", "*.json", "*.sh", "*.yaml", "py.typed"]},
    include_package_data=False,
    zip_safe=False,
    entry_points={"console_scripts": ["fastdeit = fastdeit.commands.cli:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
