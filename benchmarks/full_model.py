"""An accelerated model with synthetic images, for what looks at a whole forward pass or training step."""

import timm
import torch
from torch import Tensor

import fastdeit
from fastdeit.losses import DistillationCrossEntropy

_TOY = dict(img_size=32, embed_dim=64, num_heads=1, depth=2, num_classes=10)


class Model:
    """An accelerated timm model in bf16 autocast or in bf16, hard distillation from labels at hand and AdamW.

    Args:
        name: timm's.
        batch: images.
        device: of the model.
        toy: of the same kind, but tiny.
        bf16: weights and images in bf16, without autocast.

    Raises:
        ValueError: timm has no such model.
    """

    def __init__(self, name: str, batch: int, device: torch.device, toy: bool = False, *, bf16: bool = False) -> None:
        if not timm.is_model(name):
            raise ValueError(f"model: timm has no {name!r}")
        self.model = fastdeit.accelerate(timm.create_model(name, drop_path_rate=0.1, **(_TOY if toy else {}))).to(
            device
        )
        self.distilled = hasattr(self.model, "set_distilled_training")
        if self.distilled:
            self.model.set_distilled_training(True)
        size = self.model.patch_embed.img_size
        self.images = torch.randn(batch, 3, *size, device=device)
        self.bf16 = bf16
        if bf16:
            self.model, self.images = self.model.bfloat16(), self.images.bfloat16()
        self.target = torch.randint(0, self.model.num_classes, (batch,), device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=device.type == "cuda")
        self.criterion = DistillationCrossEntropy("hard" if self.distilled else "none")

    @torch.inference_mode()
    def infer(self) -> Tensor:
        """Logits of the images."""
        self.model.eval()
        with self._autocast():
            return self.model(self.images)

    def train(self) -> Tensor:
        """The loss of one step, which updates the weights."""
        self.model.train()
        with self._autocast():
            out = self.model(self.images)
            loss = self.criterion(out, self.target, self.target if self.distilled else None)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=not self.bf16)
