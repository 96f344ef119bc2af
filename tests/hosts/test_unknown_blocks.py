"""Blocks that fastdeit has no class for: they keep their arithmetic, a warning says so once, and `explain` what was looked for."""

import copy
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdeit
from fastdeit.nn import hosts as known_hosts
from fastdeit.nn.unknown_attention import SCALED_AFTER_SOFTMAX

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


class MultiHeadAttention(nn.Module):
    """Attention whose weights, not its logits, are scaled, as tutorials on the vision transformer have it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.projection = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.projection((q @ k.mT).softmax(-1) / 32**0.5 @ v)


class ResidualAdd(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


@pytest.fixture
def model(hosts):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    parts = (ResidualAdd(nn.Sequential(nn.LayerNorm(32), part)) for part in (MultiHeadAttention(), mlp))
    return hosts.shaken(nn.Sequential(*parts))


def test_their_arithmetic_stays_and_what_was_looked_for_is_said_once(hosts, model, kernels_stood_in):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerated = fastdeit.accelerate(copy.deepcopy(model))
    (warning,) = caught
    assert "only LayerNorms are fused" in str(warning.message) and "docs/hosts.md" in str(warning.message)
    torch.testing.assert_close(hosts.step(accelerated, X), hosts.step(model, X))
    assert kernels_stood_in == {"layer_norm": 2}
    report = fastdeit.explain(accelerated)
    assert {row.kind for row in report if row.fused} == {"LayerNorm"}
    assert {(row.kind, row.reason) for row in report if not row.fused} == {
        ("MultiHeadAttention", f"no fused class for MultiHeadAttention: {SCALED_AFTER_SOFTMAX}"),
        ("Linear", "no fused class for Linear"),
    }
    assert "only LayerNorms were matched: no transformer block of a class in docs/hosts.md" in str(report)
    fastdeit.restore(accelerated)
    assert list(map(type, accelerated.modules())) == list(map(type, model.modules()))


class Divided(MultiHeadAttention):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scaling = 32 ** (1 / 2)
        weights = F.softmax(torch.einsum("bqd, bkd -> bqk", q, k), dim=-1) / scaling
        return self.projection(weights @ v)


class Multiplied(MultiHeadAttention):
    scaling = 32**-0.5

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.projection(torch.softmax(q @ k.mT, -1) * self.scaling @ v)


class Standard(MultiHeadAttention):
    def forward(self, x, mask=1.0):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.projection(torch.softmax(q @ k.mT / 32**0.5, -1) * mask @ v)


@pytest.mark.parametrize("kind", [Divided, Multiplied, Standard])
def test_an_attention_is_told_by_its_source(kind):
    kind = type("Attention", (kind,), {})
    reason = known_hosts.why_no_class(kind)
    more = "" if issubclass(kind, Standard) else f": {SCALED_AFTER_SOFTMAX}"
    assert reason == f"no fused class for Attention{more}"
    assert known_hosts.has_known_name(kind) == (not issubclass(kind, Standard))


def test_an_attention_without_source_has_the_usual_reason():
    names = {"nn": nn}
    exec("class Attention(nn.Module):\n    def forward(self, x):\n        return x.softmax(-1) / 2", names)
    assert known_hosts.why_no_class(names["Attention"]) == "no fused class for Attention"


def test_a_known_block_of_another_structure_has_its_reason(model, monkeypatch):
    """PyPI's vision-transformer-pytorch, by a class of the same name."""
    name = "vision_transformer_pytorch.model"
    block = type("EncoderBlock", (nn.Sequential,), {"__module__": name})
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(EncoderBlock=block))
    row = fastdeit.explain(nn.Sequential(block(*model))).as_dict()["0"]
    assert row["kind"] == "EncoderBlock" and not row["fused"]
    assert row["reason"] == "its projections multiply by weights of three dimensions (LinearGeneral)"
