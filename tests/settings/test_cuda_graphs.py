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
