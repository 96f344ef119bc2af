"""`fastdeit export MODEL|CHECKPOINT --output FILE`: writes a frozen model to a file for serving."""

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from fastdeit.commands import named_model
from fastdeit.commands.eval import weights_file
from fastdeit.commands.image_batches import labelled_images
from fastdeit.inference.architecture import FORMATS as QUANTIZED
from fastdeit.inference.architecture import IMAGES, READOUTS, STREAM
from fastdeit.inference.exporting import FORMATS, export_optimized
from fastdeit.inference.optimizing import optimize_for_inference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL|CHECKPOINT",
        help="a model (its pretrained weights, if timm's), or a checkpoint or run folder",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default="safetensors",
        help="; ".join(f"{name}: {about}" for name, about in FORMATS.items()) + " (default: safetensors)",
    )
    parser.add_argument(
        "--precision", choices=tuple(STREAM), default="bf16", help="precision of the frozen model (default: bf16)"
    )
    parser.add_argument(
        "--images",
        choices=IMAGES,
        default="float",
        help="input of the model: float, normalised, or uint8, as decoded (default: float)",
    )
    parser.add_argument(
        "--readout", choices=tuple(READOUTS), help="which logits a distilled model returns (default: mean)"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FOLDER", help="images for fp8 and int8, at most 512; 256 are enough"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="modules that fp8 and int8 leave in bf16"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the file; returns 0.

    Raises:
        FileNotFoundError: there is no such checkpoint or image.
        ValueError: the model, the format and the options do not fit each other.
    """
    model, facts = _model(args.model)
    options: dict[str, Any] = dict(images=args.images, readout=args.readout)
    if args.images == "uint8" and facts:
        options |= dict(mean=facts["mean"], std=facts["std"])
    plain = optimize_for_inference(model, "bf16", **options)
    plain.preprocessing = plain.preprocessing._replace(**facts)
    if args.precision in QUANTIZED:
        if args.calibration is None:
            raise ValueError(f"--calibration: expected a folder of images, from which {args.precision} has its scales")
        calibration = labelled_images(args.calibration, plain)
        options |= dict(calibration=calibration, exclude=args.exclude)
    elif args.calibration is not None or args.exclude:
        raise ValueError(f"--calibration, --exclude: are for fp8 and int8, not for {args.precision}")
    fast = optimize_for_inference(model, args.precision, **options)
    fast.preprocessing = plain.preprocessing
    export_optimized(fast, args.output, args.format)
    size = sum(t.numel() * t.element_size() for t in fast.buffers())
    print(f"{args.output}: {args.precision}, weights of {size / 2**20:.1f} MiB, {FORMATS[args.format]}")
    return 0


def _model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model on the CPU, and for a checkpoint the preparation of its images and the names of its classes."""
    import torch

    from fastdeit.commands.explain import check_model_name
    from fastdeit.train.checkpoints import load_weights, read_metadata
    from fastdeit.train.models import create_student

    if not Path(name).exists() and not name.endswith(".safetensors"):
        if named_model.is_path(name):
            return named_model.make(name).eval(), {}
        check_model_name(name)
        return named_model.make(name, pretrained=True).eval(), {}
    path = weights_file(name)
    config, classes, _ = read_metadata(path)
    model = create_student(config, len(classes), torch.device("cpu"))
    load_weights(model, path)
    facts = {key: getattr(config, key) for key in ("crop_pct", "crop_mode", "interpolation", "mean", "std")}
    facts = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    return model.eval(), {**facts, "class_names": tuple(classes)}
