"""What the tests of the branch ops share, and those of the distillation loss."""

import pytest
import torch

from fastdeit import backends, testing


def _saved_bytes(function, given, parameters, casts=True) -> int:
    """Bytes of distinct storages saved for backward, without parameters and, with casts, what has the size of one: their casts."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    sizes = {(p.numel(), size) for p in parameters for size in (2, 4)} if casts else set()
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and (tensor.numel(), tensor.element_size()) not in sizes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = function(*given)  # alive while counting: a freed storage's address is given out again
    del outputs
    return sum(kept.values())


def _soft_target(batch, classes):
    y = torch.full((batch, classes), 0.1 / classes)
    y[torch.arange(batch), torch.randint(classes, (batch,))] += 0.6
    y[torch.arange(batch), torch.randint(classes, (batch,))] += 0.3
    return y.to(testing.kernel_device())


def _present(kind, base, z, d, y, t):
    head, label = (None, None) if base == "none" else (z, y)
    dist, teacher = (None, None) if kind == "none" else (d, t)
    return head, dist, label, teacher


def _run(function, given):
    given = [t if t is None else t.detach().clone().requires_grad_() for t in given]
    with backends.use_backend("triton"):
        outputs = function(*given)
        sum((i + 1) * out.float().square().sum() for i, out in enumerate(outputs)).backward()
    return [*outputs, *(t.grad for t in given if t is not None)]


@pytest.fixture
def saved_bytes():
    return _saved_bytes


@pytest.fixture
def run():
    """Outputs and all gradients of a function of these tensors, on the kernels."""
    return _run


@pytest.fixture
def soft_target():
    """soft_target(batch, classes): what mixup makes of two smoothed labels."""
    return _soft_target


@pytest.fixture
def present():
    """present(kind, base, logits, dist_logits, target, teacher): the arguments that these terms take."""
    return _present
