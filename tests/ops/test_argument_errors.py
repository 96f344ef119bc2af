"""Whatever is given in an argument's place, the error names that argument, and comes before any work."""

import inspect

import pytest
import torch

from fastdeit import ops

B, N, C, H = 2, 3, 32, 24


def vector(size=C):
    return torch.ones(size)


NORM = dict(norm_weight=vector(), norm_bias=vector(), eps=1e-6)
MLP = dict(w1=torch.ones(H, C), b1=vector(H), w2=torch.ones(C, H), b2=vector(), activation="gelu")
ATTENTION = dict(qkv_weight=torch.ones(96, C), qkv_bias=vector(96), proj_weight=torch.ones(C, 32), proj_bias=vector())
TOKENS = torch.ones(B, N, C)
SCALE = dict(drop_path_scale=vector(B))
HEADS = torch.ones(B, N, 1, 32)
GOOD = {
    "layer_norm": dict(x=TOKENS, weight=vector(), bias=vector(), eps=1e-6),
    "add_layer_norm": dict(x=TOKENS, branch=TOKENS, weight=vector(), bias=vector(), eps=1e-6, gamma=vector(), **SCALE),
    "attention": dict(qkv=torch.ones(B, N, 96), num_heads=1, scale=0.1),
    "attention_qkv": dict(q=HEADS, k=HEADS, v=HEADS, scale=0.1),
    "linear": dict(x=TOKENS, weight=torch.ones(C, C), bias=vector(), activation="gelu", residual=TOKENS, gamma=vector())
    | SCALE,
    "mlp": dict(x=TOKENS, **MLP),
    "layer_norm_mlp": dict(x=TOKENS, **NORM, **MLP, gamma=vector(), **SCALE, residual=TOKENS),
    "add_layer_norm_mlp": dict(x=TOKENS, branch=TOKENS, **NORM, **MLP, gamma=vector(), **SCALE),
    "add_layer_norm_attention": dict(
        x=TOKENS, branch=TOKENS, **NORM, **ATTENTION, num_heads=1, gamma=vector(), **SCALE
    ),
    "patch_embedding": dict(
        images=torch.ones(B, 3, 8, 8),
        weight=torch.ones(C, 3, 4, 4),
        bias=vector(),
        positions=torch.ones(1, 6, C),
        class_token=torch.ones(1, 1, C),
        more_tokens=torch.ones(1, 1, C),
    ),
    "distillation_cross_entropy": dict(
        logits=torch.ones(B, 5),
        dist_logits=torch.ones(B, 5),
        target=torch.zeros(B, dtype=torch.long),
        teacher=torch.ones(B, 5),
        **dict(kind="hard", base="cross_entropy", reduction="mean", soft_divisor="numel"),
        **dict(alpha=0.5, tau=1.0, label_smoothing=0.0),
    ),
}
MAY_BE_NONE = ("weight", "bias", "norm_weight", "norm_bias", "b1", "b2", "qkv_bias", "proj_bias", "branch")


def wrong(op, name, value):
    """Of every kind that the argument may not be."""
    if isinstance(value, torch.Tensor):
        other = torch.ones(value.shape, dtype=torch.bool if name == "target" else torch.complex64)
        kinds = [3, 0.5, "x", [1.0], other, value.to("meta")]
        kinds += [] if name in ("x", "images", "logits", "dist_logits") else [torch.stack([value] * 3)]
        kinds += [torch.ones((), dtype=value.dtype)]
    elif isinstance(value, str):
        kinds = ["swish", 1, ["gelu"], torch.nn.GELU]
    else:
        kinds = ["1", [1], True, 1j, torch.tensor(1)]
    optional = inspect.signature(op).parameters[name].default is None or name in MAY_BE_NONE
    return kinds if optional else [*kinds, None]


@pytest.mark.parametrize("name", GOOD)
def test_an_argument_of_any_wrong_kind_is_named(name):
    op, good = getattr(ops, name), GOOD[name]
    op(**good)
    for argument, value in good.items():
        for given in wrong(op, argument, value):
            if argument in ("x", "q", "qkv", "images", "logits") and getattr(given, "is_meta", False):
                continue  # the others are then on another device
            with pytest.raises((TypeError, ValueError)) as error:
                op(**good | {argument: given})
            assert str(error.value).startswith(f"{argument}: "), f"{argument}={given!r}: {error.value}"


@pytest.mark.parametrize("name", ["add_layer_norm_mlp", "layer_norm_mlp"])
def test_what_is_recomputed_and_its_former_spelling(name):
    x, w1, w2 = torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(8, 16)
    given = (x, None, None, 1e-6, w1, None, w2, None)
    given = (x, None, *given[1:]) if name == "add_layer_norm_mlp" else given
    op = getattr(ops, name)
    with pytest.raises(ValueError, match="recompute: expected 'preactivation' or None, got 'all'"):
        op(*given, recompute="all")
    with pytest.warns(DeprecationWarning, match="lean is deprecated: pass recompute='preactivation'"):
        old = op(*given, lean=True)
    torch.testing.assert_close(old, op(*given, recompute="preactivation"))
