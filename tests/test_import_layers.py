"""Imports go downwards only, so that a kernel can be read, tested and replaced without what is built on it."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = {
    "fastdeit": ROOT / "fastdeit",
    "fastdeit.kernels": ROOT / "kernels",
    "fastdeit.benchmarks": ROOT / "benchmarks",
}

# From the bottom up: a file imports from its own layer and from those below it. A name stands for all that it contains.
LAYERS = (
    ("fastdeit.kernels",),
    ("fastdeit.backends", "fastdeit.refusals", "fastdeit.web_page", "fastdeit.cost.formulas", "fastdeit.cost.models"),
    ("fastdeit.ops", "fastdeit.aot"),
    ("fastdeit.blocks",),
    ("fastdeit.plan",),
    ("fastdeit.nn", "fastdeit.losses"),
    ("fastdeit.swap", "fastdeit.explanation", "fastdeit.cost.view", "fastdeit.cost", "fastdeit.testing"),
    ("fastdeit.inference",),
    ("fastdeit",),  # the public names alone: `import fastdeit` is an import of everything so far
    ("fastdeit.train", "fastdeit.verification"),
    ("fastdeit.benchmarks",),
    ("fastdeit.commands", "fastdeit.__main__"),
)
KERNEL_LIBRARIES = {"torch", "triton"}
CORE_LIBRARIES = {"numpy", "torch", "triton", "timm", "safetensors"}  # the last is a requirement of timm
WITH_EXTRAS = (
    "fastdeit.train",
    "fastdeit.benchmarks",
    "fastdeit.commands",
    "fastdeit.testing.fake_cuda.pytest_plugin",
    "fastdeit.inference.exporting",
)  # what the extras `train`, `bench` and `test` are for
# Imported only where the library has been: an adapter and its drop-in classes each.
HOSTS = {
    f"fastdeit.{folder}.{name}": library
    for name, library in (
        ("torchvision", "torchvision"),
        ("huggingface", "transformers"),
        ("open_clip", "open_clip"),
        ("vit_pytorch", "vit_pytorch"),
    )
    for folder in ("blocks.adapters", "nn")
} | {"fastdeit.nn.vit_pytorch_distill": "vit_pytorch"}
# Look for files of CLIP, deit, DINO and I-JEPA in sys.modules.
BESIDE_A_SCRIPT = tuple(
    f"fastdeit.nn.{name}" for name in ("clip", "deit_blocks", "deit_distilled", "dino", "dinov2", "ijepa")
)
NEED_TRITON = (*WITH_EXTRAS, *BESIDE_A_SCRIPT, "fastdeit.aot", "fastdeit.testing.ptx", "fastdeit.__")


def python_files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = {}
    for package, directory in TREES.items():
        for path in sorted(directory.rglob("*.py")):
            parts = path.relative_to(directory).with_suffix("").parts
            files[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return files


def layer_of(module: str) -> int:
    """Index into LAYERS by the longest entry that contains the module."""
    parts = module.split(".")
    for length in range(len(parts), 1, -1):
        for index, layer in enumerate(LAYERS):
            if ".".join(parts[:length]) in layer:
                return index
    if module != "fastdeit":
        raise LookupError(f"{module} is in no layer: give it one in LAYERS")
    return next(index for index, layer in enumerate(LAYERS) if "fastdeit" in layer)


def imported_modules(source: str, module: str, modules: set[str], is_package: bool = False) -> set[str]:
    """Modules that a file imports anywhere, in functions too; `from a import b` is an import of a.b if that is a module."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            parent = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names}
    return names


def upward_imports(source: str, module: str, modules: set[str], is_package: bool = False) -> list[str]:
    ours = (name for name in imported_modules(source, module, modules, is_package) if name.split(".")[0] == "fastdeit")
    return sorted(name for name in ours if layer_of(name) > layer_of(module))


def outside_libraries(source: str, module: str) -> set[str]:
    """Top-level names that a file imports and that are neither Python's own nor ours."""
    names = {name.split(".")[0] for name in imported_modules(source, module, set())}
    return names - set(sys.stdlib_module_names) - {"fastdeit"}


def test_no_file_imports_from_a_layer_above_its_own():
    files = python_files()
    modules = set(files) | {".".join(name.split(".")[:n]) for name in files for n in (1, 2, 3)}
    upward = {m: upward_imports(p.read_text(), m, modules, p.name == "__init__.py") for m, p in files.items()}
    assert {m: names for m, names in upward.items() if names} == {}


