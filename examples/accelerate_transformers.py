"""Accelerate a model of Hugging Face transformers; Trainer and save_pretrained work as before."""

import tempfile

import torch
from transformers import DeiTConfig, DeiTForImageClassification

import fastdeit

# With weights: DeiTForImageClassification.from_pretrained("facebook/deit-base-distilled-patch16-224")
config = DeiTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, num_labels=10)
model = fastdeit.accelerate(DeiTForImageClassification(config))
print(fastdeit.explain(model, on_gpu=True))

images, labels = torch.randn(2, 3, 224, 224), torch.tensor([3, 7])
output = model(pixel_values=images, labels=labels)
output.loss.backward()
assert all(parameter.grad is not None for parameter in model.parameters())

with tempfile.TemporaryDirectory() as folder:  # a checkpoint of transformers, without a trace of fastdeit
    model.save_pretrained(folder)
    again = DeiTForImageClassification.from_pretrained(folder).eval()
with torch.no_grad():
    assert torch.allclose(again(images).logits, model.eval()(images).logits, atol=1e-5)
