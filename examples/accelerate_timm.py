"""Accelerate a model of timm: the same parameters and results, and an explanation of what runs fused."""

import timm
import torch

import fastdeit

model = timm.create_model("deit_tiny_patch16_224", depth=2, num_classes=10).eval()
images = torch.randn(2, 3, 224, 224)
with torch.no_grad():
    expected = model(images)

names = [name for name, _ in model.named_parameters()]
fastdeit.accelerate(model)  # in place; on a GPU, move it there afterwards
assert [name for name, _ in model.named_parameters()] == names
with torch.no_grad():
    assert torch.equal(model(images), expected) or torch.cuda.is_available()

with torch.autocast("cpu", torch.bfloat16):
    print(fastdeit.explain(model, on_gpu=True))  # what would run fused on a GPU of capability 8.0 or newer

# Train as before.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loss = torch.nn.functional.cross_entropy(model.train()(images), torch.tensor([0, 1]))
loss.backward()
optimizer.step()

fastdeit.restore(model)  # timm's implementation again
