"""What is asked of the fused blocks of every library: the host's numbers, state and calls, and its code where no kernel runs."""

import copy
import pickle
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastdeit
from fastdeit import backends, testing
from fastdeit.blocks.fused_module import is_fused
from fastdeit.nn.host_block import HostBlock


def shaken(model: nn.Module) -> nn.Module:
    """The model in evaluation, no parameter at its initial zero or one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class Stack(nn.Module):
    """Blocks of width 64 in a model that fastdeit does not know, for images of 3 channels."""

    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 64, 16, 16), nn.ModuleList(blocks)

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def output(model: Callable, x: Tensor) -> Tensor:
    """The model's logits, or what else it is for."""
    found = model(x)
    for name in ("logits", "last_hidden_state"):
        found = getattr(found, name, found)
    return found


def step(model: nn.Module, x: Tensor, forward: Callable | None = None) -> dict[str, Tensor]:
    """The output of the model, or of forward, and the gradients of the input and of every parameter, by name."""
    torch.manual_seed(7)
    x = x.detach().requires_grad_()
    model.zero_grad()
    found = output(model if forward is None else forward, x)
    found.backward(torch.linspace(-1, 1, found.numel()).view(found.shape).to(found))
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": found.detach(), "input": x.grad} | gradients


def assert_as_accurate(model: nn.Module, x: Tensor, forward: Callable = lambda model: model) -> nn.Module:
    """Holds one step of an accelerated copy, through `forward(copy)`, to the numerics contract. Returns the copy."""
    accelerated = fastdeit.accelerate(copy.deepcopy(model))
    got, eager = step(accelerated, x, forward(accelerated)), step(model, x)
    oracle = step(copy.deepcopy(model).double(), x.double())
    assert got.keys() == eager.keys() == oracle.keys()
    for names in (("output",), tuple(eager.keys() - {"output"})):
        testing.assert_model_close_to_oracle(*({n: result[n] for n in names} for result in (got, oracle, eager)))
    return accelerated


def assert_kernels_as_accurate(model: nn.Module, x: Tensor) -> None:
    """The same under the interpreter, or on a GPU in the first dtype that kernels multiply in."""
    form = testing.kernel_device(), testing.kernel_dtypes(products=True)[0]
    with backends.use_backend("triton"):
        accelerated = fastdeit.accelerate(copy.deepcopy(model)).to(*form)
        assert blocks_of(accelerated) and not why_not(accelerated)
    with backends.use_backend("triton" if form[0].type == "cpu" else "auto"):
        assert_as_accurate(model.to(*form), x.to(*form))


def blocks_of(model: nn.Module) -> list[HostBlock]:
    return [module for module in model.modules() if isinstance(module, HostBlock)]


def why_not(model: nn.Module) -> set[str]:
    """The reasons of accelerated blocks that step aside."""
    names = {name for name, module in model.named_modules() if isinstance(module, HostBlock)}
    return {row.reason for row in fastdeit.explain(model) if row.name in names and not row.fused}


def notes(model: nn.Module) -> set[str]:
    """What accelerated blocks that run fused say of parts that they call."""
    names = {name for name, module in model.named_modules() if isinstance(module, HostBlock)}
    return {row.reason for row in fastdeit.explain(model) if row.name in names and row.fused} - {""}


class Adapter(nn.Module):
    """The shape of low-rank adapters, in a projection's place."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        generator, self.base = torch.Generator().manual_seed(5), base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        for parameter in (*self.down.parameters(), *self.up.parameters()):
            nn.init.normal_(parameter, std=0.1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapt(model: nn.Module, kind: str, *endings: str) -> nn.Module:
    """Puts adapters, or torchao's int8 weights, on the projections whose names end so. All else is frozen."""
    names = [name for name, _ in model.named_modules() if name.endswith(endings)]
    model.requires_grad_(False)
    if kind == "stand-in":
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Adapter(model.get_submodule(name)))
    elif kind == "PEFT":
        peft = pytest.importorskip("peft", reason="needs PEFT")
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False), model)
    else:
        quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
        config = quantization.Int8WeightOnlyConfig()
        before = torch.get_float32_matmul_precision()  # torchao before 0.18 allows TF32 in the whole process
        quantization.quantize_(model, config, filter_fn=lambda module, name: name in names)
        torch.set_float32_matmul_precision(before)
    return model.eval()


