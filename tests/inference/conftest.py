"""Small models with every parameter away from its initial value, and what is compared with them."""

import copy

import pytest
import timm
import torch

from fastdeit.testing import assert_close_to_oracle

SMALL = dict(img_size=32, patch_size=8, embed_dim=64, num_heads=2, depth=2, num_classes=10)


def make_model(name="deit_tiny_distilled_patch16_224", **options):
    """A model of timm's whose norms, biases, LayerScales and head are random, so that a lost one shows."""
    model = timm.create_model(name, **{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + parameter.mean())
        for head in ("head", "head_dist"):
            if isinstance(getattr(model, head, None), torch.nn.Linear):
                getattr(model, head).weight.normal_(std=0.3)
    return model


@pytest.fixture
def small():
    return make_model


@pytest.fixture
def raw_images():
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture
def normalised():
    """Raw images as a model's configuration normalises them, in float64."""

    def normalise(model, images):
        mean, std = (torch.tensor(model.pretrained_cfg[key]).double().view(3, 1, 1) for key in ("mean", "std"))
        return (images.double() / 255 - mean) / std

    return normalise


@pytest.fixture
def assert_within_contract():
    """Holds logits to twice the error of the model's own in their dtype, both against float64."""

    def check(model, images, got, read=lambda model, images: model(images)):
        with torch.no_grad():
            oracle = read(copy.deepcopy(model).double(), images)
            own = read(copy.deepcopy(model).to(got.dtype), images.to(got.dtype))
        assert_close_to_oracle("logits", got, oracle, own)

    return check
