"""Runs before any test module is imported: without a GPU, kernels run under Triton's interpreter from here on.

With `--on ptx:sm_90` they are compiled for that architecture and executed by the PTX machine instead (docs/compiled-code.md).
"""

import argparse
import contextlib
import math
import os
import timeit
from collections import Counter
from collections.abc import Callable

import torch

# Triton decides at its import whether kernels are interpreted, hence before pytest reads its options. Processes of pytest-xdist
# have other arguments, and inherit the environment.
if not torch.cuda.is_available():
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--on", default=os.environ.get("FASTDEIT_TESTS_ON", ""))
    os.environ["FASTDEIT_TESTS_ON"] = options.parse_known_args()[0].on
    os.environ["TRITON_INTERPRET"] = "0" if os.environ["FASTDEIT_TESTS_ON"] else "1"

import pytest

from fastdeit import backends, testing

pytest_plugins = ["fastdeit.testing.fake_cuda.pytest_plugin"]
ON = not torch.cuda.is_available() and os.environ.get("FASTDEIT_TESTS_ON")
torch.set_num_threads(1)  # tests run in parallel processes
if os.environ.get("TRITON_INTERPRET") == "1":
    testing.correct_interpreter_bfloat16()
    testing.correct_interpreter_float8()
    testing.cache_interpreter_builtins()


def pytest_addoption(parser):
    parser.addoption(
        "--on", metavar="ptx:ARCH", help="execute compiled kernels, such as ptx:sm_80 or ptx:sm_90, on the CPU"
    )


def pytest_configure(config):
    if not ON:
        return
    from fastdeit.testing.ptx import harness

    config.stack = contextlib.ExitStack()
    config.stack.enter_context(harness.executing(harness.parse_target(ON)))


def pytest_unconfigure(config):
    if ON:
        config.stack.close()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("one_graph") and torch.__version__.startswith("2.8."):
            item.add_marker(pytest.mark.skip(reason="PyTorch 2.8 does not trace fused modules into one graph"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh_state():
    """Every test starts from the same seed, backend and environment, whatever ran before it."""
    torch.manual_seed(0)
    backends.set_backend("auto")
    before = dict(os.environ)
    yield
    backends.set_backend("auto")
    for name in [name for name in os.environ if name not in before]:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@pytest.fixture
def kernels_stood_in(monkeypatch) -> Counter:
    """Lets the drop-in modules take their fused forward on the CPU, each op running its reference. Counts the ops' calls."""
    from fastdeit import ops

    def why_reference(x, *_):
        return "inside a torch.func transform" if backends.in_functional_transform() else None

    for name in ("why_no_attention_kernel", "why_no_layer_norm_kernel", "why_no_mlp_kernel"):
        monkeypatch.setattr(f"fastdeit.blocks.call_rules.{name}", why_reference)
    monkeypatch.setattr("fastdeit.blocks.embedding.why_reference", why_reference)
    calls = Counter()

    def counted(name, op):
        def call(*args, **kwargs):
            calls[name] += 1
            return op(*args, **kwargs)

        return call

    for name in (
        "add_layer_norm",
        "add_layer_norm_attention",
        "add_layer_norm_mlp",
        "attention",
        "attention_qkv",
        "layer_norm",
        "mlp",
        "patch_embedding",
    ):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return calls


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """32 training and 8 validation images of each of the digits 0, 1 and 2."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

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

    from fastdeit.train.config import load_config

    def make(**changes):
        small = dict(
            data=str(image_folder),
            img_size=16,
            in_chans=1,
            batch_size=32,
            epochs=3,
            warmup_epochs=1,
            threads=1,
            model_kwargs=dict(patch_size=8, embed_dim=32, num_heads=1, depth=2),
            drop_path=0.2,
            teacher_model="regnetx_002",
            teacher_kwargs=dict(depth=8, stem_width=8),
            teacher_epochs=2,
            reprob=0.5,
            mixup=0.8,
            cutmix=1.0,
            mixup_prob=1.0,
        )
        return load_config("digits", {**small, **changes})

    return make


@pytest.fixture
def small_config(make_small_config):
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


@pytest.fixture
def in_module_calls() -> Callable[[Callable[[], object]], float]:
    """What something costs the host, in calls of an nn.Identity, which take about as long as the module calls that fusing saves.

    Both are Python that looks into dictionaries and both are timed in turns, so that the machine and what else it does cancel.
    """
    modules, x = [torch.nn.Identity() for _ in range(10)], torch.zeros(2, 5, 64)

    def yardstick():
        for module in modules:
            module(x)

    def cost(call: Callable[[], object]) -> float:
        calls = (call, yardstick)
        least = [math.inf, math.inf]
        for _ in range(60):
            for i, each in enumerate(calls):
                least[i] = min(least[i], timeit.timeit(each, number=10))
        return least[0] / (least[1] / len(modules))

    return cost
