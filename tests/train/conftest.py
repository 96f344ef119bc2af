"""A folder of small real images, and a configuration that trains on it in seconds."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fastdeit.train.config import Config, load_config


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """32 training and 8 validation images of each of the digits 0, 1 and 2."""
    root = tmp_path_factory.mktemp("images")
    digits = load_digits()
    for digit in range(3):
        images = digits.images[digits.target == digit][:40]
        for number, image in enumerate(images):
            folder = root / ("train" if number < 32 else "val") / f"digit-{digit}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).resize((20, 20)).save(
                folder / f"{number}.png"
            )
    return root


@pytest.fixture(scope="session")
def make_small_config(image_folder):
    """Every part of the recipe at its smallest: 3 updates an epoch, a teacher trained here, mixup, erasing, drop path, EMA."""

    def make(**changes) -> Config:
        small = dict(
            data=str(image_folder), img_size=16, in_chans=1, batch_size=32, epochs=3, warmup_epochs=1, threads=1,
            model_kwargs=dict(patch_size=8, embed_dim=32, num_heads=1, depth=2), drop_path=0.2,
            teacher_model="regnetx_002", teacher_kwargs=dict(depth=8, stem_width=8), teacher_epochs=2,
            reprob=0.5, mixup=0.8, cutmix=1.0, mixup_prob=1.0,
        )  # fmt: skip
        return load_config("digits", {**small, **changes})

    return make


@pytest.fixture
def small_config(make_small_config) -> Config:
    return make_small_config()


@pytest.fixture
def small_checkpoint(small_config, tmp_path):
    """Untrained weights of the small student, as a run leaves them."""
    import torch

    from fastdeit.train.checkpoints import save_weights
    from fastdeit.train.models import create_student

    path = tmp_path / "last.safetensors"
    model = create_student(small_config, 3, torch.device("cpu"))
    save_weights(path, model.state_dict(), small_config, ("digit-0", "digit-1", "digit-2"), epoch=0)
    return path
