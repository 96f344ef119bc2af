"""A whole training step captured in a CUDA graph: nothing in it waits for the device or allocates outside the graph's pool."""

import copy

import pytest
import torch

import fastdeit
from fastdeit.losses import DistillationCrossEntropy

pytestmark = pytest.mark.gpu


def captured_step(step, warm_up=3):
    """A function that replays `step`, after some runs of it on another stream as CUDA graphs ask for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


STEPS = {
    "autocast to bf16": dict(autocast=torch.bfloat16),
    "autocast to fp16": dict(autocast=torch.float16),
    "fp32": dict(),
    "bf16 parameters": dict(parameters=torch.bfloat16),
    "lean": dict(autocast=torch.bfloat16, memory="lean"),
    "checkpointed": dict(autocast=torch.bfloat16, checkpointed=True),
    "without the kernels of blocks": dict(autocast=torch.bfloat16, exclude=("blocks.*",)),
}


@pytest.mark.parametrize("form", STEPS)
def test_a_training_step_can_be_captured(settings, small, form):
    """Forward, distillation loss, backward and optimizer, with drop path and LayerScale."""
    options = (
        dict(autocast=None, parameters=torch.float32, memory="usual", checkpointed=False, exclude=()) | STEPS[form]
    )
    model = small(drop_path_rate=0.3, init_values=0.3).to("cuda", options["parameters"]).train()
    fastdeit.accelerate(model, memory=options["memory"], exclude=options["exclude"])
    model.set_distilled_training(True)
    model.set_grad_checkpointing(options["checkpointed"])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, capturable=True)
    criterion = DistillationCrossEntropy("hard")
    x = settings.images(4, device="cuda", dtype=options["parameters"])
    targets, teacher = torch.arange(4, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", options["autocast"], enabled=options["autocast"] is not None):
            loss = criterion(model(x), targets, teacher)
        loss.backward()
        optimizer.step()

    replay = captured_step(step)
    for _ in range(2):
        replay()
    torch.cuda.synchronize()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.3])
def test_a_captured_training_step_follows_the_eager_one(settings, small, monkeypatch, dtype, drop_path_rate):
    """Forward under autocast, distillation loss, backward and optimizer; without drop path the weights are the same bits."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    batches = [settings.images(8, device="cuda") + i for i in range(4)]
    targets = torch.arange(8, device="cuda") % 5
    teacher = (targets + 1) % 5
    results = []
    for captured in (False, True):
        model = fastdeit.accelerate(small(drop_path_rate=drop_path_rate, init_values=0.3)).cuda().train()
        model.set_distilled_training(True)
        start = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, capturable=True)
        criterion = DistillationCrossEntropy("hard")
        x, loss = batches[0].clone(), torch.zeros((), device="cuda")

        def step(model=model, optimizer=optimizer, criterion=criterion, x=x, loss=loss):
            optimizer.zero_grad(set_to_none=False)
            with torch.autocast("cuda", dtype):
                value = criterion(model(x), targets, teacher)
            value.backward()
            optimizer.step()
            loss.copy_(value.detach())

        run = captured_step(step) if captured else step
        step()
        with torch.no_grad():
            model.load_state_dict(start)
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
        losses = []
        for batch in batches:
            x.copy_(batch)
            run()
            losses.append(loss.item())
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    (losses, weights), (replayed, replayed_weights) = results
    assert all(torch.isfinite(torch.tensor(replayed)))
    if drop_path_rate == 0.0:
        assert replayed == losses
        assert all(torch.equal(a, b) for a, b in zip(replayed_weights, weights, strict=True))
    else:
        assert len(set(replayed)) == len(replayed)  # each replay draws masks of its own


@pytest.mark.numeric
def test_a_captured_forward_pass_reads_new_images(settings, small):
    model = fastdeit.accelerate(small()).cuda().bfloat16().eval()
    x = settings.images(4, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(4, 5, device="cuda", dtype=torch.bfloat16)

    @torch.no_grad()
    def forward():
        out.copy_(model(x))

    replay = captured_step(forward)
    for _ in range(2):
        x.mul_(-1)
        replay()
        with torch.no_grad():
            assert torch.equal(out, model(x))
