"""`fastdeit bench deployment`: PyTorch's tutorial on deploying a vision transformer beside frozen models, without a GPU.

The tutorial, "Optimizing Vision Transformer Model for Deployment", scripts a DeiT, quantizes its linear layers dynamically and
saves it for the lite interpreter. Sizes are of files; host time is measured on the fake CUDA runtime, images/s are estimated.
"""

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import fastdeit
from fastdeit.benchmarks import host_time
from fastdeit.benchmarks.report.pictures import TBPS, TFLOPS
from fastdeit.benchmarks.report.roofline_table import table
from fastdeit.cost.frozen import PRECISIONS as ESTIMATED
from fastdeit.cost.frozen import frozen_parts
from fastdeit.cost.models import seconds
from fastdeit.cost.view import shape_of
from fastdeit.inference.architecture import FORMATS, STREAM
from fastdeit.inference.model import OptimizedModel
from fastdeit.testing import fake_cuda

MODEL = "deit_base_patch16_224"  # the tutorial's
CALIBRATION = 256  # images
DRIVER_US = 2.5  # a launch, assumed
_TURNS, _CALLS = 9, 3
_BATCH = 256  # of the estimate
_RANDOM = 8  # images to calibrate with, where nothing is compared


class Way(NamedTuple):
    """One way to deploy the model; None for what is not known of it."""

    way: str
    mib: float
    of_float32: float
    same_class: float | None  # as the model in float32
    logit_error: float | None  # RMS of the error over RMS of the logits
    host_time: float | None  # at batch size 1, of timm's in eager mode
    images_per_s: float | None  # estimated, batches of 256


