"""From a trained model to a file that serves: weights that timm loads, and an exported program that needs no Python class."""

import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

import fastdeit


def create() -> torch.nn.Module:
    return timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10).eval()


model = fastdeit.accelerate(create())  # and train it
images = torch.randn(4, 3, 32, 32)
with torch.inference_mode():
    expected = model(images)

with tempfile.TemporaryDirectory() as folder:
    # Weights have timm's names: timm loads them, with or without fastdeit.
    weights = Path(folder) / "model.safetensors"
    save_file(model.state_dict(), weights)
    served = create()
    served.load_state_dict(load_file(weights))
    with torch.inference_mode():
        assert torch.allclose(served(images), expected, atol=1e-5)

    # After restore the program has PyTorch's operations alone, for any batch size, and loads without fastdeit.
    batch = torch.export.Dim("batch", min=1, max=256)
    program = torch.export.export(fastdeit.restore(model), (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, Path(folder) / "model.pt2")
    loaded = torch.export.load(Path(folder) / "model.pt2").module()
    with torch.inference_mode():
        assert torch.allclose(loaded(images[:3]), expected[:3], atol=1e-5)
print("the weights and the program give the model's logits")
