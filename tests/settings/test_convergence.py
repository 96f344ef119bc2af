"""A short training run with hard distillation on scikit-learn's digits, by the kernels and by timm's model: the same curve."""

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from timm.layers import GELUTanh
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn

import fastdeit
from fastdeit import testing
from fastdeit.losses import DistillationLoss

STEPS, BATCH, IMAGES = 30, 3, 6


def digits():
    data = load_digits()
    images = torch.from_numpy(data.images).float().div(8).sub(1)[:, None].expand(-1, 3, -1, -1)
    return images[:200], torch.from_numpy(data.target)[:200]


def least_squares_teacher(images, labels):
    """A linear classifier, which knows the digits it was fitted to but not as the student sees them."""
    x = torch.cat((images.flatten(1), torch.ones(len(images), 1)), 1).double()
    weight = torch.linalg.lstsq(x, nn.functional.one_hot(labels, 10).double(), driver="gelsd").solution.T
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    teacher[1].weight.data, teacher[1].bias.data = weight[:, :-1].float().contiguous(), weight[:, -1].float()
    return teacher.eval()


def student():
    torch.manual_seed(0)
    sizes = dict(img_size=8, patch_size=4, embed_dim=32, num_heads=1, depth=2, num_classes=10)
    model = timm.create_model("deit_tiny_distilled_patch16_224", **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that it learns within the run
    model.set_distilled_training(True)
    return model.train()


def run(model, *, roll=0):
    """The loss of each step, and the parameters after the last, in the model's dtype and on its device.

    roll: turns the order of the images in each batch, which changes nothing but the order of sums.
    """
    to = next(model.parameters())
    images, labels = digits()
    teacher = least_squares_teacher(images, labels).to(to)
    criterion = DistillationLoss(LabelSmoothingCrossEntropy(0.1), teacher, "hard", 0.5, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.04, momentum=0.9)
    losses = []
    for step in range(STEPS):
        part = (torch.arange(step * BATCH, (step + 1) * BATCH) % IMAGES).roll(roll)
        x = images[part].to(to)
        optimizer.zero_grad()
        loss = criterion(x, model(x), labels[part].to(to.device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def oracle():
    return run(student().to(testing.kernel_device(), torch.float64))


@pytest.fixture(scope="module")
def eager():
    """timm's model in float32, by each of its two attentions and in each order of the images: how far roundings alone lead."""
    runs = []
    for fused_attn in (True, False):
        for roll in range(BATCH):
            model = student().to(testing.kernel_device())
            for block in model.blocks:
                block.attn.fused_attn = fused_attn
            runs.append(run(model, roll=roll))
    return runs


def assert_same_curve(got, oracle, eager):
    """The contract, step by step: no further from float64 than twice as far as one of timm's own runs has been until then."""
    (losses, weights), (exact_losses, exact_weights) = got, oracle
    allowed = 0.0
    for step, (loss, exact) in enumerate(zip(losses, exact_losses, strict=True)):
        allowed = max(allowed, *(abs(timms[step] - exact) for timms, _ in eager))
        assert abs(loss - exact) <= testing.ALLOWANCE * allowed, f"step {step}: {loss}, in float64 {exact}"
    furthest = max(eager, key=lambda timms: sum((timms[1][n] - w).norm() / w.norm() for n, w in exact_weights.items()))
    testing.assert_model_close_to_oracle(weights, exact_weights, furthest[1])


def test_the_run_learns(oracle):
    losses, _ = oracle
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize(
    "accelerated", ["references in the kernels' place", pytest.param("kernels", marks=pytest.mark.long)]
)
def test_accelerated_training_follows_timms(request, oracle, eager, accelerated):
    request.getfixturevalue("kernels" if accelerated == "kernels" else "kernels_stood_in")
    model = fastdeit.accelerate(student().to(testing.kernel_device()))
    assert_same_curve(run(model), oracle, eager)


def tanh_gelu(model):
    for block in model.blocks:
        block.mlp.act = GELUTanh()


def other_eps(model):
    model.norm.eps = 1e-5


def stale_bias(model):
    model.blocks[0].mlp.fc1.bias.requires_grad_(False)


@pytest.mark.parametrize("change", [tanh_gelu, other_eps, stale_bias])
def test_the_bound_rejects_a_model_that_is_almost_timms(oracle, eager, change):
    model = student().to(testing.kernel_device())
    change(model)
    with pytest.raises(AssertionError):
        assert_same_curve(run(model), oracle, eager)