def test_kernels_use_torch_and_triton_only():
    files = {m: p for m, p in python_files().items() if m.startswith("fastdeit.kernels.")}
    assert files
    beyond = {m: outside_libraries(p.read_text(), m) - KERNEL_LIBRARIES for m, p in files.items()}
    assert {m: names for m, names in beyond.items() if names} == {}


def test_the_core_needs_no_library_of_the_extras():
    files = {m: p for m, p in python_files().items() if not m.startswith(WITH_EXTRAS)}
    beyond = {m: outside_libraries(p.read_text(), m) - CORE_LIBRARIES - {HOSTS.get(m)} for m, p in files.items()}
    assert {m: names for m, names in beyond.items() if names} == {}


def test_fastdeit_brings_no_library_before_it_is_used_and_no_host_because_it_knows_it():
    code = (
        "import sys, torch, fastdeit\n"
        "assert not {'timm', 'triton', 'fastdeit.ops', 'fastdeit.nn', 'fastdeit.losses'} & set(sys.modules)\n"
        "assert {fastdeit.ops.layer_norm, fastdeit.nn.Block, fastdeit.losses.DistillationLoss}\n"
        "import timm.layers\n"
        "fastdeit.explain(fastdeit.accelerate(torch.nn.Sequential(torch.nn.Linear(2, 2))))\n"
        "print([m for m in ('open_clip', 'transformers', 'vit_pytorch') if m in sys.modules or 'fastdeit.nn.' + m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]" and result.returncode == 0, result.stderr


MODULES = {
    "fastdeit",
    "fastdeit.ops",
    "fastdeit.ops.mlp_op",
    "fastdeit.backends",
    "fastdeit.nn",
    "fastdeit.kernels.mlp.activation",
}


@pytest.mark.parametrize(
    "module, source",
    [
        ("fastdeit.kernels.mlp.activation", "from fastdeit.ops import mlp"),
        ("fastdeit.kernels.mlp.activation", "from fastdeit import backends"),
        ("fastdeit.kernels.mlp.activation", "def f():\n    import fastdeit.ops.mlp_op"),
        ("fastdeit.ops.mlp_op", "from ..nn import Mlp"),
        ("fastdeit.ops.mlp_op", "import fastdeit"),
        ("fastdeit.nn", "from fastdeit import accelerate"),
        ("fastdeit.swap", "from fastdeit.train.config import Config"),
    ],
)
def test_an_upward_import_is_found(module, source):
    assert upward_imports(source, module, MODULES)


@pytest.mark.parametrize(
    "module, source",
    [
        ("fastdeit.ops.mlp_op", "def f():\n    from fastdeit.kernels.mlp.activation import mlp_forward"),
        ("fastdeit.ops.mlp_op", "from fastdeit import backends"),
        ("fastdeit.ops.mlp_op", "from . import layer_norm"),
        ("fastdeit.nn", "from fastdeit.ops import mlp"),
        ("fastdeit.commands.cli", "import fastdeit"),
        ("fastdeit.kernels.mlp.activation", "from fastdeit.kernels.runtime.launch import launch"),
    ],
)
def test_a_downward_import_is_let_through(module, source):
    assert upward_imports(source, module, MODULES) == []


def test_a_file_without_a_layer_is_refused():
    with pytest.raises(LookupError, match=r"fastdeit\.stray"):
        layer_of("fastdeit.stray")


def test_an_outside_library_is_found():
    assert outside_libraries("import math\ndef f():\n    from einops import rearrange", "fastdeit.ops.mlp_op") == {
        "einops"
    }


def test_everything_but_the_kernels_imports_without_triton():
    """timm brings Triton into the process by itself where there is one, so here there is none."""
    kernels = layer_of("fastdeit.kernels")
    modules = [m for m in python_files() if layer_of(m) > kernels and not m.startswith(NEED_TRITON) and m not in HOSTS]
    code = f"import sys, importlib\nsys.modules['triton'] = None\nfor m in {modules}: importlib.import_module(m)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", ["fastdeit", "fastdeit.ops", "fastdeit.nn"])
def test_no_module_shares_its_name_with_what_its_package_exports(package):
    """`import fastdeit.ops.layer_norm` would give the function, or the module, by the order of imports."""
    module = importlib.import_module(package)
    files = {path.stem for path in Path(module.__file__).parent.iterdir()}
    exported = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    assert files and exported and not files & exported