def assert_adapters_act(model: nn.Module, kind: str, x: Tensor, *endings: str) -> nn.Module:
    """Outputs and gradients with adapters are the host's, and the blocks stay fused around them. Returns the accelerated copy."""
    stock = adapt(copy.deepcopy(model), kind, *endings)
    accelerated = fastdeit.accelerate(copy.deepcopy(stock))
    got, expected = step(accelerated, x), step(stock, x)
    assert len(expected) > 2 or kind == "torchao"
    torch.testing.assert_close(got, expected)
    assert not torch.equal(expected["output"], step(model, x)["output"]) and not why_not(accelerated)
    return accelerated


def assert_state_is_kept(model: nn.Module, x: Tensor) -> None:
    """Same parameters and keys, the host's forward bit for bit without kernels, copies, pickles, and back."""
    classes, parameters, keys = list(map(type, model.modules())), list(model.parameters()), list(model.state_dict())
    stock = output(model, x)
    fastdeit.accelerate(fastdeit.accelerate(model))
    assert blocks_of(model) and list(model.state_dict()) == keys
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(output(model, x), stock)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(map(type, other.modules())) == list(map(type, model.modules()))
        assert torch.equal(output(other, x), stock)
    assert list(map(type, fastdeit.restore(model).modules())) == classes
    assert not any(map(is_fused, model.modules()))


def assert_hooks_are_called(model: nn.Module, part: str, x: Tensor) -> None:
    """A hook inside the last block sees what the host computes there, and changes it; the block runs fused again without it."""
    stock, accelerated = model, fastdeit.accelerate(copy.deepcopy(model))
    results = []
    for either in (stock, accelerated):
        handle = either.get_submodule(part).register_forward_hook(lambda module, args, out: out * 2)
        results.append(output(either, x))
        if either is accelerated:
            (reason,) = why_not(accelerated)
            assert "hook" in reason
        handle.remove()
    torch.testing.assert_close(*results)
    assert not why_not(accelerated)


def assert_training_agrees(model: nn.Module, x: Tensor) -> None:
    """Ten updates with and without, then either's checkpoint loaded by the other."""
    runs = []
    for trained in (fastdeit.accelerate(copy.deepcopy(model)), copy.deepcopy(model)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        losses = []
        for _ in range(10):
            loss = output(trained, x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        runs.append((trained, losses))
    (ours, our_losses), (stock, losses) = runs
    assert our_losses == pytest.approx(losses, rel=1e-4)
    untrained = fastdeit.accelerate(copy.deepcopy(model))
    untrained.load_state_dict(stock.state_dict())
    torch.testing.assert_close(output(untrained, x), output(stock, x))
    plain = copy.deepcopy(model)
    plain.load_state_dict(ours.state_dict())
    torch.testing.assert_close(output(plain, x), output(ours, x))


def assert_compiles_whole(model: nn.Module, x: Tensor, backend: str = "aot_eager") -> None:
    """One graph, within the contract; "aot_eager" traces backward too, "eager" takes half the time."""
    torch.compiler.reset()
    assert_as_accurate(model, x, forward=lambda m: torch.compile(m, backend=backend, fullgraph=True))
    torch.compiler.reset()


@pytest.fixture
def hosts() -> types.SimpleNamespace:
    """The helpers above."""
    return types.SimpleNamespace(
        shaken=shaken,
        Stack=Stack,
        output=output,
        step=step,
        blocks_of=blocks_of,
        why_not=why_not,
        notes=notes,
        adapt=adapt,
        assert_adapters_act=assert_adapters_act,
        assert_as_accurate=assert_as_accurate,
        assert_kernels_as_accurate=assert_kernels_as_accurate,
        assert_state_is_kept=assert_state_is_kept,
        assert_hooks_are_called=assert_hooks_are_called,
        assert_training_agrees=assert_training_agrees,
        assert_compiles_whole=assert_compiles_whole,
    )
