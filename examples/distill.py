"""Distill your own teacher into a DeiT in a plain training loop, on scikit-learn's digits."""

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import fastdeit
from fastdeit.losses import DistillationLoss

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.images))
images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16  # (1797, 1, 8, 8)
images = (images - 0.3) / 0.38
labels = torch.tensor(digits.target)[order]
train, test = slice(0, 1437), slice(1437, None)


def batches(epochs: int, size: int = 32):
    """Images (size, 1, 8, 8) and labels (size,) of the training set, in a new order each epoch."""
    for _ in range(epochs):
        for indices in torch.randperm(train.stop).split(size):
            yield images[indices], labels[indices]


# The teacher: any module from images to logits.
teacher = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1),
    nn.BatchNorm2d(64),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(64, 10),
)
optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
for x, y in batches(epochs=3):
    optimizer.zero_grad()
    F.cross_entropy(teacher(x), y).backward()
    optimizer.step()

# The student: two heads, one of which learns from the teacher's decisions.
SIZES = dict(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=2)
student = timm.create_model(
    "deit_tiny_distilled_patch16_224",
    **SIZES,
)
fastdeit.accelerate(student)
student.set_distilled_training(True)  # in train mode it returns the outputs of both heads
criterion = DistillationLoss(nn.CrossEntropyLoss(label_smoothing=0.1), teacher, "hard", alpha=0.5, tau=1.0)
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
for x, y in batches(epochs=10):
    optimizer.zero_grad()
    criterion(x, student(x), y).backward()
    optimizer.step()

student.eval()
with torch.no_grad():
    accuracies = {
        name: (model(images[test]).argmax(1) == labels[test]).float().mean().item()
        for name, model in (("teacher", teacher.eval()), ("student", student))
    }
print(", ".join(f"{name} {accuracy:.1%}" for name, accuracy in accuracies.items()), "on 360 images")
assert accuracies["student"] > 0.7
