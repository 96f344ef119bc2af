"""However the package is installed and wherever it is run from, the same code is imported, and nothing beside it."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from shutil import copy, copytree, ignore_patterns, make_archive

import pytest
from packaging.requirements import Requirement

from fastdeit.commands import cli

ROOT = Path(__file__).parent.parent
NOT_SHIPPED = ("__pycache__", "results")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

# Prints which package a process imports, from where its kernels come, and every file's digest.
PROBE = f"""
import hashlib, json
from pathlib import Path
import fastdeit, fastdeit.benchmarks, fastdeit.kernels.runtime.architecture as inner
root = Path(fastdeit.__file__).parent
roots = {{"": root, "kernels": Path(fastdeit.kernels.__path__[0]), "benchmarks": Path(fastdeit.benchmarks.__path__[0])}}
files = {{Path(n) / p.relative_to(d): p for n, d in roots.items() for p in d.rglob("*") if p.is_file()}}
files = {{name: p for name, p in files.items() if not set(name.parts) & set({NOT_SHIPPED})}}
digests = {{name.as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}}
print(json.dumps([str(root), str(Path(inner.__file__).parents[1]), digests]))
"""


def run(*command: object, cwd: Path, path: Path | None = None) -> str:
    """What a command prints, in an environment that leads to no other installation and to no network."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [str(part) for part in command]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def probe(python: Path, cwd: Path) -> tuple[Path, Path, dict[str, str]]:
    package, kernels, digests = json.loads(run(python, "-c", PROBE, cwd=cwd))
    return Path(package), Path(kernels), digests


def build(kind: str, source: Path, out: Path) -> Path:
    """Builds the "sdist" or "wheel" of a source tree by the hook that pip calls, with the build tools installed here."""
    out.mkdir()
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    return out / run(sys.executable, "-c", code, out, cwd=source).splitlines()[-1]


def environment(directory: Path, *install: object) -> Path:
    """The interpreter of a new environment that sees the libraries of this one; `install` are pip's arguments."""
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory).strip())
    outer = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (own / "outer.pth").write_text("\n".join(outer))  # after its own; .pth files in the outer ones are not read
    if install:
        options = ("--no-build-isolation", "--no-deps", "--ignore-installed", "--quiet")
        run(python, "-m", "pip", "install", *options, *install, cwd=directory)
    return python


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree, so that no build writes into the original."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        copy(ROOT / name, tree / name)
    for name in ("fastdeit", "kernels", "benchmarks"):
        copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore_patterns("__pycache__"))
    return tree


