"""The table of fused modules in docs/hosts.md, counted."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import fastdeit

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"


def torchvision_model(name: str) -> nn.Module:
    return getattr(pytest.importorskip("torchvision").models, name)()


def transformers_model(name: str) -> nn.Module:
    model = getattr(pytest.importorskip("transformers"), name)
    return model(model.config_class())


def vit_pytorch_model(name: str) -> nn.Module:
    sizes = dict(image_size=224, patch_size=16, num_classes=1000, dim=384, depth=12, heads=6, mlp_dim=1536)
    return getattr(pytest.importorskip("vit_pytorch"), name)(**sizes)


def open_clips_vision_model(name: str) -> nn.Module:
    return pytest.importorskip("open_clip").create_model(name, device="meta").visual


MAKERS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": torchvision_model,
    "transformers": transformers_model,
    "vit-pytorch": vit_pytorch_model,
    "open_clip": open_clips_vision_model,
    "timm": timm.create_model,
}


def rows() -> list[tuple[str, str, str, str, str]]:
    """(library, model, "fused of all", blocks, LayerNorms) for each model."""
    table = PAGE.read_text().partition("| fused of all modules listed |")[2].partition("\n\n")[0]
    found = []
    for line in table.splitlines()[2:]:
        model, counts, blocks, norms = (cell.strip() for cell in line.strip("|").split("|"))
        names = re.findall(r"`([\w.-]+)(?:\(\))?`", model)
        found += [
            (model.split()[0], name, count, blocks, norms)
            for name, count in zip(names, counts.split(", "), strict=True)
        ]
    return found


def test_the_table_has_every_library():
    assert {library for library, *_ in rows()} == set(MAKERS) and len(rows()) > 10


@pytest.mark.parametrize(("library", "name", "counts", "blocks", "norms"), rows(), ids=lambda x: x)
def test_the_counts_are_those_of_explain(library, name, counts, blocks, norms):
    with torch.device("meta"):
        model = MAKERS[library](name).half()
    model.train("Beit" in name)  # its stochastic depth is on by default
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that only LayerNorms are fused
        report = fastdeit.explain(fastdeit.accelerate(model), on_gpu=True)
    fused = [row for row in report if row.fused]
    assert f"{len(fused)} of {len(report)}" == counts
    others = [row for row in fused if "LayerNorm" not in row.kind]
    assert len(others) == sum(map(int, re.findall(r"\d+", blocks.partition(" of 24 branches")[0])))
    assert len(fused) - len(others) == int(norms)
