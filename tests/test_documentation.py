"""README and docs: links lead somewhere, blocks of code run or say what they need, the picture shows what runs."""

import argparse
import importlib.util
import inspect
import pkgutil
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
from PIL import Image

from fastdeit import ops
from fastdeit.aot.catalog import KERNEL_FILES
from fastdeit.commands import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# How the title of a block that no test runs begins; a reader sees it above the block.
REASONS = ("needs ", "takes ", "in a clone")


class Block(NamedTuple):
    page: str
    language: str
    title: str | None  # why no test runs it, or None
    text: str


def blocks() -> list[Block]:
    """The fenced blocks of sh and python of all pages."""
    found = []
    for page in PAGES:
        for match in re.finditer(r'^```(\w*)(?: title="([^"\n]*)")?\n(.*?)^```$', page.read_text(), re.M | re.S):
            language, title, text = match.groups()
            found.append(Block(page.name, language, title, text))
    return [block for block in found if block.language in ("sh", "python")]


def command_lines(text: str) -> list[list[str]]:
    """The words of each line, without comments and without what starts several processes."""
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    launcher = re.compile(r"^(torchrun --nproc-per-node \d+ -m fastdeit|python -m fastdeit|srun fastdeit) ")
    return [launcher.sub("fastdeit ", shlex.join(line)).split(" ") for line in words if line]


def parse(words: list[str]) -> None:
    """Raises SystemExit where the command's parser refuses the arguments."""
    command = cli.COMMANDS[words[1]]
    parser = argparse.ArgumentParser(prog=f"fastdeit {words[1]}")
    importlib.import_module(command.module).add_arguments(parser)
    parser.parse_args([word.strip("'") for word in words[2:]])


def test_there_are_blocks_and_each_is_run_or_says_what_it_needs():
    assert {block.page for block in blocks()} > {"README.md", "index.md", "train.md"}
    assert [b for b in blocks() if b.title is None] and [b for b in blocks() if b.title is not None]
    assert [b for b in blocks() if b.title is not None and not b.title.startswith(REASONS)] == []
    prose = {page.name: re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S) for page in PAGES}
    indented = [name for name, text in prose.items() if re.search(r"\n\n(?: {4}|\t)(?![-*]|\d+\.)\S", text)]
    assert indented == [], "blocks are fenced, so that their language and title can be given"


def test_every_command_in_a_block_takes_its_arguments():
    lines = [(block.page, words) for block in blocks() if block.language == "sh" for words in command_lines(block.text)]
    named = set()
    for page, words in lines:
        if words[0] == "fastdeit":
            named.add(words[1])
            try:
                parse(words)
            except SystemExit:
                pytest.fail(f"{page}: {' '.join(words)}")
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), f"{page}: {words}"
        else:
            assert words[0] in ("make", "pip", "pytest", ".venv/bin/python", "if"), f"{page}: {words}"
    assert {"train", "explain", "bench"} <= named


@pytest.mark.parametrize("block", [b for b in blocks() if b.title is None], ids=lambda b: b.page)
def test_a_block_without_a_title_runs(block, monkeypatch):
    """Models are one block deep, to save time."""
    if block.language == "python":
        monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=1))
        exec(compile(block.text, block.page, "exec"), {})
        return
    for words in command_lines(block.text):
        assert words[0] == "fastdeit" and cli.main(words[1:]) == 0, words


def test_the_readme_shows_what_explain_prints(capsys):
    """The table does not depend on the width of the model."""
    options = ["--device", "cpu", "--on-gpu", "--amp", "bfloat16"]
    assert cli.main(["explain", "deit_tiny_distilled_patch16_224", *options]) == 0
    shown = re.search(r"^```text\n(module .*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    assert shown == capsys.readouterr().out


def test_python_that_is_not_run_compiles():
    for block in blocks():
        if block.language == "python":
            compile(block.text, block.page, "exec")


def test_the_commands_that_are_named_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    readme = (ROOT / "README.md").read_text()
    assert {"train", "test", "docs"} <= set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", readme, re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", page.read_text(), re.MULTILINE))
        assert named <= targets, page.name
    overview = (ROOT / "docs" / "commands.md").read_text()
    assert set(re.findall(r"(?:^|`)fastdeit ([a-z-]+)", overview, re.MULTILINE)) == set(cli.COMMANDS)


