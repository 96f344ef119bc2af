"""What may differ between a checkpointed forward pass and its recomputation: stream, memory of parameters, hooks, backend."""

import pytest
import torch
from torch.utils import checkpoint as torchs
from torch.utils.checkpoint import checkpoint

import fastdeit
from fastdeit.kernels.mlp.activation import activation_forward_kernel
from fastdeit.plan import checkpointing
from fastdeit.plan.training import TrainingPlan
from tests.plan import models as whole_models
from tests.plan.changes import replaced_data
from tests.plan.events import recorded
from tests.plan.models import needs_plans, plans
from tests.plan.test_blocks import block_and_tokens, called
from tests.plan.test_checkpointing import checkpointed_block, own_work

pytestmark = [pytest.mark.fake_device, needs_plans]


def on_stream(stream, call):
    with torch.cuda.stream(stream):
        return call()


def ending_on_the_cpu(block, x):
    """Its last node, a CPU's, reads what it has saved: so the caller's stream is the current one in the recomputation."""
    return checkpoint(lambda x: called(block, x).cpu().float().sin(), x, use_reentrant=False)


@pytest.mark.parametrize("forward_aside", [True, False])
def test_the_recomputation_runs_on_the_stream_of_its_forward_pass(forward_aside, monkeypatch):
    block, x = block_and_tokens("ViT", torch.bfloat16)
    then, now = streams = [torch.cuda.default_stream(), torch.cuda.Stream()]
    if forward_aside:
        then, now = reversed(streams)
    shared = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: shared.append((tensor.shape, stream.cuda_stream))
    )

    def backward_on(stream):
        made = on_stream(then, lambda: ending_on_the_cpu(block, x))
        return recorded(lambda: on_stream(stream, lambda: made.sum().backward()))

    for _ in range(2):
        backward_on(now)
    assert [type(entry) for entry in plans(block)] == [TrainingPlan]
    elsewhere, there = (own_work(backward_on(stream), block) for stream in (now, then))
    assert [event._replace(stream=0) for event in elsewhere] == [event._replace(stream=0) for event in there]
    assert {event.stream for event in elsewhere} == {then.cuda_stream} == {event.stream for event in there}
    assert shared == [(x.shape, then.cuda_stream), (x.shape, now.cuda_stream)] * 2  # of the two that ran aside


def test_a_parameter_with_other_memory_is_named():
    block, x, call = checkpointed_block()
    made = call(x)
    replaced_data(block.mlp.fc1.weight)
    with pytest.raises(RuntimeError, match=r"checkpointing: mlp\.fc1\.weight of ViTLayer got other `data` between"):
        made.sum().backward()
    call(x).sum().backward()  # by ops


def test_a_parameter_may_be_changed_in_place():
    block, x, call = checkpointed_block()
    made, weight = call(x), block.mlp.fc1.weight
    with torch.no_grad():
        weight.copy_(torch.ones_like(weight))
    made.sum().backward()
    assert weight.grad is not None


def test_a_hook_on_a_kernel_is_named(monkeypatch):
    _, x, call = checkpointed_block()
    made = call(x)
    monkeypatch.setattr(activation_forward_kernel, "pre_run_hooks", [lambda *_, **__: None])
    with pytest.raises(RuntimeError, match="a hook of Triton's was registered on a kernel between"):
        made.sum().backward()


def test_another_backend_in_the_forward_pass_alone_is_named():
    block, x, call = checkpointed_block()
    with fastdeit.use_backend("reference"):
        made = call(x)
    with pytest.raises(RuntimeError, match=r"did not in the forward pass.* The backend is now 'auto'.*use_backend"):
        made.sum().backward()
    with fastdeit.use_backend("reference"):
        call(x).sum().backward()

    def inside(x):
        with fastdeit.use_backend("reference"):
            return called(block, x)

    checkpoint(inside, x, use_reentrant=False).sum().backward()


def test_frozen_blocks_save_nothing_and_may_differ():
    block, x, _ = checkpointed_block()
    other, _ = block_and_tokens("ViT", torch.bfloat16)
    tokens = x.detach()
    block.requires_grad_(False)
    with fastdeit.use_backend("reference"):
        made = checkpoint(lambda x: called(block, x).sin() * other.mlp.fc2.bias, tokens, use_reentrant=False)
    made.sum().backward()
    assert other.mlp.fc2.bias.grad is not None


@pytest.mark.parametrize("between", ["triton", "reference"])
def test_a_whole_model_without_a_plan_repeats_its_backend(between):
    model = whole_models.build().train()
    model.blocks[0].register_forward_hook(lambda *_: None)
    x, backend = whole_models.images(model), "auto"

    def step(later):
        with torch.autocast("cuda", torch.bfloat16), fastdeit.use_backend(backend):
            made = checkpoint(model, x, use_reentrant=False)
        with fastdeit.use_backend(later):
            return own_work(recorded(lambda: sum(each.sum() for each in made).backward()), model)

    step(backend)
    assert step(between) == step(backend)
    assert not any(isinstance(entry, TrainingPlan) for entry in plans(model))


def test_a_hook_that_the_compiler_is_kept_from_is_known():
    """As PyTorch 2.14 keeps it from the recomputation's."""

    class Frame:
        metadata_fn = unpack_error_cb = None

    frame = Frame()
    hooks = torchs._checkpoint_hook(frame)
    wrapped = lambda x: hooks.pack_hook(x)  # noqa: E731
    push, pop = (getattr(torch._C._autograd, f"_{what}_saved_tensors_default_hooks") for what in ("push", "pop"))
    for known in (False, True):
        if known:
            wrapped._torchdynamo_orig_callable = hooks.pack_hook
        push(wrapped, hooks.unpack_hook)
        try:
            call = checkpointing.checkpointed_call()
        finally:
            pop()
        assert (call is not None and call.frame is frame) is known


@pytest.mark.parametrize("unknown", ["_FORWARD", "_RECOMPUTATION"])
def test_where_one_hook_is_unknown_neither_pass_is_planned(unknown, monkeypatch):
    monkeypatch.setattr(checkpointing, unknown, None)
    block, x = block_and_tokens("ViT", torch.bfloat16)
    for _ in range(3):
        checkpoint(lambda x: called(block, x), x, use_reentrant=False).sum().backward()
    assert not any(isinstance(entry, TrainingPlan) for entry in plans(block))