class Images(NamedTuple):
    """Normalised ones, to calibrate with and to compare on."""

    calibration: list[tuple[Tensor, Tensor]]
    compared: list[Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=MODEL,
        metavar="MODEL|CHECKPOINT",
        help=f"timm's model with random weights, of which nothing is compared, or a run or its weights (default: {MODEL})",
    )
    parser.add_argument("--no-host", action="store_true", help="do not measure host time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints the table.

    Raises:
        ValueError: timm has no such model, or the checkpoint is no good.
        FileNotFoundError: there is no such checkpoint.
        OSError: the fake CUDA runtime is not available here.
    """
    is_checkpoint = Path(args.model).exists() or args.model.endswith(".safetensors")
    if not is_checkpoint and not timm.is_model(args.model):
        raise ValueError(f"model: expected a model of timm's or a checkpoint, got {args.model!r}")
    model, images = _trained(Path(args.model)) if is_checkpoint else (_untrained(args.model), None)
    host = {} if args.no_host or is_checkpoint else measured_host_time(args.model)
    found = [way._asdict() for way in ways(model, images, host)]
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    about = f"compared on {sum(map(len, images.compared))} validation images" if images else "random weights"
    print(
        f"{args.model}, {about}; host time at batch size 1 with {DRIVER_US} us a launch, of timm's in bf16; images/s estimated at "
        f"{TFLOPS:.0f} TFLOP/s and {TBPS} TB/s, batches of {_BATCH}\n"
    )
    print(table([_shown(row) for row in found]))
    return 0


def ways(model: nn.Module, images: Images | None, host: dict[str, float]) -> Iterator[Way]:
    """Yields timm's model, the tutorial's three forms of it, and frozen models of each precision.

    Args:
        model: timm's, in float32 on the CPU, in evaluation mode.
        images: None for a model whose logits say nothing.
        host: by precision, of frozen models.
    """
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "model"
        torch.save(model.state_dict(), file)
        whole = file.stat().st_size
        expected = images and torch.cat([model(batch) for batch in images.compared])

        def way(name: str, run: Callable[[Tensor], Tensor], **known: Any) -> Way:
            size = file.stat().st_size
            errors = dict(same_class=None, logit_error=None)
            if images is not None:
                got = torch.cat([run(batch) for batch in images.compared]).float()
                errors["same_class"] = (got.argmax(-1) == expected.argmax(-1)).float().mean().item()
                errors["logit_error"] = ((got - expected).norm() / expected.norm()).item()
            known = dict(host_time=None, images_per_s=None) | known
            return Way(name, size / 2**20, size / whole, **errors, **known)

        yield way("timm, float32", model)
        for name, module in tutorials(model, file):
            yield way(name, module)
        for precision in STREAM:
            fast = _frozen(model, precision, images)
            fast.save(file)
            facts = dict(host_time=host.get(precision), images_per_s=_estimated(model, precision))
            yield way(f"fastdeit, {precision}", fast, **facts)


def tutorials(model: nn.Module, file: Path) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yields what the tutorial makes of the model; each is in the file when it is yielded."""
    from torch.utils.mobile_optimizer import optimize_for_mobile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the tutorial's functions are deprecated
        scripted = torch.jit.script(model)
        torch.jit.save(scripted, file)
        yield "tutorial: script", scripted
        quantized = torch.quantization.quantize_dynamic(
            copy.deepcopy(model), qconfig_spec={nn.Linear}, dtype=torch.qint8
        )
        scripted = torch.jit.script(quantized)
        torch.jit.save(scripted, file)
        yield "tutorial: dynamic int8, script", scripted
        mobile = optimize_for_mobile(scripted)
        mobile._save_for_lite_interpreter(str(file))
        yield "tutorial: the same for mobile, lite interpreter", mobile


def measured_host_time(name: str) -> dict[str, float]:
    """By precision the host time of frozen models over timm's in bf16, eager, at batch size 1, in a process of its own.

    Raises:
        OSError: the fake CUDA runtime is not available here.
        RuntimeError: the process failed.
    """
    child = fake_cuda.run_python("-m", __name__, name)
    if child.returncode:
        raise RuntimeError(f"measuring host time failed:\n{child.stderr}")
    return json.loads(child.stdout)


def _host_time(name: str) -> dict[str, float]:
    model = _untrained(name)
    frozen = {precision: _frozen(model, precision, None).cuda() for precision in STREAM}
    return host_time.ratios(model.cuda().bfloat16(), frozen, _TURNS, _CALLS, DRIVER_US)


def _untrained(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def _frozen(model: nn.Module, precision: str, images: Images | None) -> OptimizedModel:
    options: dict[str, Any] = {}
    if precision in FORMATS:
        shape = _RANDOM, model.patch_embed.proj.in_channels, *model.patch_embed.img_size
        made_up = [(torch.randn(shape), torch.arange(_RANDOM))]
        options["calibration"] = made_up if images is None else images.calibration
    return fastdeit.optimize_for_inference(model, precision, **options)


def _estimated(model: nn.Module, precision: str) -> float:
    """Images a second; fp16's are bf16's."""
    found = frozen_parts(shape_of(model), _BATCH, precision if precision in ESTIMATED else "bf16")
    return _BATCH / seconds(found, TFLOPS * 1e12, TBPS * 1e12)


def _trained(path: Path) -> tuple[nn.Module, Images]:
    """The model of a checkpoint, training images to calibrate with, and its validation images."""
    from fastdeit.train.checkpoints import load_weights, read_metadata
    from fastdeit.train.datasets import load_data
    from fastdeit.train.models import create_student
    from fastdeit.train.sampling import eval_loader, seed_sample

    path = path / "last.safetensors" if path.is_dir() else path
    config, classes, _ = read_metadata(path)
    data, model = load_data(config), create_student(config, len(classes), torch.device("cpu"))
    load_weights(model, path)
    chosen, labels = [], []
    for index in range(0, len(data.train), max(1, len(data.train) // CALIBRATION)):
        seed_sample(0, 0, index)
        image, label = data.train[index]
        chosen.append(image)
        labels.append(label)
    mean, std = (torch.tensor(getattr(config, name)).view(-1, 1, 1) for name in ("mean", "std"))
    calibration = (torch.stack(chosen[:CALIBRATION]).float() / 255 - mean) / std
    compared = [batch[0] for batch in eval_loader(data.val, config.batch_size, 0, pin_memory=False)]
    return fastdeit.restore(model).eval(), Images([(calibration, torch.tensor(labels[:CALIBRATION]))], compared)


def _shown(row: dict[str, Any]) -> dict[str, str]:
    def text(name: str, form: str) -> str:
        return "" if row[name] is None else format(row[name], form)

    return {
        "way": row["way"],
        "file, MiB": text("mib", ".1f"),
        "of float32": text("of_float32", ".3f"),
        "same class": text("same_class", ".1%"),
        "logit error": text("logit_error", ".2%"),
        "host time": text("host_time", ".2f"),
        "images/s": text("images_per_s", ",.0f"),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(_host_time(sys.argv[1]), sys.stdout)