def test_the_readme_fits_and_all_links_lead_somewhere():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    generated = {"contributing.md", "changelog.md", "command-reference.md"}  # docs/generated_pages.py
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if target.startswith("../../actions/workflows/"):  # as GitHub resolves it, from the page of the README
                target = f".github/workflows/{Path(target.removesuffix('/badge.svg')).name}"
            assert target.startswith("http") or target in generated or (page.parent / target).exists(), (page, target)


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert {page.name for page in PAGES if page.parent == ROOT / "docs"} <= set(re.findall(r"[\w-]+\.md", navigation))


def test_the_docs_say_which_ops_have_a_kernel():
    """A file for one direction alone, or for the weights of an op's GEMMs, counts for its op; some ops share a file."""
    shared = {"add_layer_norm": "layer_norm", "linear": "gemm", "layer_norm_mlp": "residual_branch"}
    shared["attention_quantize"] = "attention"
    shared |= dict.fromkeys(("add_layer_norm_attention", "add_layer_norm_mlp"), "residual_branch")
    rows = re.findall(r"^\| `(\w+)` \|[^|]+\| ([^|]+) \|", (ROOT / "docs/ops.md").read_text(), re.MULTILINE)
    said = {shared.get(op, op) for op, kernel in rows if not kernel.startswith("none")}
    part_of = {"attention.forward": "attention", "attention.backward": "attention", "mlp.activation": "mlp"}
    part_of |= {"gemm.forward": "gemm", "gemm.backward": "gemm", "gemm.folded_weights": "gemm", "gemm.fused_mlp": "mlp"}
    part_of["runtime.column_sums"] = "layer_norm"
    part_of |= {
        "quantization.layer_norm_quantize": "add_layer_norm_quantize",
        "quantization.rescale": "quantized_linear",
    }
    part_of |= dict.fromkeys(("augment.apply", "augment.tables"), "augment")
    assert said == {part_of.get(name, name.partition(".")[2]) for name in KERNEL_FILES}


def test_the_picture_of_a_block_shows_what_runs_and_was_drawn_by_its_script():
    """docs/memory.md lists the kernels of a block, and tests/nn/test_block_traffic.py holds it to what runs."""
    spec = importlib.util.spec_from_file_location("architecture_picture", ROOT / "docs" / "architecture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    section = (ROOT / "docs/memory.md").read_text().partition("### Inference, autocast")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| `?([\w ]+?)`? \| \w+", section, re.MULTILINE)[1:]
    assert [kernel for _, _, kernel, _ in picture.FUSED] == [{"product": "GEMM"}.get(row, row) for row in rows]
    assert all(hasattr(ops, op) for _, _, op in picture.NODES)
    with Image.open(picture.OUT) as image:
        assert image.text["script"] == picture.DIGEST, "run python docs/architecture.py"


def documented() -> list[tuple[str, Callable]]:
    """What the API reference shows that takes arguments: the names in docs/api.md, of packages all public ones."""
    found = []
    for name in re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.M):
        owner = pkgutil.resolve_name(name)
        members = {name: owner}
        if inspect.ismodule(owner):
            members = {f"{name}.{key}": getattr(owner, key) for key in owner.__all__}
        found += [(key, value) for key, value in members.items() if callable(value)]
    return found


@pytest.mark.parametrize(("name", "member"), documented(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_docstring_documents_the_arguments_that_there_are(name, member):
    """One a line, by their names: the reference's tables are made from them (`make docs` refuses others, where it is installed)."""
    section = re.search(r"\n( *)Args:\n(.*?)(?=\n\n|\Z)", member.__doc__, re.S)
    if section is None:
        return
    indent = len(section[1]) + 4
    named = re.findall(rf"^ {{{indent}}}(\S.*?):", section[2], re.M)
    parameters = [key for key in inspect.signature(member).parameters if key != "self"]
    assert named == parameters