@pytest.fixture(scope="module")
def digests(source) -> dict[str, str]:
    """What the package consists of, read from the tree."""
    files = {"": source / "fastdeit", "kernels": source / "kernels", "benchmarks": source / "benchmarks"}
    files = {Path(name) / p.relative_to(d): p for name, d in files.items() for p in d.rglob("*") if p.is_file()}
    return {
        name.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if not set(name.parts) & set(NOT_SHIPPED)
    }


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist") / "dist")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory) -> Path:
    """A zip of the tree in a folder of its own, as code hosts give it."""
    return Path(make_archive(tmp_path_factory.mktemp("archive") / "fastdeit", "zip", source.parent, source.name))


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("plain") / "venv", source)


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    [text] = [data.decode() for name, data in contents(wheel).items() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(text)


@pytest.fixture(scope="module")
def requirements(metadata) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


def test_wheel_holds_fastdeit_and_nothing_else_at_top_level(wheel):
    names = {name.split("/")[0] for name in contents(wheel)}
    assert {re.sub(r"-.*\.dist-info", ".dist-info", name) for name in names} == {"fastdeit", "fastdeit.dist-info"}


def test_wheel_holds_every_file_of_the_package(wheel, digests):
    files = {name: data for name, data in contents(wheel).items() if name.startswith("fastdeit/")}
    assert {name[9:]: hashlib.sha256(data).hexdigest() for name, data in files.items()} == digests
    assert {"py.typed", "kernels/runtime/launch.py", "benchmarks/runner.py"} <= set(digests)


def test_wheel_carries_the_licence(wheel):
    assert any(name.endswith("LICENSE") for name in contents(wheel))


def test_wheel_of_the_sdist_is_the_wheel_of_the_tree(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive.getmembers())  # no link leads outside
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    [tree] = tmp_path.iterdir()
    from_sdist, from_tree = contents(build("wheel", tree, tmp_path / "dist")), contents(wheel)
    assert from_sdist == from_tree


def test_plain_install_imports_the_same_code_from_anywhere(plain, digests, tmp_path):
    package, kernels, found = probe(plain, cwd=tmp_path)
    assert package.is_relative_to(plain.parent.parent)
    assert kernels == package / "kernels"
    assert found == digests


def test_pip_given_a_zip_installs_the_same_code(archive, digests, tmp_path):
    package, kernels, found = probe(environment(tmp_path / "venv", archive), cwd=tmp_path)
    assert package.is_relative_to(tmp_path)
    assert kernels == package / "kernels"
    assert found == digests


def test_a_tree_unpacked_by_zipfile_is_imported_and_built_as_the_tree(archive, digests, wheel, tmp_path):
    """Python's zipfile makes plain files of links: there are none."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    [tree] = [path for path in tmp_path.iterdir() if path.is_dir()]
    package, kernels, found = probe(environment(tmp_path / "venv"), cwd=tree)
    assert (package, kernels, found) == (tree / "fastdeit", tree / "kernels", digests)
    assert contents(build("wheel", tree, tmp_path / "dist")) == contents(wheel)


def test_mypy_reads_the_types_of_the_installed_package(plain, tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "import fastdeit.kernels.runtime.launch\nfrom fastdeit import ops\nreveal_type(ops.layer_norm)\n"
        "reveal_type(fastdeit.kernels.runtime.launch.cdiv)\n"
    )
    (tmp_path / "mypy.ini").write_text(
        "[mypy-numpy.*,timm.*,torch.*,triton.*]\nfollow_imports = skip\nignore_missing_imports = true\n"
    )
    options = ("--no-incremental", "--follow-imports=silent", "--python-executable", plain)
    told = run(sys.executable, "-m", "mypy", *options, "user.py", cwd=tmp_path)
    assert "eps: float =" in told and "def (a: int, b: int) -> int" in told


def test_editable_install_imports_the_tree_itself(source, digests, tmp_path):
    python = environment(tmp_path / "venv", "--editable", source)
    package, kernels, found = probe(python, cwd=tmp_path)
    assert package == source / "fastdeit"
    assert kernels == source / "kernels"
    assert found == digests


def test_at_the_root_the_tree_is_imported_without_an_install(source, digests, tmp_path):
    package, kernels, found = probe(environment(tmp_path / "venv"), cwd=source)
    assert package == source / "fastdeit"
    assert kernels == source / "kernels"
    assert found == digests


def test_command_is_the_same_as_a_module_and_as_a_script(plain, source, tmp_path):
    at_root = run(plain, "-m", "fastdeit", "--help", cwd=source)
    elsewhere = run(plain, "-m", "fastdeit", "--help", cwd=tmp_path)
    script = run(plain.parent / "fastdeit", "--help", cwd=tmp_path)
    assert at_root == elsewhere == script
    for command in cli.COMMANDS:
        assert re.search(rf"^ +{command}\b", script, re.MULTILINE), command


@pytest.mark.parametrize("at_root", [True, False], ids=["at the root", "elsewhere"])
def test_another_package_called_kernels_keeps_its_name(plain, source, tmp_path, at_root):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("mine = False")
    code = "import kernels, fastdeit.kernels.runtime.architecture as a; print(kernels.mine, a.__name__)"
    printed = run(plain, "-c", code, cwd=source if at_root else tmp_path.parent, path=tmp_path)
    assert printed.split() == ["False", "fastdeit.kernels.runtime.architecture"]


def test_core_requires_four_libraries(requirements):
    assert {r.name for r in requirements if "extra" not in str(r.marker)} == {"numpy", "torch", "triton", "timm"}


def test_triton_is_required_on_linux_only(requirements):
    [triton] = [r for r in requirements if r.name == "triton"]
    assert triton.marker.evaluate({"sys_platform": "linux"})
    assert not triton.marker.evaluate({"sys_platform": "darwin"})


def test_extras(metadata):
    assert set(metadata.get_all("Provides-Extra")) == {"train", "loader", "test", "bench", "hosts", "docs", "notebook"}


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_what_is_required_directly_and_keep_its_bounds(requirements, python):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            [specifier] = pin.specifier
            assert specifier.operator == "==" and "*" not in specifier.version, line
            assert pins.setdefault(pin.name.lower(), specifier.version) == specifier.version, f"{pin.name} twice"
    for requirement in requirements:
        assert requirement.name.lower() in pins, requirement
        assert pins[requirement.name.lower()] in requirement.specifier, requirement
